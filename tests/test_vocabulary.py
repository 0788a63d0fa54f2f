"""The vocabulary file: the canonical World one, others of its grammar, and a message for every bad line."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_ext.tokenizer import WorldTokenizer
from rwkv_ext.vocabulary import WORLD


def test_vocabulary_is_the_canonical_file():
    data = WORLD.read_bytes()
    assert (
        hashlib.sha256(data).hexdigest() == "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
    )
    assert len(data) == 1_093_733


SINGLE_BYTES = [f"{byte + 1} b'\\x{byte:02x}' 1" for byte in range(256)]


def load(tmp_path, *lines, end="\n", base=SINGLE_BYTES):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(end.join([*base, *lines]).encode("latin-1") + end.encode())
    return WorldTokenizer(path)


def test_another_vocabulary(tmp_path):
    lines = [r"300 'ab' 2", r'257 "it\'s \"x\" \\" 10', r"65535 '\u4f60\xe9' 5", r"258 b'\xff \t' 3"]
    tokenizer = load(tmp_path, *lines)
    assert tokenizer.encode("abab") == [300, 300]
    assert tokenizer.decode([257, 65535]) == 'it\'s "x" \\\u4f60\u00e9'
    assert tokenizer.encode_bytes(b"\xff \t") == [258]
    assert tokenizer.byte_lengths[[300, 65535, 259]].tolist() == [2, 5, 0]


def test_line_ends_do_not_matter(tmp_path):
    world = WorldTokenizer()
    lines = WORLD.read_bytes()
    for data in (lines.replace(b"\n", b"\r\n"), lines.rstrip(b"\n")):
        (tmp_path / "copy.txt").write_bytes(data)
        np.testing.assert_array_equal(WorldTokenizer(tmp_path / "copy.txt").byte_lengths, world.byte_lengths)


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "line must read ID LITERAL LENGTH, got ''"),
        ("300 'ab'", "line must read ID LITERAL LENGTH, got '300 'ab''"),
        ("x 'ab' 2", r"id must be 1 to 65535 \(0 ends a document\), got 'x'"),
        ("0 'ab' 2", "id must be 1 to 65535 .*, got '0'"),
        ("65536 'ab' 2", "id must be 1 to 65535 .*, got '65536'"),
        ("99999999999999999999 'ab' 2", "id must be 1 to 65535 .*, got '99999999999999999999'"),
        ("256 'ab' 2", "id must be new, got 256"),
        ("300 'A' 1", "token must be new, got that of 66"),
        ("300 'ab' 3", "length must be 2, the number of bytes of ''ab'', got '3'"),
        ("300 'ab' 2x", "length must be 2, .* got '2x'"),
        ("300 '\\xe9' 1", "length must be 2, .* got '1'"),
        ("300 '' 0", "token must have 1 to 255 bytes, got 0"),
        (f"300 '{'a' * 256}' 256", "token must have 1 to 255 bytes, got 256"),
        ("300 ab 2", "token must be a Python literal in quotes, got 'ab'"),
        ("300 'ab\" 2", "token must be a Python literal in quotes"),
        ("300 ' 1", "token must be a Python literal in quotes"),
        ("300 'a'b' 3", "quote inside the token must be escaped, got ''a'b''"),
        (r"300 'a\q' 2", r"escape must be .*, got ''a\\q''"),
        ("300 'a\\' 2", r"escape must be "),
        (r"300 b'\u4f60' 3", r"escape must be "),
        (r"300 'a\x4' 2", "escape must have 2 hexadecimal digits"),
        (r"300 '\u12g4' 3", "escape must have 4 hexadecimal digits"),
        (r"300 '\ud800' 3", r"\\u must not be a surrogate"),
        ("300 'a\xff' 2", "text must be UTF-8, got ''a\\?''"),
        ("300 b'\xc3\xa9' 2", r"byte above 7F must read \\xNN"),
    ],
)
def test_bad_vocabulary_line_is_named(tmp_path, line, message):
    with pytest.raises(
        ValueError, match=rf"vocabulary .*vocabulary.txt, line 258: {message}.*; use an intact copy"
    ):
        load(tmp_path, "400 'fine' 4", line, "500 'also' 4")


def test_vocabulary_must_hold_every_byte(tmp_path):
    with pytest.raises(
        ValueError, match=r"vocabulary.txt: every byte must be a token, got none for 255; use an"
    ):
        load(tmp_path, base=SINGLE_BYTES[:-1])


def test_missing_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        WorldTokenizer(tmp_path / "nowhere.txt")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_any_vocabulary_line_gives_a_message_or_a_token(tmp_path_factory, line):
    path = tmp_path_factory.getbasetemp() / "fuzzed.txt"
    path.write_bytes("\n".join(SINGLE_BYTES).encode() + b"\n" + line)
    try:
        WorldTokenizer(path)
    except ValueError as error:
        assert "use an intact copy" in str(error)

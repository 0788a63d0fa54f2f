"""The World tokenizer against golden vectors, the PyPI packages `rwkv` and `pyrwkv-tokenizer`, and Python's codecs."""

import codecs
import pickle
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyrwkv_tokenizer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter_lock import turns_beside

from rwkv_ext.tokenizer import WorldTokenizer
from rwkv_ext.vocabulary import WORLD

GOLDEN = [
    (
        "Today is a beautiful day. \u4eca\u5929\u662f\u7f8e\u597d\u7684\u4e00\u5929\u3002",
        "33520 4600 332 59219 21509 47 33 10381 11639 13091 15597 11685 14734 10250 11639 10080",
    ),
    ("", ""),
    (" ", "33"),
    ("\n\n", "261"),
    ("\0", "1"),
    ("\u00d5\U000683b8", "2483 242 169 143 185"),
    ("\u6a81", "231 171 130"),
    ("\ufffd", "19232"),
    ("\ufeff", "19125"),
    ("\u2028", "3006 169"),
    ("\ufdfa", "240 184 187"),
    ("1234567890 100", "632 654 676 698 710 3483 49"),
    (" 10 11", "3483 3484"),
    ("don't I'll THEY'RE", "7373 461 308 5229 20956 90 40 1397"),
    (
        "\U0001f980\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
        "3319 167 129 3319 146 169 9810 3319 146 170 9810 3319 146 168 9810 3319 146 167",
    ),
    ("   \n\t\r\n", "19249 10 263"),
    ("<|endoftext|>", "61 125 25258 7588 2318 125 63"),
    ("e\u0301 \u00e9", "102 2672 4970"),
    (
        "\ud55c\uad6d\uc5b4 \uc548\ub155\ud558\uc138\uc694",
        "43875 18830 23109 3266 150 19052 18777 18862",
    ),
    ("\u0928\u092e\u0938\u094d\u0924\u0947", "9473 9477 9484 9495 9469 9492"),
    ("a" * 40, "53739 53739 53739 53739 53739"),
    (" " * 130, "65529 267"),
    ("=" * 81, "65518 65293 62"),
    ("#" * 81, "65527 36"),
    (b"\xff\xfe", "256 255"),
    (b"\xe4\xbd", "3030"),
    (b"\xf0\x9f\xa6", "3319 167"),
    (b"\xc0\x80", "193 129"),
    (b"\xed\xa0\x80", "238 161 129"),
    (bytes(range(16)), "1 2 3 4 5 6 7 8 9 258 12 13 14 15 16"),
]


@pytest.fixture(scope="module")
def tokens(upstream):
    return [upstream.idx2token[id] for id in range(1, 65530)]


@pytest.mark.parametrize("text, ids", GOLDEN, ids=[repr(text)[:20] for text, _ in GOLDEN])
def test_golden_vector(world, text, ids):
    ids = [int(id) for id in ids.split()]
    data = text if isinstance(text, bytes) else text.encode()
    assert world.encode_bytes(data) == ids
    assert world.encode_array(data).tolist() == ids
    assert world.decode_bytes(ids) == data
    if isinstance(text, str):
        assert world.encode(text) == ids
        assert world.decode(ids, errors="strict") == text


def test_every_token_encodes_to_itself(world, tokens):
    assert [world.encode_bytes(token) for token in tokens] == [[id] for id in range(1, 65530)]
    assert [world.decode_bytes([id]) for id in range(1, 65530)] == tokens
    assert world.decode_bytes(np.arange(65530)) == b"".join(tokens)
    assert world.byte_lengths.tolist() == [0, *map(len, tokens), 0, 0, 0, 0, 0, 0]
    assert world.byte_lengths.dtype == np.uint8


def test_tokens_with_neighbours_equal_upstream(world, upstream, tokens):
    rng = random.Random(1)
    cases = [token + bytes([rng.randrange(256)]) for token in tokens[::4]]
    cases += [rng.choice(tokens) + rng.choice(tokens) for _ in range(8000)]
    cases += [token[: rng.randrange(1, len(token))] for token in tokens[256::4]]
    for case in cases:
        assert world.encode_bytes(case) == upstream.encodeBytes(case)


def test_random_mixes_equal_upstream_and_rust(world, upstream):
    rust = pyrwkv_tokenizer.RWKVTokenizer()
    rng = random.Random(2)
    alphabet = ["0", "1", " ", "\n", "\r", "\t", *",.;!?:'\"-=", "\u4f60", "\u597d"]
    cases = ["".join(rng.choices(alphabet, k=rng.choice((5, 60, 256)))) for _ in range(400)]
    cases += ["".join(chr(rng.randrange(256)) for _ in range(rng.randrange(1, 32))) for _ in range(2000)]
    cases += [chr(rng.choice((rng.randrange(256, 0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(3000)]
    cases += [" " * n for n in range(300)] + [piece * n for piece in ("- ", "=", "\n", "ab") for n in range(1, 140, 7)]
    for case in cases:
        ids = world.encode(case)
        assert ids == upstream.encode(case) == rust.encode(case)
        assert world.decode(ids, "strict") == case


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_round_trip_and_equal_upstream(world, upstream, data):
    ids = world.encode_array(data)
    assert ids.dtype == np.uint16 and 0 not in ids
    assert ids.tolist() == upstream.encodeBytes(data) == world.encode_bytes(data)
    assert world.decode_bytes(ids) == data


def test_boundary_shared_with_a_split_text(world, upstream):
    # The state is the position alone: cut at a token boundary, both halves encode as they do together.
    text = WORLD.read_bytes()[300_000:310_000]
    ids = world.encode_bytes(text)
    cut = len(world.decode_bytes(ids[:1000]))
    assert world.encode_bytes(text[:cut]) + world.encode_bytes(text[cut:]) == ids == upstream.encodeBytes(text)


def test_any_buffer_is_bytes(world):
    data = "na\u00efve".encode()
    for buffer in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert world.encode_bytes(buffer) == world.encode_array(buffer).tolist() == world.encode("na\u00efve")


def test_encode_refuses_other_types(world):
    with pytest.raises(TypeError, match=r"encode: text must be a str, got bytes; use encode_bytes\(\)"):
        world.encode(b"text")
    with pytest.raises(TypeError, match=r"data must be contiguous bytes, got str; use encode\(\) for a str"):
        world.encode_bytes("text")
    with pytest.raises(TypeError, match="data must be contiguous bytes, got numpy.ndarray"):
        world.encode_bytes(np.zeros((4, 4), np.uint8)[:, 1])


def test_lone_surrogate_is_an_error(world):
    with pytest.raises(UnicodeEncodeError, match="position 1: surrogates not allowed; read the text with errors"):
        world.encode("a\ud800")


@pytest.mark.parametrize("make", [list, tuple, np.array, iter, lambda ids: np.array(ids, np.uint16)])
def test_decode_takes_any_sequence(world, make):
    assert world.decode(make([33520, 0, 4600])) == "Today is"


def test_decode_of_end_of_document_is_empty(world):
    assert world.decode([0]) == "" and world.decode([]) == "" and world.decode(np.array([])[:0].tolist()) == ""


@pytest.mark.parametrize("id", [65530, 65535, 65536, 65536 + 33, 33 - 65536, -1, 2**63 - 1, 2**64 - 1, 2**70, -(2**70)])
def test_decode_names_index_and_id(world, id):
    message = rf"decode: ids\[1\] must be 0 or the id of a token \(1 to 65529\), got {id}; mask"
    with pytest.raises(ValueError, match=message):
        world.decode([5, id])
    for dtype in ("uint16", "int32", "uint32", "int64", "uint64", ">i8", object):
        if dtype is object or np.iinfo(dtype).min <= id <= np.iinfo(dtype).max:
            with pytest.raises(ValueError, match=message):
                world.decode_bytes(np.array([5, id], dtype))
    stream = world.stream()
    stream.push(5)
    with pytest.raises(ValueError, match=message):
        stream.push(id)
    with pytest.raises(ValueError, match=message.replace("1", "2", 1)):
        stream.push([6, id])  # named by its place since the last flush
    assert stream.push(33) == " "  # what was refused changed nothing


def test_decode_refuses_what_are_no_ids(world):
    for ids, got in ((b"ab", "bytes"), ("ab", "str"), (7, "int")):
        with pytest.raises(TypeError, match=f"decode: ids must be a sequence of integers, got {got}"):
            world.decode(ids)
    with pytest.raises(TypeError, match=r"decode: ids\[1\] must be an integer, got float"):
        world.decode([1, 2.0])
    for array in (np.zeros(2), np.zeros((1, 2), int), np.zeros(2, bool)):
        with pytest.raises(TypeError, match="decode: ids must be integers in one dimension, got an array of"):
            world.decode(array)


def test_decode_errors_apply_to_all_bytes_together(world):
    crab = [3319, 167, 129]  # one character over three tokens
    assert world.decode(crab) == "\U0001f980"
    broken = world.encode_bytes(b"a\xf0\x9fb\xff")
    assert world.decode(broken) == "a\ufffdb\ufffd"
    assert world.decode(broken, "ignore") == "ab"
    with pytest.raises(UnicodeDecodeError, match="position 1-2: invalid continuation byte"):
        world.decode(broken, "strict")
    with pytest.raises(ValueError, match="errors must be 'strict', 'replace' or 'ignore', got 'backslashreplace'"):
        world.decode(broken, "backslashreplace")


def test_stream_never_shows_half_a_character(world):
    stream = world.stream()
    assert [stream.push(id) for id in (3319, 167, 129, 33)] == ["", "", "\U0001f980", " "]
    assert stream.flush() == ""


def test_stream_does_not_stall_on_replacement_characters(world):
    stream = world.stream()
    assert stream.push(19232) == "\ufffd"  # a genuine U+FFFD
    assert stream.push(256) == "\ufffd"  # byte FF can never be part of a character
    assert [stream.push(id) for id in (3319, 66)] == ["", "\ufffdA"]  # F0 9F, then something else
    assert stream.push(0) == ""
    assert stream.push(3319) == "" and stream.flush() == "\ufffd"
    assert stream.flush() == "" and stream.push(66) == "A"


def unfinished_characters():
    """Every start of a character's UTF-8 that is not the whole of it (the last byte has 64 values)."""
    points = [point for point in range(0x80, 0x110000, 64) if not 0xD800 <= point < 0xE000]
    return {chr(point).encode()[:length] for point in points for length in (1, 2, 3)} - {
        chr(point).encode() for point in points
    }


UNFINISHED = unfinished_characters()


def check_stream(world, ids):
    stream, data, text = world.stream(), b"", ""
    for id in ids:
        data += world.decode_bytes([id])
        text += stream.push(id)
        held = next((n for n in (1, 2, 3) if data[-n:] in UNFINISHED), 0)
        assert text == data[: len(data) - held].decode(errors="replace")
    assert text + stream.flush() == data.decode(errors="replace") == world.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 256) | st.integers(1, 65529), max_size=60))
def test_stream_holds_back_unfinished_characters_alone(world, ids):
    check_stream(world, ids)


@pytest.mark.parametrize("errors", ["strict", "replace", "ignore"])
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 256) | st.sampled_from([0, 19232, 3319, 33]) | st.integers(1, 65529), max_size=9))
)
def test_stream_of_parts_equals_python_decoding_bytes(world, errors, parts):
    stream, python = world.stream(errors), codecs.getincrementaldecoder("utf-8")(errors)
    for number, part in enumerate(parts):
        data = world.decode_bytes(part)
        try:
            expected = python.decode(data)
            if re.fullmatch(rb"\xed[\xa0-\xbf]", python.getstate()[0]):
                expected += python.decode(b"", final=True)  # it waits for more behind the half of a surrogate
        except UnicodeDecodeError:
            for _ in range(2):  # a refused part is as if it had not been pushed
                with pytest.raises(UnicodeDecodeError):
                    stream.push(part)
            return
        given = np.array(part, [np.uint16, np.int64][number % 2]) if number % 3 else part
        assert stream.push(given) == expected
    try:
        assert stream.flush() == python.decode(b"", final=True)
    except UnicodeDecodeError:
        assert python.getstate()[0]  # both: strict, and a character left open


def test_strict_stream(world):
    stream = world.stream("strict")
    assert stream.push([3319, 167]) == ""
    with pytest.raises(UnicodeDecodeError, match="position 0-2: invalid continuation byte"):
        stream.push([66, 33])
    assert stream.push(129) == "\U0001f980"
    assert stream.push(3319) == ""
    with pytest.raises(UnicodeDecodeError, match="position 0-1: unexpected end of data"):
        stream.flush()
    assert stream.push(66) == "A" and stream.flush() == ""


@pytest.mark.parametrize("make", [list, tuple, np.array, iter, torch.tensor, lambda ids: np.array(ids, np.uint16)])
def test_stream_takes_any_sequence(world, make):
    stream = world.stream()
    assert stream.push(make([33520, 0, 4600])) == "Today is"
    assert stream.push(np.uint16(33)) + stream.push(np.array(33)) + stream.push(torch.tensor(33)) == "   "


def test_stream_refuses_what_are_no_ids(world):
    stream = world.stream()
    for ids, got in ((b"ab", "bytes"), ("ab", "str"), (None, "NoneType"), (1.5, "float")):
        with pytest.raises(TypeError, match=f"push: ids must be an id or a sequence of ids, got {got}"):
            stream.push(ids)
    for ids, index in (([1, 2.0], 1), (np.zeros((1, 2), int), 0), (np.zeros(2), 0)):
        with pytest.raises(TypeError, match=rf"decode: ids\[{index}\] must be an integer, got"):
            stream.push(ids)
    with pytest.raises(
        ValueError, match="stream: errors must be 'strict', 'replace' or 'ignore', got 'surrogateescape'"
    ):
        world.stream("surrogateescape")


def test_stream_at_every_lead_and_second_byte(world):
    for lead in range(0xC0, 0x100):
        for second in range(0x7E, 0xC2):
            check_stream(world, [lead + 1, second + 1, 0x82, 0x82])


def test_stream_keeps_its_tokenizer_alive():
    stream = WorldTokenizer().stream()
    assert stream.push(33520) == "Today"


def test_threads_share_one_tokenizer(world):
    text = WORLD.read_bytes()[:200_000]
    expected = world.encode_array(text)
    with ThreadPoolExecutor(4) as pool:
        for ids in pool.map(world.encode_array, [text] * 8):
            np.testing.assert_array_equal(ids, expected)


def test_encoding_releases_the_interpreter_lock(world):
    text = WORLD.read_bytes() * 30
    assert turns_beside(lambda: world.encode_array(text)) >= 5


def test_array_outlives_the_tokenizer_and_is_writable(world):
    ids = WorldTokenizer().encode_array(b"Today is")
    ids[0] = 1
    assert ids.tolist() == [1, 4600]


def test_pickle_and_fork_safe_settings(world):
    assert pickle.loads(pickle.dumps(world)).encode("Today") == [33520]
    with pytest.raises(ValueError, match="read-only"):
        world.byte_lengths[0] = 1

"""The C++ reader of JSON lines: what it accepts is what json.loads reads, and it accepts what people write."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkv_ext._load import native


def read(world, data, skipped=0, key="text", eod=True, drop_blank=False, vectors=True):
    """Return (texts, dropped, lines, position) of LineReader.encode, checked for what must hold of all."""
    reader = native().LineReader(data)
    for _ in range(skipped):
        reader.next_line()
    ids, sizes, text_bytes, dropped, lines = reader.encode(world._native, key, eod, drop_blank, vectors)
    assert ids.dtype == np.uint16 and sizes.dtype == np.int32 and sizes.sum() == len(ids)
    parts = np.split(ids, np.cumsum(sizes))[:-1]
    assert not eod or all(part[-1] == 0 for part in parts)
    texts = [world.decode_bytes(part) for part in parts]
    assert [part.tolist() for part in parts] == [world.encode_bytes(text) + [0] * eod for text in texts]
    assert text_bytes == sum(map(len, texts))
    return texts, dropped, lines, reader.position


def accepted(world, line, key="text"):
    """Return the text of one line, or None where the reader leaves it to json.loads."""
    results = [read(world, line, key=key, vectors=vectors) for vectors in (True, False)]
    assert results[0] == results[1]
    texts, _, lines, position = results[0]
    assert (len(texts), lines, position) in ((1, 1, len(line)), (0, 0, 0))
    for after in (b'\n{"' + key.encode() + b'": "}"}', b'\n", "' + key.encode() + b'": "x"}'):  # changes nothing
        more, _, lines, position = read(world, line + after, key=key)
        if not texts:
            assert (more, lines, position) == ([], 0, 0)
        elif after.endswith(b'}"}'):
            assert (more, lines, position) == ([*texts, b"}"], 2, len(line + after))
        else:
            assert (more, lines, position) == (texts, 1, len(line) + 1)
    return texts[0] if texts else None


def expected(line, key="text"):
    """Return what json.loads says the text is, or None where there is none that UTF-8 can hold."""
    try:
        record = json.loads(line.decode())
        return record[key].encode() if isinstance(record, dict) else None
    except (ValueError, KeyError, AttributeError, RecursionError):
        return None


CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\/\b\f\n\r\t\0\x1f\x7f\u2028\U0001f980é')
STRINGS = st.text(CHARACTERS, max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(STRINGS, inner, max_size=4),
    max_leaves=8,
)
RECORDS = st.dictionaries(STRINGS | st.just("text"), VALUES, max_size=5)
STYLES = st.fixed_dictionaries(
    {"ensure_ascii": st.booleans(), "separators": st.sampled_from([None, (",", ":"), (" ,\t", "\r: ")])}
)


@given(RECORDS, STRINGS, STYLES)
@settings(max_examples=200)
def test_what_json_writes_is_accepted(world, record, text, style):
    line = json.dumps({**record, "text": text}, **style).encode()
    assert accepted(world, line) == text.encode() == expected(line)
    assert accepted(world, b" \t" + line + b" \r") == text.encode()


TELLING = [bytes([byte]) for byte in b'"\\{}[],:u0e.-+ntf\0\x1f\x80\xc0\xed\xf4\xff']
BYTES = st.sampled_from(TELLING) | st.binary(max_size=3)
MUTATIONS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3), BYTES), min_size=1, max_size=4)


@given(RECORDS, STRINGS, STYLES, MUTATIONS)
@settings(max_examples=600)
def test_whatever_is_accepted_is_what_json_reads(world, record, text, style, mutations):
    line = json.dumps({**record, "text": text}, **style).encode()
    for at, removed, put in mutations:
        at %= len(line) + 1
        line = line[:at] + put + line[at + removed :]
    line = line.replace(b"\n", b" ")
    got = accepted(world, line)
    assert got is None or got == expected(line), line


@given(st.binary(max_size=30))
@example(b'{"text": "\xed\xa0\x80"}')
def test_any_bytes(world, line):
    line = b'{"text": "' + line.replace(b"\n", b"") + b'"}'
    got, want = accepted(world, line), expected(line)
    assert got is None or got == want
    # Lone halves of pairs are the only thing in a string that the reader leaves to Python.
    assert got == want, line


@pytest.mark.parametrize("line", [
    b'{"text": NaN}', b'{"a": NaN, "text": "x"}', b'{"a": -Infinity, "text": "x"}', b'{"text": "x",}', b"{,}", b"{}",
    b'{"text": "x"} x', b'["text"]', b'{"text": 3}', b'{"text": "a", "text": 3}', b'{"text": "\\ud800"}',
    b'{"text": "\\udc00\\ud800"}', b'{"text": "\\ud800\\u0041"}', b'{"\\ud800": 1, "text": "x"}', b'{"text": "\x01"}',
    b'{"text": "\\x41"}', b'{"text": "\\u12g4"}', b'{"text": "\\u123', b'{"text": "a\\', b'{"text": "a', b'{"text"',
    b"{", b'{"a": 01, "text": "x"}', b'{"a": 1., "text": "x"}', b'{"a": .5, "text": "x"}', b'{"a": 1e, "text": "x"}',
    b'{"a": -, "text": "x"}', b'{"a": +1, "text": "x"}', b'{"a": tru, "text": "x"}', b'{"a" 1, "text": "x"}',
    b'{"a": [1,], "text": "x"}', b'{"a": [1 2], "text": "x"}', b'{"a": {"b"}, "text": "x"}', b'{"text": "x"}\x0c',
    b'{"a": ' + b"9" * 601 + b', "text": "x"}', b'{"a": ' + b"[" * 64 + b"]" * 64 + b', "text": "x"}',
    b'\xef\xbb\xbf{"text": "x"}', b'{"a": "\xff", "text": "x"}', b'{"text": "\xed\xa0\x80"}', b'{"text": "\xc0\x80"}',
    b'{"text": "\xf4\x90\x80\x80"}', b'{"text": "\xe4\xbd"}', b"{'text': 'x'}",
])  # fmt: skip
def test_left_to_json(world, line):
    assert accepted(world, line) is None


@pytest.mark.parametrize("line, text", [
    (b'{"text": "a", "text": "b\\n"}', b"b\n"),
    (b'{"text": "b\\n", "text": "a"}', b"a"),
    (b'{"text": 3, "text": "a"}', b"a"),
    (b'{"a": {"text": "inner"}, "text": "outer"}', b"outer"),
    (b'{"te\\u0078t": "x"}', b"x"),
    (b'{"text": "\\uD83E\\udd80\\u00e9\\/"}', "\U0001f980é/".encode()),
    (b'{"a": "\\ud800", "text": "x"}', b"x"),
    (b'{"a": -0.5e+10, "b": [[], {}, [true, false, null]], "text": ""}', b""),
    (b'{"a": ' + b"[" * 63 + b"]" * 63 + b', "text": "x"}', b"x"),
    (b'{"text": "\\u0000"}', b"\0"),
    (b'{"a": "' + b"\\u0431\\n\\ud800x" * 40 + b'\\"}", "text": "x", "b": "\\u4eca"}', b"x"),
])  # fmt: skip
def test_accepted(world, line, text):
    assert accepted(world, line) == text == expected(line)


def test_key_that_needs_escapes(world):
    line = json.dumps({"текст": "x"}).encode()
    assert accepted(world, line, "текст") == b"x" and accepted(world, line) is None


def test_runs_of_every_length_and_escapes_at_every_place(world):
    for length in range(70):
        for special in ('"', "\\", "\n", "é", "今", "\U0001f980"):
            for ascii_only in (True, False):
                text = "x" * length + special + "y" * (69 - length)
                assert accepted(world, json.dumps({"text": text}, ensure_ascii=ascii_only).encode()) == text.encode()


# What stands beside an escape: plain bytes, the ends of the ranges of each length, both cases of digits, pairs.
PARTS = r"x u é 今 \n \" \\ \/ \\u0041 \u0000 \u007F \u0080 \u07ff \u0800 \uD7ff \ue000 \uFFFF \u4eCA".split()
PARTS += [r"\ud800\udc00", r"\uDBFF\uDFFF"]
HALVES = r"\ud800 \uDBFF \udc00 \udfff \ud800\ud800 \udc00\udfff \ud83e\n \ud83ex \ud83e\u0041".split()
BORDERS = range(70)  # how far from the start of a string, in the blocks of 64 bytes that are read at once


@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "plain"])
def test_escapes_and_what_is_beside_them_at_every_place(world, vectors):
    for length in BORDERS:
        texts = [r"\t" + "x" * length + a + b for a in PARTS for b in PARTS]
        texts += [r"\t" + "x" * length + part * 24 for part in PARTS]
        lines = [f'{{"text": "{text}"}}'.encode() for text in texts]
        data = b"\n".join(lines)
        assert read(world, data, vectors=vectors) == (list(map(expected, lines)), 0, len(lines), len(data))


@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "plain"])
def test_escapes_where_a_long_string_is_cut(world, vectors):
    stretch = 65536  # what is unescaped before there is more room
    for part in [*PARTS, *HALVES, r"\x", "\x1f", ""]:
        texts = [r"\t" + "x" * length + part + "y" for length in range(stretch - 16, stretch + 1)]
        for text in [*texts, r"\t" + part * (3 * stretch // max(1, len(part)))]:
            for line in (f'{{"text": "{text}"}}'.encode(), f'{{"a": "{text}", "text": "x"}}'.encode()):
                want = None if part in HALVES and b'{"t' in line else expected(line)
                done = ([], 0, 0, 0) if want is None else ([want], 0, 1, len(line))
                assert read(world, line, vectors=vectors) == done
                assert read(world, line[:-2], vectors=vectors) == ([], 0, 0, 0)


def test_what_is_no_escape_at_every_place(world):
    wrong = [r"\u" + "12Ab"[:i] + bad + "12Ab"[i + 1 :] for i in range(4) for bad in r"g / : @ ` G é \\".split()]
    wrong += [*HALVES, r"\x41", r"\é", r"\N", "\x01", "\\\x01", "\x1f"]
    wrong += ["\\" + x for x in "\u0710\u2019\u6587\ue000\U00080000\U00100000"]  # \ b f n r t with the highest bit set
    for length in BORDERS:
        for text in wrong:
            line = ('{"text": "\\t' + "x" * length + text + '"}').encode()
            assert accepted(world, line) is None and accepted(world, line[:-2] + rb"\u4eca" * 9 + b'"}') is None


@pytest.mark.parametrize("part", ["x", r"\n", r"\u4eca", r"x\u0431", r"\ud83e\udd80"])
def test_strings_that_do_not_end(world, part):
    line = b'{"text": "' + part.encode() * 24
    for end in range(10, len(line) + 1):
        assert accepted(world, line[:end]) is None
        assert accepted(world, line[:end] + b'"}') == expected(line[:end] + b'"}')


def test_backslashes_in_runs_of_every_length(world):
    for length in range(66):
        for count in range(1, 140):
            line = b'{"text": "\\t' + b"x" * length + b"\\" * count + b'u0041"}'
            assert accepted(world, line) == expected(line)


def test_every_truncation_of_utf8(world):
    for text in ("é", "今", "\U0001f980", "\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff"):
        data = text.encode()
        for padding in (0, 5, 70):
            for length in range(len(data) + 1):
                line = b'{"text": "' + b"x" * padding + data[:length] + b'"}'
                assert accepted(world, line) == expected(line)


@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "plain"])
def test_utf8_at_every_edge(world, vectors):
    """Every kind of first byte before every kind of later one, in front of, across and behind a block of 32."""
    edges = [bytes([byte]) for byte in (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xE0, 0xF5, 0xFF)]
    leads = [bytes([byte]) for byte in (0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5)]
    pieces = [a + b + c + d for a in leads for b in edges for c in edges for d in (b"", b"\x80", b"\xbf", b"\xc3")]
    for before in (b"", b"x" * 28, "é".encode() * 15, b"x" * 29 + b"\xf0\x9f\xa6\x80"):
        for piece in pieces:
            data = before + piece
            done = native().encode_texts(world._native, data, np.array([0, len(data)]), 0, True, False, vectors)[4]
            assert done == is_utf8(data), data


@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "plain"])
def test_what_is_not_utf8_at_every_place_in_ascii(world, vectors):
    for part in (b"\xc3", b"\xe4\xbb", b"\xf0\x9f\xa6", b"\x80", "\U0001f980".encode()):
        for length in range(260):  # in the blocks of 128 bytes that are read at once
            data = b"x" * length + part + b"x" * (400 - length)
            done = native().encode_texts(world._native, data, np.array([0, len(data)]), 0, True, False, vectors)[4]
            assert done == is_utf8(data), (part, length)


def is_utf8(data):
    try:
        data.decode()
        return True
    except UnicodeDecodeError:
        return False


def test_many_lines(world):
    lines = [b'{"text": "one"}', b"", b" \t\r", b'{"text": "\\u0020\\u3000"}', b'{"text": ""}', b'{"text": "two"}']
    data = b"\n".join(lines)
    assert read(world, data) == ([b"one", "\u0020\u3000".encode(), b"", b"two"], 0, 6, len(data))
    assert read(world, data, drop_blank=True, eod=False) == ([b"one", b"two"], 2, 6, len(data))
    assert read(world, data + b"\n{", skipped=1) == ([" \u3000".encode(), b"", b"two"], 0, 5, len(data) + 1)
    assert read(world, b"") == ([], 0, 0, 0)


def test_blank_is_what_isspace_says(world):
    spaces = [chr(c) for c in range(0x110000) if chr(c).isspace()]
    others = [chr(c) for c in (0, 0x1B, 0x20 + 1, 0x84, 0x86, 0x180E, 0x200B, 0x2027, 0x202A, 0x2060, 0x3001, 0xFEFF)]
    for text in [*spaces, "".join(spaces), *others, "".join(spaces) + "x"]:
        line = json.dumps({"text": text}).encode()
        assert read(world, line, drop_blank=True)[1] == text.isspace(), ascii(text)


def test_texts(world):
    texts = [b"one", b"", "今天".encode(), b" \n", b"bad \xff", b"six"]
    data, offsets = b"".join(texts), np.cumsum([0, *map(len, texts)])

    def encode(first, drop_blank):
        batch = native().encode_texts(world._native, data, offsets, first, True, drop_blank)
        return [world.decode_bytes(part) for part in np.split(batch[0], np.cumsum(batch[1]))[:-1]], batch[3], batch[4]

    assert encode(0, False) == (texts[:4], 0, 4)
    assert encode(0, True) == ([b"one", texts[2]], 2, 4)
    assert encode(5, False) == ([b"six"], 0, 1)
    for bad in ([0, 5, 3], [-1, 3], [0, len(data) + 1]):
        with pytest.raises(ValueError, match="encode_texts: offsets must ascend from 0 to at most 19, got"):
            native().encode_texts(world._native, data, np.array(bad), 0, True, False)

"""Text encoded in chunks against the whole, whatever the chunks, and nothing held back that is certain."""

import os
import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longest_match import LongestMatch
from test_encoder import write_vocabulary

from rwkv_ext.tokenizer import WorldTokenizer
from rwkv_ext.vocabulary import WORLD

RUNS = [b" ", b"=", b"#", b"- ", b"\n", b"a", "\u3042".encode(), "\u4f60".encode(), "\u30b3\u30fc".encode(), b"\xff"]


def cut(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


def encode_chunks(tokenizer, chunks):
    stream = tokenizer.stream_encoder()
    return np.concatenate([*map(stream.push, chunks), stream.flush()])


def check_chunks(tokenizer, chunks):
    ids = encode_chunks(tokenizer, chunks)
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, tokenizer.encode_array(b"".join(chunks)))


def check_held(tokenizer, unfinished, chunks):
    """The bytes held are none, or the start of one token that may still become longer."""
    stream, data, ids = tokenizer.stream_encoder(), b"", []
    for chunk in chunks:
        data += chunk
        ids += stream.push(chunk).tolist()
        held = data[len(data) - stream.held :]
        assert tokenizer.decode_bytes(ids) + held == data
        assert not held or held in unfinished, (data, held)
    assert ids + stream.flush().tolist() == tokenizer.encode_bytes(data)
    assert stream.held == 0


@pytest.fixture(scope="module")
def unfinished(world):
    """Every beginning of a token that is shorter than the token."""
    tokens = (world.decode_bytes([id]) for id in range(1, 65530))
    return {token[:length] for token in tokens for length in range(1, len(token))}


@pytest.fixture(scope="module")
def mixed():
    """A text with what is hard to cut: many scripts, code, runs with and without boundaries, broken bytes."""
    rng = random.Random(1)
    parts = [WORLD.read_bytes()[start : start + 400] for start in range(100_000, 1_000_000, 90_000)]
    parts += [piece * rng.randrange(1, 200) for piece in RUNS]
    parts += ["\u4eca\u5929\u662f\u7f8e\u597d\u7684 \U0001f980\u200d\ud55c\uad6d\uc5b4 na\u00efve".encode() * 3]
    parts += [rng.randbytes(200), "\U0001f468\u200d\U0001f469\u200d\U0001f467".encode()[:-1]]
    rng.shuffle(parts)
    return b"".join(parts)


@pytest.mark.parametrize("first", range(1, 301, 50))
def test_chunks_of_every_size(world, mixed, first):
    for size in range(first, first + 50):
        check_chunks(world, cut(mixed, size))


def test_every_place_to_cut_in_two(world, mixed):
    data = mixed[:3000]
    for at in range(len(data) + 1):
        check_chunks(world, [data[:at], data[at:]])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=30) | st.sampled_from([run * 40 for run in RUNS]), max_size=30))
def test_any_bytes_in_any_chunks(world, unfinished, chunks):
    check_chunks(world, chunks)
    check_held(world, unfinished, chunks)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=20))
def test_any_text_in_chunks(world, chunks):
    assert encode_chunks(world, chunks).tolist() == world.encode("".join(chunks))


def test_one_byte_at_a_time_holds_nothing_certain(world, unfinished, mixed):
    check_held(world, unfinished, cut(mixed, 1))


def test_every_pair_of_bytes_across_a_cut(world, unfinished):
    for first in range(256):
        check_held(world, unfinished, [piece for second in range(256) for piece in (bytes([first]), bytes([second]))])


def test_two_tokens_cut_anywhere(world, unfinished):
    rng = random.Random(2)
    for _ in range(3000):
        data = world.decode_bytes(rng.choices(range(1, 65530), k=2))
        at = rng.randrange(len(data) + 1)
        check_held(world, unfinished, [data[:at], data[at:]])


@pytest.mark.parametrize("piece", RUNS, ids=repr)
def test_runs_are_encoded_as_they_come(world, unfinished, piece):
    check_held(world, unfinished, cut(piece * 700, 1))
    for length in (254, 255, 256, 257, 1023, 1100, 70_000):
        check_chunks(world, [piece * length] * 3)


def test_long_tokens_at_the_end_of_a_long_chunk(tmp_path):
    # One starts where less of the chunk is left than is read ahead elsewhere.
    tokens = [*(bytes([byte]) for byte in range(256)), *(b"q" * length for length in (2, 3, 200, 255))]
    tokenizer = write_vocabulary(tmp_path / "runs.txt", {token: id for id, token in enumerate(tokens, 1)})
    for length in range(1000, 1700):
        check_chunks(tokenizer, [b"q" * length, b"q" * 300])


def test_small_vocabularies(tmp_path):
    # Tokens up to the longest allowed that overlap in every way; a byte that starts no longer token is never held.
    rng = random.Random(3)
    for number in range(12):
        letters = bytes(rng.sample(range(256), rng.choice((1, 2, 3))))
        found = {bytes([byte]) for byte in range(256)}
        for _ in range(rng.choice((0, 5, 60, 300))):
            found.add(bytes(rng.choices(letters, k=rng.choice((2, 3, 9, 40, 255)))))
        tokens = dict(zip(found, rng.sample(range(1, 65536), len(found)), strict=True))
        tokenizer = write_vocabulary(tmp_path / f"{number}.txt", tokens)
        unfinished = {token[:length] for token in found for length in range(1, len(token))}
        alphabet = letters + bytes(rng.sample(range(256), 1))
        data = bytes(rng.choices(alphabet, k=2500))
        assert encode_chunks(tokenizer, cut(data, 300)).tolist() == LongestMatch(tokens).encode(data)
        for size in (1, 7, 254, 255, 256, 1000):
            check_held(tokenizer, unfinished, cut(data, size))


def test_strings_and_bytes_take_turns(world):
    stream = world.stream_encoder()
    ids = [stream.push(chunk) for chunk in ("na\u00ef", b"ve \xf0\x9f", bytearray(b"\xa6\x80"), "", b"", "\U0001f980")]
    assert [*np.concatenate(ids), *stream.flush()] == world.encode("na\u00efve \U0001f980\U0001f980")


def test_flush_starts_anew(world):
    stream = world.stream_encoder()
    for text in ("Today is", "", " beautiful"):
        assert [*stream.push(text), *stream.flush()] == world.encode(text)
    assert stream.flush().tolist() == []


def test_refused_chunks_add_nothing(world):
    stream = world.stream_encoder()
    first = stream.push("Tod")
    with pytest.raises(UnicodeEncodeError, match="position 2: surrogates not allowed; join the halves of a pair"):
        stream.push("ay\ud83e")
    for data, got in ((3, "int"), (None, "NoneType"), ([1], "list"), (np.zeros(4)[::2], "numpy.ndarray")):
        with pytest.raises(TypeError, match=f"push: data must be a str or contiguous bytes, got {got}"):
            stream.push(data)
    assert [*first, *stream.push("ay is"), *stream.flush()] == [33520, 4600]


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("piece", RUNS, ids=repr)
def test_memory_does_not_grow(world, piece):
    # 32 MB of what no boundary cuts; the ids are dropped.
    stream, chunk = world.stream_encoder(), piece * (65_536 // len(piece))
    stream.push(chunk)
    before = resident_bytes()
    for _ in range(500):
        stream.push(chunk)
        assert stream.held < 255
    assert resident_bytes() - before < 2 << 20


def test_a_second_thread_is_refused(world):
    # One is inside push(), without the lock, for as long as it takes to encode 130 MB; whoever comes then is refused.
    stream, started, messages = world.stream_encoder(), threading.Event(), []
    text = WORLD.read_bytes() * 120

    def push(data):
        started.set()
        try:
            stream.push(data)
        except RuntimeError as error:
            messages.append(str(error))

    thread = threading.Thread(target=push, args=[text])
    thread.start()
    started.wait()
    while thread.is_alive() and not messages:
        push("")
    thread.join()
    assert messages == ["push: another thread is using this stream; give each its own"]
    stream.flush()
    assert stream.push("Today is").tolist() == [33520]


def test_a_stream_keeps_its_tokenizer_alive():
    assert WorldTokenizer().stream_encoder().push("Today is").tolist() == [33520]

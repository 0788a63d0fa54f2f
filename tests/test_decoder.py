"""Decoding of many ids: its result grows while it is made, from a guess that a sample of the ids gives."""

import ctypes
import random
import threading
import tracemalloc

import numpy as np
import pytest
from interpreter_lock import turns_beside

from rwkv_ext.vocabulary import WORLD

TEXT = WORLD.read_bytes()
SAMPLE = 4096  # of the ids, if there are at least four times as many
SHORT, LONG = 33, 65529  # a token of 1 byte, the one of 128
FORMS = [np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i8", object, list]


def given_as(form, ids):
    """The ids as a list or an array of this type."""
    return ids.tolist() if form is list else ids.astype(form)


def sampled(count):
    """Which of `count` ids decoding looks at first."""
    step = count // SAMPLE
    number = np.arange(SAMPLE, dtype=np.uint64)
    return (number * step + (number * 0x9E3779B9 % 2**32 * step >> 32)).astype(np.int64)


def tokens_of(world):
    return [world.decode_bytes([id]) for id in range(65530)]


@pytest.mark.parametrize("dtype", FORMS[:-1])
def test_decoding_of_long_arrays(world, dtype):
    # every length of token, the longest at every distance from the end
    rng = random.Random(2)
    ids = rng.choices(range(65530), k=3000)
    for end in ([65529], [65529, 1], [65529, *[1] * 15], [65529, *[1] * 16], [1] * 17, [0], [65528, 0, 0]):
        data = b"".join(world.decode_bytes([id]) for id in ids + end)
        assert world.decode_bytes(np.array(ids + end, dtype)) == data
        assert world.decode_bytes(np.array((ids + end) * 2, dtype)[::2]) == b"".join(
            world.decode_bytes([id]) for id in ((ids + end) * 2)[::2]
        )


def test_decoding_undoes_encoding(world):
    for ids in (world.encode_array(TEXT), world.encode(TEXT.decode()), tuple(world.encode_bytes(TEXT))):
        assert world.decode_bytes(ids) == TEXT


def test_list_that_changes_while_it_is_read(world):
    ids = [33520]

    class Shrinking:
        def __index__(self):
            ids.clear()
            return 4600

    ids += [Shrinking(), *[5] * 1000]
    assert world.decode(ids) == "Today is"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seen, others", [(SHORT, LONG), (LONG, SHORT), (0, LONG), (LONG, 0), (0, 0), (1000, 1000)])
def test_sample_that_misleads(world, form, seen, others):
    for count in (4 * SAMPLE - 1, 4 * SAMPLE, 21_001):
        ids = np.full(count, others)
        ids[sampled(count)] = seen
        data = world.decode_bytes(given_as(form, ids))
        tokens = {id: world.decode_bytes([id]) for id in (seen, others)}
        assert data == b"".join(tokens[id] for id in ids.tolist())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seen, others", [(SHORT, LONG), (LONG, SHORT), (SHORT, SHORT)])
def test_bad_id_among_many_is_named(world, form, seen, others):
    ids = np.full(20_000, others)
    ids[sampled(len(ids))] = seen
    for place in (0, 10_001, 19_999):
        bad = ids.copy()
        bad[[place, 19_999]] = 65530, 65535
        with pytest.raises(ValueError, match=rf"ids\[{place}\] must be .* got 655{35 if place == 19_999 else 30};"):
            world.decode_bytes(given_as(form, bad))
        if form in (np.int64, list):
            bad[place] = 65536 + SHORT
            with pytest.raises(ValueError, match=rf"ids\[{place}\] must be .* got {65536 + SHORT};"):
                world.decode_bytes(given_as(form, bad))


def test_tokens_of_every_length_at_every_distance_from_the_end(world):
    tokens = tokens_of(world)
    by_length = {len(token): id for id, token in enumerate(tokens)}
    assert {0, 1, 14, 15, 16, 17, 128} <= by_length.keys()
    for id in by_length.values():
        for before in range(6):
            for after in range(70):
                ids = [SHORT] * before + [id] + [SHORT] * after
                assert world.decode_bytes(ids) == b" " * before + tokens[id] + b" " * after
    for seed in range(300):
        ids = random.Random(seed).choices(list(by_length.values()), k=seed)
        assert world.decode_bytes(np.array(ids, np.uint16)) == b"".join(tokens[id] for id in ids)


def test_random_ids_in_any_number(world):
    tokens, rng = tokens_of(world), np.random.default_rng(4)
    for count in (999, 1000, 1001, 4095, 4 * SAMPLE - 1, *range(4 * SAMPLE, 4 * SAMPLE + 9), 100_000):
        ids = rng.integers(0, 65530, count)
        assert world.decode_bytes(ids) == b"".join(tokens[id] for id in ids.tolist())


def test_decoding_releases_the_interpreter_lock(world):
    ids = np.tile(world.encode_array(TEXT), 60)
    assert turns_beside(lambda: world.decode_bytes(ids)) >= 5


def test_little_more_memory_is_taken_than_the_bytes_need(world):
    ids = np.tile(world.encode_array(TEXT), 8)
    tracemalloc.start()
    try:
        size = len(world.decode_bytes(ids))
        assert tracemalloc.get_traced_memory()[1] <= size * 17 / 16 + 100_000
    finally:
        tracemalloc.stop()


def test_bytes_end_where_their_size_says(world):
    # whose memory may be larger: C finds a zero behind them
    rng = np.random.default_rng(3)
    for count in (10, 4 * SAMPLE, 50_000):
        data = world.decode_bytes(rng.integers(33, 60_000, count))
        assert ctypes.c_char_p(data).value == data and bytes(bytearray(data)) == data and hash(data) == hash(data + b"")


def test_bytes_end_with_a_zero_in_memory_that_had_none(world):
    ids = np.full(4 * SAMPLE, SHORT, np.uint16)
    ids[-1] = LONG  # behind which no zeros are copied
    for _ in range(20):
        filled = b"\xff" * (len(ids) * 33 // 32)
        del filled  # its memory becomes the room for the bytes
        data = world.decode_bytes(ids)
        assert ctypes.string_at(data, len(data) + 1)[-1] == 0


def test_array_that_changes_while_it_is_decoded_gives_bytes(world):
    short, long = np.full(200_000, SHORT, np.uint16), np.full(200_000, LONG, np.uint16)
    ids = short.copy()
    stop = threading.Event()

    def change():
        while not stop.is_set():
            ids[:] = long
            ids[:] = short

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            data = world.decode_bytes(ids)
            assert len(ids) <= len(data) <= 128 * len(ids)
    finally:
        stop.set()
        thread.join()

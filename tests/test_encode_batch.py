"""Texts encoded by several threads: in batches, long ones in pieces, files."""

import mmap
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter_lock import turns_beside

from rwkv_ext.tokenizer import WorldTokenizer
from rwkv_ext.vocabulary import WORLD

TEXT = WORLD.read_bytes()


def check_batch(world, texts, **options):
    expected = [world.encode_array(text).tolist() for text in texts]
    ids, cu_seqlens = world.encode_packed(texts, **options)
    assert ids.tolist() == sum(expected, [])
    assert cu_seqlens.dtype == np.int64 and cu_seqlens.tolist() == [0, *np.cumsum([len(e) for e in expected])]
    arrays = world.encode_batch(texts, **options)
    assert [array.tolist() for array in arrays] == expected
    dtype = np.dtype(options.get("dtype", np.uint16))
    assert ids.dtype == dtype and all(array.dtype == dtype for array in arrays)


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
def test_batch_equals_each_text_alone(world, threads):
    rng = random.Random(1)
    texts = [TEXT[start : start + rng.choice((0, 1, 17, 300, 70_000))] for start in range(0, 1_000_000, 10_000)]
    check_batch(world, texts, threads=threads)
    check_batch(world, texts[:9], threads=threads, dtype=np.uint32)
    check_batch(world, [], threads=threads)
    check_batch(world, [b"", b"", b"a", b""], threads=threads)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40) | st.binary(max_size=40), max_size=30))
def test_any_batch(world, texts):
    check_batch(world, texts, threads=2)


def test_batch_takes_any_iterable_of_str_and_buffers(world):
    data = "na\u00efve \u4eca\u5929".encode()
    texts = (data.decode(), data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8))
    for ids in world.encode_batch(iter(texts)):
        assert ids.tolist() == world.encode(data.decode())
    assert len(world.encode_batch(texts)) == 5


@pytest.mark.parametrize("threads", [2, 3, 16, 2**64, None])
def test_long_text_in_pieces(world, threads):
    # longer than what a thread takes at once, and its pieces end at other places from text to text
    for start in (0, 1, 77):
        text = TEXT[start:] + TEXT[start * 3 :]
        expected = world.encode_array(text)
        ids = world.encode_array(text, threads=threads)
        assert ids.dtype == np.uint16
        np.testing.assert_array_equal(ids, expected)
        wide = world.encode_array(text, threads=threads, dtype="uint32")
        assert wide.dtype == np.uint32
        np.testing.assert_array_equal(wide, expected)


@pytest.mark.parametrize("piece", [b" ", b"=", b"\xe3\x81\x82", b"ab", b"- "], ids=repr)
def test_long_runs_without_a_place_to_cut(world, piece):
    text = piece * (700_000 // len(piece)) + b"the end"
    np.testing.assert_array_equal(world.encode_array(text, threads=3), world.encode_array(text))
    np.testing.assert_array_equal(world.encode_packed([b"x" + text, text], 2)[0][-50:], world.encode_array(text)[-50:])


def parts(sampled, other, size=250_000):
    """A text that is `sampled` at each eighth, where it is asked how many ids a text may have, and `other` between."""
    return b"".join(sampled[:2_000] + other[i : i + size - 2_000] for i in range(8))


@pytest.mark.parametrize("threads", [1, 2, 5, 40])
def test_more_ids_and_fewer_than_there_was_room_for(world, threads):
    # nearly every byte is a token, so that the ids that come last have no place until all are counted
    noise, spaces = random.Random(4).randbytes(300_000), b" " * 300_000
    text = parts(spaces, noise)
    expected = world.encode_array(text)
    assert len(expected) > 0.8 * len(text)
    np.testing.assert_array_equal(world.encode_array(text, threads=threads), expected)
    np.testing.assert_array_equal(expected[-1000:], world.encode_array(text[-10_000:])[-1000:])
    texts = [TEXT, text, b"", text[:77], parts(noise, spaces), TEXT[:300_000], b""]
    check_batch(world, texts, threads=threads)
    check_batch(world, texts[::-1], threads=threads, dtype=np.uint32)


FAULTS = """
import resource, sys
import rwkv_ext

world, text, threads = rwkv_ext.WorldTokenizer(), sys.stdin.buffer.read(), int(sys.argv[1])

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        world.encode_array(text, threads=threads)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_ids_get_the_memory_of_those_before(threads):
    # of 256 pages a call, were memory cut to the ids' size and the next call given new memory
    result = subprocess.run([sys.executable, "-c", FAULTS, str(threads)], input=TEXT, capture_output=True, check=True)
    assert int(result.stdout) < 20 * 60


@pytest.mark.parametrize("length", [*range(70), 5_000])
def test_ids_of_each_task_begin_anywhere(world, length):
    # behind one task of `length` ids stands one that fills many lines of the cache
    texts = [b"\n" * 131_072 + b" the" * length, TEXT[:200_000]]
    check_batch(world, texts, threads=2)


def test_array_of_a_str(world):
    assert world.encode_array("Today is").tolist() == [33520, 4600]
    assert world.encode_array("Today is", dtype=np.uint32).dtype == np.uint32


def test_memory_mapped_file_and_path(world, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    expected = world.encode_array(TEXT)
    for threads in (None, 1, 2):
        np.testing.assert_array_equal(world.encode_file(path, threads), expected)
    assert world.encode_file(str(path), dtype=np.uint32).dtype == np.uint32
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        np.testing.assert_array_equal(world.encode_array(data, 2), expected)
        np.testing.assert_array_equal(world.encode_packed([data, data])[0], np.tile(expected, 2))
    (tmp_path / "empty").touch()
    assert world.encode_file(tmp_path / "empty").tolist() == []
    assert world.encode_file(tmp_path / "empty", dtype="uint32").dtype == np.uint32


def test_file_that_cannot_be_mapped(world, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        world.encode_file(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"encode_file: path must be a regular file, got /dev/null; give encode_array"):
        world.encode_file("/dev/null")


def test_batch_refuses_other_types(world):
    for texts, got in (("text", "str"), (b"text", "bytes"), (np.zeros(3), "numpy.ndarray"), (7, "int")):
        with pytest.raises(TypeError, match=rf"encode_batch: texts must be several, .*, got {got}; use encode_array\("):
            world.encode_batch(texts)
    with pytest.raises(TypeError, match=r"encode_batch: texts\[1\] must be a str or contiguous bytes, got int"):
        world.encode_batch(["a", 5])
    with pytest.raises(TypeError, match="encode_array: text must be a str or contiguous bytes, got numpy.ndarray"):
        world.encode_array(np.zeros((4, 4), np.uint8)[:, 1])
    for encode in (world.encode_array, lambda text: world.encode_batch(["a", text])):
        with pytest.raises(UnicodeEncodeError, match="position 1: surrogates not allowed; read the text with errors"):
            encode("a\ud800")


def test_options_are_checked(world, tmp_path):
    for name, encode in (
        ("encode_array", lambda **options: world.encode_array(b"a", **options)),
        ("encode_batch", lambda **options: world.encode_batch([b"a"], **options)),
        ("encode_batch", lambda **options: world.encode_packed([b"a"], **options)),
        ("encode_file", lambda **options: world.encode_file(tmp_path / "nowhere", **options)),
    ):
        for threads in (0, -1):
            with pytest.raises(ValueError, match=f"{name}: threads must be at least 1, or None .*, got {threads}"):
                encode(threads=threads)
        with pytest.raises(TypeError, match="float"):
            encode(threads=1.5)
        for dtype in (np.int64, "uint8", ">u2"):
            with pytest.raises(ValueError, match=rf"{name}: dtype must be uint16 or uint32, got {np.dtype(dtype)}; "):
                encode(dtype=dtype)


def test_batches_release_the_interpreter_lock(world):
    assert turns_beside(lambda: world.encode_batch([TEXT] * 30, threads=2)) >= 5


def test_arrays_of_a_batch_are_views_of_one(world):
    first, second = world.encode_batch(["Today is", "Today"])
    assert first.base is second.base and first.flags.writeable
    first[0] = 1
    assert second.tolist() == [33520]


def test_small_vocabulary_in_threads(tmp_path):
    # Two letters whose every pair is inside a token but one: texts are cut there alone.
    tokens = [bytes([byte]) for byte in range(256)] + [b"aa", b"ab", b"bb", b"abb"]
    lines = [f"{id} {token!r} {len(token)}\n" for id, token in enumerate(tokens, 1)]
    (tmp_path / "small.txt").write_text("".join(lines))
    tokenizer = WorldTokenizer(tmp_path / "small.txt")
    rng = random.Random(3)
    text = bytes(rng.choices(b"ab", k=900_000))
    np.testing.assert_array_equal(tokenizer.encode_array(text, threads=3), tokenizer.encode_array(text))


def test_text_that_changes_while_it_is_encoded_spoils_no_later_one():
    tokenizer, rng = WorldTokenizer(), random.Random(5)
    words = [f"{rng.randrange(10)}{rng.choice(('fox', 'quick', 'zebra', 'text'))}".encode() for _ in range(40_000)]
    first, second = (np.frombuffer(b"".join(rng.sample(words, len(words)))[:120_000], np.uint8) for _ in range(2))
    text = first.copy()
    view = memoryview(text).toreadonly()  # as a map of a file that another program writes
    stop = threading.Event()

    def change():
        while not stop.is_set():
            text[:] = second
            text[:] = first

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            tokenizer.encode_array(view)
    finally:
        stop.set()
        thread.join()
    for whole in (first, second):
        assert tokenizer.decode_bytes(tokenizer.encode_array(whole)) == whole.tobytes()


def test_more_threads_than_memory(world):
    assert world.encode_array("Today is", threads=10**15).tolist() == [33520, 4600]


def test_decoding_an_array_whose_copy_finds_no_room(world):
    with pytest.raises(MemoryError):
        world.decode_bytes(np.broadcast_to(np.uint32(5), (1 << 50,)))

"""The C++ reader of lines: those that begin in a part of a file, however it is cut into blocks."""

import errno
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from rwkv_ext._load import native
from rwkv_ext.vocabulary import WORLD_COMPILED

LINES = [b"", b" ", b"{}", b'{"text": "a"}', b'{"text": "' + b"word " * 30 + b'"}', b"\r", b'{"text": "na\xc3\xafve"}']
DATA = [b"", b"\n", b"a", b"a\n", b"\n\n\n", b"a\nbb\n\n\nccc", b"\n\n" + b"x" * 40 + b"\ny\n", b"\n".join(LINES)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lines"


def begins(data):
    """Return where lines begin, and the end."""
    return [0, *(at + 1 for at in range(len(data)) if data[at] == ord("\n"))]


def lines_between(data, begin, end):
    return [line for line, at in zip(data.splitlines(True), begins(data), strict=False) if begin <= at < end]


def read_lines(reader):
    return list(iter(reader.next_line, b""))


@pytest.mark.parametrize("data", DATA, ids=range(len(DATA)))
def test_lines_of_any_part_by_any_block(path, data):
    path.write_bytes(data)
    with open(path, "rb") as file:
        for begin in begins(data):
            for end in range(len(data) + 1):
                expected = lines_between(data, begin, end)
                for block in (1, 2, 3, 7, 16, 50, 1000):
                    reader = native().LineReader(file.fileno(), begin, end, block)
                    assert reader.position == begin and reader.end == end
                    assert read_lines(reader) == expected
                    assert reader.position == begin + sum(map(len, expected))
    reader = native().LineReader(data)
    assert read_lines(reader) == data.splitlines(True) and reader.position == reader.end == len(data)


def test_documents_of_any_block_with_lines_that_are_left_to_python(path, world):
    rng = random.Random(3)
    lines = [rng.choice(LINES) for _ in range(400)]
    data = b"\n".join([*lines, b""])
    path.write_bytes(data)
    expected = [line for line in lines if line.startswith(b'{"text')]
    with open(path, "rb") as file:
        for block in (1, 5, 64, 170, 300, 100_000):
            reader = native().LineReader(file.fileno(), 0, len(data), block)
            texts, count = [], 0
            while True:
                ids, sizes, _, _, n_lines = reader.encode(world._native, "text", True, False)
                texts += [world.decode_bytes(part[:-1]) for part in np.split(ids, np.cumsum(sizes))[:-1]]
                count += n_lines
                line = reader.next_line()
                if not line:
                    break
                assert line == b"{}\n"
                count += 1
            assert count == len(lines) and reader.position == len(data)
            assert texts == [line[len(b'{"text": "') : -len(b'"}')] for line in expected]


FAULTS = """
import resource, sys
from rwkv_ext._load import native

tokenizer = native().Tokenizer.map(sys.argv[1])
data = (b'{"text": "some words"}\\n' * 3 + b"{}\\n") * 200_000
reader = native().LineReader(data)
kept = []
while len(kept) < 2_000:
    if len(kept) == 100:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept.append(reader.encode(tokenizer, "text", True, False)[0])
    assert reader.next_line() == b"{}\\n"
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_few_lines_between_two_left_to_python_take_no_memory_from_the_system():
    done = subprocess.run([sys.executable, "-c", FAULTS, WORLD_COMPILED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000  # page faults of 1,900 calls, each at least one if it had room for all lines


def test_a_line_much_longer_than_a_block(path):
    data = b"short\n" + bytes(300_000) + b"\nand\n"
    path.write_bytes(data)
    with open(path, "rb") as file:
        for end in (3, 10, 299_000, len(data)):
            read = read_lines(native().LineReader(file.fileno(), 0, end, 4096))
            assert read == data.splitlines(True)[: 1 + (end > 6) + (end == len(data))]


def test_a_file_that_ends_early_gives_no_part_of_a_line(path):
    path.write_bytes(b"one\ntwo\nthr")
    with open(path, "rb") as file:
        for block in (1, 4, 100):
            reader = native().LineReader(file.fileno(), 0, 20, block)
            assert read_lines(reader) == [b"one\n", b"two\n"] and (reader.position, reader.end) == (8, 20)
            assert reader.next_line() == b""


def test_a_file_that_cannot_be_read_is_an_os_error(tmp_path, world):
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for read in (lambda r: r.next_line(), lambda r: r.encode(world._native, "text", True, False)):
            with pytest.raises(IsADirectoryError) as error:
                read(native().LineReader(folder, 0, 10, 100))
            assert error.value.errno == errno.EISDIR
    finally:
        os.close(folder)


def test_bad_arguments():
    with pytest.raises(ValueError, match="LineReader: block must be a number of bytes above 0, got 0"):
        native().LineReader(0, 0, 1, 0)
    with pytest.raises(TypeError, match="LineReader: lines must be contiguous bytes, got str"):
        native().LineReader("text")


def test_memory_is_kept_as_long_as_it_is_read():
    data = bytearray(b"one\ntwo\n")
    reader = native().LineReader(data)
    with pytest.raises(BufferError):
        data.clear()
    del data
    assert read_lines(reader) == [b"one\n", b"two\n"]

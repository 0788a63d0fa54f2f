"""The compiled World vocabulary: what it holds, when it is used, and that nothing damaged or foreign is trusted."""

import hashlib
import os
import random
import re
import resource
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rwkv_ext import tokenizer as tokenizer_module
from rwkv_ext._load import native
from rwkv_ext.tokenizer import WorldTokenizer
from rwkv_ext.vocabulary import WORLD, WORLD_COMPILED, compiler

ROOT = Path(__file__).parent.parent
ODD = 0x9E3779B97F4A7C15
# The header's fields: offset and struct format.
CHECKSUM, SIZE, CELLS, TOKEN_BYTES, LAST_ID = (16, "<Q"), (24, "<Q"), (72, "<I"), (76, "<I"), (80, "<I")


@pytest.fixture(scope="module")
def image():
    return WORLD_COMPILED.read_bytes()


def layout(image):
    """Where the tables begin, the image's end last."""
    cells, token_bytes = struct.unpack_from("<II", image, CELLS[0])
    begins, end = {}, 88
    for name, size in {
        "boundaries": 65536 + 2 * 8 * 256 + 256,
        "short tokens": 65536 * 16,
        "lengths": 65536,
        "offsets": 65537 * 4,
        "cells": 8 * cells,
        "bytes": token_bytes,
        "end": 0,
    }.items():
        begins[name] = -(-end // 64) * 64
        end = begins[name] + size
    return begins


def add(sum, word):
    sum = (sum ^ word) * ODD % 2**64
    return sum ^ sum >> 32


def checksum(data):
    words = np.frombuffer(data, np.uint64)
    sums = [1, 2, 3, 4]
    for lane in range(4):
        for word in words[: len(words) // 4 * 4][lane::4].tolist():
            sums[lane] = add(sums[lane], word)
    for word in words[len(words) // 4 * 4 :].tolist():
        sums[0] = add(sums[0], word)
    result = len(data)
    for sum in sums:
        result = add(result, sum)
    return result


def sealed(image):
    """`image` with the checksum of what it holds."""
    return image[:16] + struct.pack("<Q", checksum(image[24:])) + image[24:]


def put(image, offset, format, *values):
    changed = bytearray(image)
    struct.pack_into(format, changed, offset, *values)
    return bytes(changed)


def refuse(path, image, message):
    path.write_bytes(image)
    with pytest.raises(ValueError) as error:
        native().Tokenizer.map(str(path))
    pattern = f"compiled vocabulary {re.escape(str(path))}: {message}; make it anew with `make build`, or install rwkv"
    assert re.match(pattern, str(error.value)), str(error.value)


def test_compiled_file_is_of_the_text_and_as_this_library_makes_it(image):
    text = WORLD.read_bytes()
    digest = hashlib.sha256(text).digest()
    compiled = native().Tokenizer.map(str(WORLD_COMPILED))
    assert compiled.source_digest == digest and compiled.source_size == len(text)
    assert native().compile_vocabulary(text, "World", digest) == image
    assert sealed(image) == image and layout(image)["end"] == len(image)
    with pytest.raises(ValueError, match="sha256 must have 32 bytes, got 3"):
        native().compile_vocabulary(text, "World", b"abc")


def test_mapped_tables_equal_parsed_ones(world):
    parsed, mapped = native().Tokenizer(WORLD.read_bytes(), "World"), native().Tokenizer.map(str(WORLD_COMPILED))
    text = WORLD.read_bytes()
    np.testing.assert_array_equal(parsed.byte_lengths(), mapped.byte_lengths())
    np.testing.assert_array_equal(parsed.encode_array(text), mapped.encode_array(text))
    plain = native().Tokenizer.map(str(WORLD_COMPILED), use_vectors=False)
    np.testing.assert_array_equal(plain.encode_array(text), mapped.encode_array(text))
    ids = np.arange(65530)
    assert parsed.decode_bytes(ids) == mapped.decode_bytes(ids)
    for tokenizer in (parsed, mapped):
        with pytest.raises(ValueError, match=r"1 to 65529\), got 65530"):
            tokenizer.decode_bytes([65530])


def test_world_uses_the_compiled_file_of_its_text_alone(tmp_path, monkeypatch, image):
    def use(compiled, text=WORLD):
        monkeypatch.setattr(tokenizer_module, "WORLD_COMPILED", compiled)
        monkeypatch.setattr(tokenizer_module, "WORLD", text)
        return WorldTokenizer()

    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(image[:-1])
    with pytest.raises(ValueError, match="damaged.bin: must have .* bytes, got"):
        use(damaged)
    assert use(tmp_path / "missing.bin").encode("Today") == [33520]
    # a vocabulary without its last line: the compiled file is of another text
    shorter = tmp_path / "shorter.txt"
    shorter.write_bytes(b"".join(WORLD.read_bytes().splitlines(keepends=True)[:-1]))
    assert use(WORLD_COMPILED, shorter).byte_lengths[65529] == 0
    other = tmp_path / "other.txt"  # as long as the text that was compiled
    other.write_bytes(WORLD.read_bytes().replace(b"33520 'Today' 5", b"33520 'Todaz' 5"))
    assert use(WORLD_COMPILED, other).decode([33520]) == "Todaz"
    # a custom vocabulary is read from its text, whatever lies beside it
    assert WorldTokenizer(shorter).byte_lengths[65529] == 0


def test_mapped_file_may_be_replaced_and_removed(tmp_path, image):
    path = tmp_path / "vocabulary.bin"
    path.write_bytes(image)
    tokenizer = native().Tokenizer.map(str(path))
    (tmp_path / "new").write_bytes(b"something else")
    (tmp_path / "new").replace(path)
    assert tokenizer.encode("Today") == [33520]
    path.unlink()
    assert tokenizer.encode("Today is") == [33520, 4600]


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="nowhere.bin: must be readable, got No such file or directory; make"):
        native().Tokenizer.map(str(tmp_path / "nowhere.bin"))
    with pytest.raises(ValueError, match="must be readable, got No such device; make"):
        native().Tokenizer.map(str(tmp_path))


@pytest.mark.parametrize(
    "offset, format, value, message",
    [
        (0, "<8s", b"\x7fELF\x02\x01\x01\0", "must start with 'RWKVvoc', got the bytes 7f454c4602010100"),
        (8, "<I", 0x04030201, "must have the byte order of this machine, got another"),
        (12, "<I", 2, "must have version 5, got 2"),
        (*CHECKSUM, 5, "must have the checksum 0000000000000005, got [0-9a-f]{16}"),
        (*SIZE, 100, r"must say that it has the \d+ bytes of its tables, says 100"),
        (32, "<Q", 7, "must have the checksum [0-9a-f]{16}, got [0-9a-f]{16}"),  # source_size
        (40, "<I", 7, "must have the checksum [0-9a-f]{16}, got [0-9a-f]{16}"),  # source_digest
        (*CELLS, 7, r"must say that it has the \d+ bytes of its tables, says \d+"),
        (*CELLS, 2**32 - 1, r"must say that it has the \d+ bytes of its tables, says \d+"),
        (*TOKEN_BYTES, 2**32 - 1, r"must say that it has the \d+ bytes of its tables, says \d+"),
        (*LAST_ID, 7, "must have the checksum [0-9a-f]{16}, got [0-9a-f]{16}"),
        (84, "<I", 7, "must have the checksum [0-9a-f]{16}, got [0-9a-f]{16}"),
    ],
)
def test_changed_header_fields_are_named(tmp_path, image, offset, format, value, message):
    refuse(tmp_path / "changed.bin", put(image, offset, format, value), message)


def test_every_bit_of_the_header_counts(tmp_path, image):
    path = tmp_path / "flipped.bin"
    path.write_bytes(image)
    with open(path, "r+b") as file:
        for bit in range(8 * 88):
            changed = image[bit // 8] ^ 1 << bit % 8
            os.pwrite(file.fileno(), bytes([changed]), bit // 8)
            with pytest.raises(ValueError, match="flipped.bin: must .*; make it anew"):
                native().Tokenizer.map(str(path))
            os.pwrite(file.fileno(), image[bit // 8 : bit // 8 + 1], bit // 8)
    assert native().Tokenizer.map(str(path)).encode("Today") == [33520]


def test_flipped_bytes_anywhere_are_found(tmp_path, image):
    rng = random.Random(1)
    path = tmp_path / "flipped.bin"
    path.write_bytes(image)
    begins = layout(image)
    places = [*begins.values(), *(begin - 1 for begin in begins.values()), len(image) - 1]
    places = [place for place in places if place < len(image)] + rng.sample(range(len(image)), 800)
    with open(path, "r+b") as file:
        for place in places:
            os.pwrite(file.fileno(), bytes([image[place] ^ rng.randrange(1, 256)]), place)
            with pytest.raises(ValueError, match=r"must have the checksum \w{16}, got \w{16}"):
                native().Tokenizer.map(str(path))
            os.pwrite(file.fileno(), image[place : place + 1], place)
    assert native().Tokenizer.map(str(path)).encode("Today") == [33520]


def test_truncated_and_longer_files(tmp_path, image):
    refuse(tmp_path / "longer.bin", image + b"\0", rf"must have {len(image)} bytes, got {len(image) + 1}")
    path = tmp_path / "truncated.bin"
    path.write_bytes(image)
    lengths = {*range(300), *range(len(image) - 300, len(image)), *range(0, len(image), 997)}
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        least = "at least 88" if length < 88 else len(image)
        with pytest.raises(ValueError, match=f"truncated.bin: must have {least} bytes, got {length}; make"):
            native().Tokenizer.map(str(path))


def test_tables_that_would_lead_outside_are_refused_whatever_the_checksum_says(tmp_path, image):
    path, begins = tmp_path / "made.bin", layout(image)
    cells, token_bytes = struct.unpack_from("<II", image, CELLS[0])
    disagree = "must have tables that agree with each other, got others"
    base = f"must have a base below {cells} in every cell, got {cells}"
    refuse(path, sealed(put(image, begins["cells"] + 8 * 70_000, "<I", cells)), base)
    for offset, format, value in (
        (LAST_ID[0], "<I", 65536),
        (begins["cells"] + 8 * 65535 + 7, "<B", 0),  # matches no byte: encoding would not end
        (begins["cells"] + 8 * 70_000 + 7, "<B", 0),
        (begins["cells"] + 7, "<B", 3),  # a pair of bytes that matches three
        (begins["offsets"], "<I", 1),
        (begins["offsets"] + 4 * 65536, "<I", token_bytes + 1),
        (begins["offsets"] + 4 * 30000, "<I", token_bytes),
        (begins["lengths"] + 30000, "<B", 200),
        (begins["boundaries"] + (ord("o") | ord(" ") << 8), "<B", 2),  # a boundary that counts as two
        (begins["short tokens"] + 16 * 30000 + 15, "<B", 16),  # more than a load has
        (begins["short tokens"] + 15, "<B", 1),
        (begins["short tokens"] + 16 * 65535 + 15, "<B", 0),  # as if no token were one without bytes
    ):
        refuse(path, sealed(put(image, offset, format, value)), disagree)
    # as many bytes as before, of fewer cells and more token bytes
    for fewer, message in ((cells - 8, "must have a multiple of 256 cells"), (65536, "must have a multiple of 256")):
        more = token_bytes + 8 * (cells - fewer)
        changed = put(image, CELLS[0], "<II", fewer, more)
        refuse(path, sealed(changed), rf"{message}( cells)?, got {fewer}")


def test_a_cell_that_says_too_much_leads_nowhere(tmp_path, image):
    # Lengths of tokens that are longer than the way to them, with a right checksum: other ids, but of this text alone.
    path, begins = tmp_path / "made.bin", layout(image)
    changed = bytearray(image)
    cells = np.frombuffer(changed, np.uint8, struct.unpack_from("<I", image, CELLS[0])[0] * 8, begins["cells"])
    cells.reshape(-1, 8)[65536 + 256 :, 7] = 255
    path.write_bytes(sealed(bytes(changed)))
    tokenizer, text = native().Tokenizer.map(str(path)), WORLD.read_bytes()
    for end in (1, 3, 15, 79, 300, 5000, 70_000):
        assert 1 <= len(tokenizer.encode_array(text[1000 : 1000 + end])) <= end
    stream = native().StreamEncoder(tokenizer)
    assert len(stream.push(text[1000:9000])) + len(stream.flush()) <= 8000
    assert native().encode_texts(tokenizer, b" toolqqq", np.array([0, 8]), 0, False, False)[4] == 0


def test_a_boundary_inside_a_token_leads_nowhere(tmp_path, image):
    # One behind the first 4096 bytes, passed by before it is found: a text without others is matched token by token.
    path, boundaries = tmp_path / "made.bin", layout(image)["boundaries"]
    changed = bytearray(image)
    changed[boundaries : boundaries + 65536] = bytes(65536)
    changed[boundaries + (ord("d") | ord("a") << 8)] = 1
    path.write_bytes(sealed(bytes(changed)))
    tokenizer = native().Tokenizer.map(str(path), use_vectors=False)
    for start in (4094, 4095):
        assert tokenizer.encode_array(b"\xff" * start + b"Today" + b"\xff" * 300).tolist().count(33520) == 1


@pytest.mark.parametrize(
    "token",
    ["\x07", " tool", "-" * 8, " scientifically", "ArgumentException", " американ", "=" * 64, " " * 128],
    ids=lambda token: f"{len(token)} characters",
)
def test_batches_end_before_a_text_with_a_token_of_other_bytes(tmp_path, world, image, token):
    begins, (token_id,), token = layout(image), world.encode(token), token.encode()
    changed = bytearray(image)
    if len(token) <= 15:
        changed[begins["short tokens"] + 16 * token_id + len(token) - 1] ^= 1
    offset = struct.unpack_from("<I", image, begins["offsets"] + 4 * token_id)[0]
    changed[begins["bytes"] + offset + len(token) - 1] ^= 1
    path = tmp_path / "made.bin"
    path.write_bytes(sealed(bytes(changed)))

    fine = b"A fine text." * 20
    for text in (  # where it comes first, behind much else, last, and where no boundary may be seen
        b"\x01" + token + b"\x01, seen before others" + b"\x01" * 300,
        b"\x01" + b"xyz." * 1500 + b"\x01" + token + b"\x01" * 300,
        b"\x01" + token,
        token * (5000 // len(token)),
        b"\x01" + token + b"\x01, then one that no boundary cuts: " + b"-" * 200 + b"\x01" * 300,
    ):
        assert token_id in world.encode_bytes(text) and token_id not in world.encode_bytes(fine)
        data, offsets = fine + text + fine, np.cumsum([0, len(fine), len(text), len(fine)])
        assert native().encode_texts(world._native, data, offsets, 0, False, False)[4] == 3
        for vectors in (True, False):
            wrong = native().Tokenizer.map(str(path), vectors)
            for first in (0, 1, 0):  # nothing wrong is kept and believed later
                ids, sizes, *_, done = native().encode_texts(wrong, data, offsets, first, False, False)[:5]
                assert done == 1 - first and len(sizes) == done
                assert ids.tolist() == world.encode_bytes(fine) * done
            assert native().encode_texts(wrong, data, offsets, 2, False, False)[4] == 1


def test_batches_end_where_ids_decode_to_more_or_less_than_the_text(tmp_path, world, image):
    path, begins = tmp_path / "made.bin", layout(image)
    n_cells = struct.unpack_from("<I", image, CELLS[0])[0]
    cell = np.dtype([("base", "<u4"), ("id", "<u2"), ("label", "u1"), ("length", "u1")])

    def accepted(change, *texts):
        changed = bytearray(image)
        change(changed, np.frombuffer(changed, cell, n_cells, begins["cells"]))
        path.write_bytes(sealed(bytes(changed)))
        tokenizers = [native().Tokenizer.map(str(path), vectors) for vectors in (True, False)]
        return [
            text
            for text in texts
            for tokenizer in tokenizers
            if native().encode_texts(tokenizer, text, np.array([0, len(text)]), 0, False, False)[4]
        ]

    def all_cells(token):
        return lambda changed, cells: cells["id"].fill(world.encode_bytes(token)[0] if token else 65535)

    def a_then_zero(changed, cells):  # as if the zeros behind a segment were a part of it
        (token_id,) = world.encode_bytes(b"ab")
        cells["id"][65536 + ord("a")] = token_id
        changed[begins["short tokens"] + 16 * token_id + 1] = 0
        changed[begins["bytes"] + struct.unpack_from("<I", image, begins["offsets"] + 4 * token_id)[0] + 1] = 0

    def nothing(changed, cells):  # for the last byte of a text
        cells["id"][[65536, 65536 + ord("-")]] = 0

    def nothing_then_ab(changed, cells):
        cells[ord("a") | ord("b") << 8] = (65536, 65535, 0, 1)
        cells["id"][65536 + ord("b")] = world.encode_bytes(b"ab")[0]

    lengths = (1, 2, 14, 15, 16, 30, 31, 32, 300, 6000)
    texts = [(part * length)[:length] for part in (b"bc", b"\xff") for length in lengths]
    for token in (b" scientifically", b" " * 128, b"a", b""):
        assert accepted(all_cells(token), *texts) == []
    assert accepted(a_then_zero, b"b", b"a") == [b"b", b"b"]
    assert accepted(nothing, b"b", b"\0", b"-" * 81) == [b"b", b"b"]
    assert accepted(nothing_then_ab, b"a", b"ab") == [b"a", b"a"]


def test_compiler_writes_what_differs_alone(tmp_path, image):
    library = tmp_path / "_native.so"
    library.symlink_to(native().__file__)
    compiled = tmp_path / "vocabulary" / WORLD_COMPILED.name
    compiler.main(library)
    assert compiled.read_bytes() == image
    first = compiled.stat()
    compiler.main(library)
    assert compiled.stat().st_ino == first.st_ino and compiled.stat().st_mtime_ns == first.st_mtime_ns
    compiled.write_bytes(image[:-1] + b"x")
    compiler.main(library)
    assert compiled.read_bytes() == image
    assert list(compiled.parent.iterdir()) == [compiled]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """tests/tokenizer_alone.cpp with the objects that the build made of csrc/tokenizer."""
    program = tmp_path_factory.mktemp("program") / "tokenizer_alone"
    source, folder = ROOT / "tests" / "tokenizer_alone.cpp", ROOT / "build" / "objects" / "csrc" / "tokenizer"
    objects = [folder / f"{path.stem}.o" for path in (ROOT / "csrc" / "tokenizer").glob("*.cpp")]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-pthread", f"-I{ROOT / 'csrc'}", source, *objects]
    subprocess.run([*command, "-o", program], check=True)
    return program


def test_cpp_program_without_python(program, world, tmp_path):
    text = WORLD.read_bytes()[:20_000] + bytes(range(256))
    result = subprocess.run([program, WORLD_COMPILED, "1"], input=text, capture_output=True, check=True)
    assert [int(id) for id in result.stdout.split()] == world.encode_bytes(text)
    (tmp_path / "none").write_bytes(b"")
    result = subprocess.run([program, tmp_path / "none", "1"], input="", capture_output=True, text=True)
    assert result.returncode == 1 and "none: must have at least 88 bytes, got 0" in result.stderr


def test_fewer_threads_than_asked_for_do_the_work(program, world):
    # A thread's stack takes a GiB of addresses, which there are not.
    def limit():
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 30, resource.getrlimit(resource.RLIMIT_STACK)[1]))
        resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    text = WORLD.read_bytes() * 8
    command = [program, WORLD_COMPILED, "4"]
    result = subprocess.run(command, input=text, capture_output=True, check=True, preexec_fn=limit)
    assert np.array_equal(np.array(result.stdout.split(), int), world.encode_array(text))

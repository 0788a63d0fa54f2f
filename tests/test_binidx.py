"""Shards: the format byte for byte, a message for every damage, writers that leave nothing half-written."""

import os
import signal
import struct
from contextlib import suppress

import numpy as np
import pytest
from file_limits import largest_file
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_ext.data import binidx
from rwkv_ext.data.binidx import BinidxReader, BinidxWriter, shard_files

DOCUMENTS = [[5, 6, 7, 0], [0], [65535, 1, 0]]


def write(prefix, documents=DOCUMENTS, **options):
    with BinidxWriter(prefix, **options) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def index(sizes, pointers, starts, magic=b"MMIDIDX\0\0", version=1, code=8):
    """The .idx file from the description of the format alone."""
    header = magic + struct.pack("<QBQQ", version, code, len(sizes), len(starts))
    return header + struct.pack(f"<{len(sizes)}i{len(pointers)}q{len(starts)}q", *sizes, *pointers, *starts)


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "shard")


def test_files_are_the_format_byte_for_byte(shard):
    bin_path, idx_path = shard_files(shard)
    assert bin_path.read_bytes() == struct.pack("<8H", 5, 6, 7, 0, 0, 65535, 1, 0)
    assert idx_path.read_bytes() == index([4, 1, 3], [0, 8, 10], [0, 1, 2, 3])
    header = "4d4d49444944580000 0100000000000000 08 0300000000000000 0400000000000000"
    assert idx_path.read_bytes()[:34] == bytes.fromhex(header)


def test_reader_gives_back_what_was_written(shard):
    for name in (shard, str(shard) + ".bin", str(shard) + ".idx"):
        reader = BinidxReader(name)
        assert (reader.n_documents, reader.n_tokens, reader.tokens.dtype) == (3, 8, np.uint16)
        assert [reader.document(i).tolist() for i in range(3)] == DOCUMENTS
        assert reader.sizes.tolist() == [4, 1, 3] and reader.offsets.tolist() == [0, 8, 10]
        assert reader.eod_share() == 1.0
    reader.check_documents()
    reader.check_tokens(np.ones(65536, dtype=bool))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=20))
def test_any_documents_round_trip(tmp_path_factory, documents):
    prefix = write(tmp_path_factory.mktemp("any") / "shard", documents)
    reader = BinidxReader(prefix)
    reader.check_documents()
    assert [reader.document(i).tolist() for i in range(reader.n_documents)] == documents
    assert reader.tokens.tolist() == sum(documents, [])
    ends = [document[-1:] == [0] for document in documents]
    assert reader.eod_share() == (sum(ends) / len(ends) if ends else 0.0)


def test_index_is_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "BLOCK", 7)
    sizes = [i % 5 for i in range(100)]
    prefix = write(tmp_path / "shard", [[9] * size for size in sizes])
    pointers = [2 * sum(sizes[:i]) for i in range(100)]
    assert shard_files(prefix)[1].read_bytes() == index(sizes, pointers, range(101))
    BinidxReader(prefix).check_documents()


def test_document_outside_the_shard(shard):
    for i in (-1, 3):
        with pytest.raises(IndexError, match=f"shard: document must be 0 to 2, got {i}"):
            BinidxReader(shard).document(i)


def test_missing_files(tmp_path, shard):
    with pytest.raises(FileNotFoundError, match="none.bin: no such file; a shard is a .bin and an .idx"):
        BinidxReader(tmp_path / "none")
    shard_files(shard)[1].unlink()
    with pytest.raises(FileNotFoundError, match="shard.idx: no such file"):
        BinidxReader(shard)


GOOD = ([4, 1, 3], [0, 8, 10], [0, 1, 2, 3])


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "must have a header of 34 bytes, got 0 bytes; the file is damaged: copy both"),
        (
            index(*GOOD, magic=b"TNTIDX\0\0\0"),
            r"must start with b'MMIDIDX.*, got b'TNTIDX.*give the name of a shard",
        ),
        (index(*GOOD, version=2), r"version must be 1, got 2 \(at byte 9\); rebuild the shard"),
        (
            index(*GOOD, code=6),
            r"dtype code must be 8 \(uint16\) or 1 to 5 .*, got 6 \(at byte 17\); rebuild .*6 and 7 mean other",
        ),
        (index(*GOOD, code=7), "dtype code must be 8 .*, got 7 .at byte 17.; rebuild"),
        (index(*GOOD, code=9), "dtype code must be 8 .*, got 9 .at byte 17.; rebuild"),
        (
            index(*GOOD)[:-5],
            "must have 102 bytes for 3 documents .*, got 97 bytes: it is cut off at byte 97; the file",
        ),
        (index(*GOOD) + b"x", "must have 102 bytes for 3 documents .*, got 103 bytes; the file is damaged"),
        (
            index([], [], []),
            "must have 34 bytes for 0 documents .at byte 18. and a list of 0 .at byte 26, at least 1., got 34 bytes",
        ),
        (
            index([4, 1, 3], [0, 8, 10], [1, 1, 2, 3]),
            "document list must run from 0 to 3, got 1 to 3 .entries at bytes 70 and 94.",
        ),
        (index([4, 1, 3], [0, 8, 10], [0, 1, 2, 4]), "document list must run from 0 to 3, got 0 to 4"),
        (
            index([4, 1, 3], [0, 6, 10], [0, 1, 2, 3]),
            r"document 1 must start at byte 8 .*, got byte 6 \(entry at byte 54\)",
        ),
        (index([4, 1, 3], [2, 8, 10], [0, 1, 2, 3]), "document 0 must start at byte 0 .*, got byte 2"),
        (
            index([5, -1, 4], [0, 10, 8], [0, 1, 2, 3]),
            "document 1 must start at byte 10 and have a size of 0 or more, .*size -1 .entry at byte 38.",
        ),
    ],
)
def test_damaged_index(shard, data, message):
    shard_files(shard)[1].write_bytes(data)
    with pytest.raises(ValueError, match=f"shard.idx: .*{message}"):
        BinidxReader(shard)


@pytest.mark.parametrize(
    "size, message",
    [
        (13, "must have 16 bytes, where the last document of shard.idx ends, got 13 bytes: it is cut off at "
             "byte 13, in document 2 of 3; the file is damaged: copy both files again, or rebuild"),
        (9, "cut off at byte 9, in document 1 of 3"),
        (0, "cut off at byte 0, in document 0 of 3"),
        (17, "must hold whole tokens of 2 bytes, got 17 bytes"),
        (18, "must have 16 bytes, .*, got 18 bytes: the two files do not belong together"),
    ],
)  # fmt: skip
def test_damaged_tokens_file(shard, size, message):
    path = shard_files(shard)[0]
    path.write_bytes((path.read_bytes() + b"\0\0")[:size])
    with pytest.raises(ValueError, match=f"shard.bin: .*{message}"):
        BinidxReader(shard)


def test_damage_between_the_sampled_places_needs_the_full_check(tmp_path):
    prefix = write(tmp_path / "shard", [[7, 0]] * 10_000)
    path = shard_files(prefix)[1]
    data = bytearray(path.read_bytes())
    at = 34 + 4 * 10_000 + 8 * 300
    data[at : at + 8] = struct.pack("<q", 1202)
    path.write_bytes(data)
    reader = BinidxReader(prefix)
    with pytest.raises(ValueError, match=f"document 300 must start at byte 1200 .*got byte 1202 .entry at byte {at}."):
        reader.check_documents()


def test_full_check_sees_damage_at_block_edges_and_in_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "BLOCK", 4)
    prefix = write(tmp_path / "shard", [[0]] * 300)
    path = shard_files(prefix)[1]
    good = path.read_bytes()
    for entry in (259, 260, 261):
        at = 34 + 12 * 300 + 8 * entry
        path.write_bytes(good[:at] + struct.pack("<q", 2) + good[at + 8 :])
        with pytest.raises(
            ValueError, match=f"entry {entry} of the document list must be at least {entry - 1}, got 2 .at byte {at}."
        ):
            BinidxReader(prefix).check_documents()
    reader = BinidxReader(prefix)
    for document in (3, 4, 5):
        reader.offsets = np.array([2 * i + (i == document) for i in range(300)])
        with pytest.raises(ValueError, match=f"document {document} must start at byte {2 * document} "):
            reader.check_documents()


def test_token_outside_the_vocabulary(tmp_path):
    documents = [[1, 2, 0]] * 5 + [[3, 65530, 0]]
    prefix = write(tmp_path / "shard", documents)
    with pytest.raises(
        ValueError, match="shard.bin: the token at byte 32 must be an id of the vocabulary, got 65530; "
    ):
        BinidxReader(prefix, vocab_size=65530)
    known = np.ones(65536, dtype=bool)
    known[65530:] = False
    with pytest.raises(ValueError, match="the token at byte 32 must be .*; the file is damaged or made with another"):
        BinidxReader(prefix).check_tokens(known)


def test_other_integer_types_are_read(tmp_path):
    bin_path, idx_path = shard_files(tmp_path / "shard")
    for code, letter in ((1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q")):
        item = struct.calcsize(letter)
        bin_path.write_bytes(struct.pack(f"<3{letter}", 5, 0, 7))
        idx_path.write_bytes(index([2, 1], [0, 2 * item], [0, 1, 2], code=code))
        reader = BinidxReader(tmp_path / "shard")
        assert reader.tokens.tolist() == [5, 0, 7] and reader.document(1).tolist() == [7]
        assert reader.eod_share() == 0.5
    bin_path.write_bytes(struct.pack("<3q", 5, -1, 7))
    with pytest.raises(ValueError, match="the token at byte 8 must be an id of the vocabulary, got -1"):
        BinidxReader(tmp_path / "shard")


def test_fingerprint_names_the_content(tmp_path):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 65536, 3000, dtype=np.uint16)
    one, same = write(tmp_path / "one", [tokens]), write(tmp_path / "same", [tokens])
    assert BinidxReader(one).fingerprint() == BinidxReader(same).fingerprint()
    tokens[1234] ^= 1
    parts = [tokens[:10], tokens[10:]]
    others = [
        write(tmp_path / "flipped", [tokens]),
        write(tmp_path / "split", parts),
        write(tmp_path / "cut", parts[1:]),
    ]
    assert len({BinidxReader(prefix).fingerprint() for prefix in [one, *others]}) == 4


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_is_visible_before_the_end(tmp_path):
    with BinidxWriter(tmp_path / "deep" / "shard") as writer:
        writer.add_document([1, 2, 3])
        assert not any(path.exists() for path in shard_files(tmp_path / "deep" / "shard"))
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"shard.bin", "shard.idx"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_the_older_shard_alone(tmp_path, shard, error):
    before = files_of(tmp_path)
    with pytest.raises(error), BinidxWriter(shard, overwrite=True) as writer:
        writer.add_document([1, 2, 3])
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise error
    assert files_of(tmp_path) == before
    with pytest.raises(
        ValueError, match="close: the writer of .*shard.bin must be open, but it was closed or it failed"
    ):
        writer.close()


@pytest.mark.parametrize(
    "count, size",
    [(2, 2_000_000), (1, 200_000), (30_000, 1)],
    ids=["a document", "the last flush", "the index"],
)
def test_full_disk_leaves_the_older_shard_alone(tmp_path, shard, count, size):
    before = files_of(tmp_path)
    message = r"cannot write after \d+ documents and \d+ tokens: File too large; nothing was kept: make room"
    writer = BinidxWriter(shard, overwrite=True)
    with largest_file(300_000), pytest.raises(OSError, match=message) as info, writer:
        for _ in range(count):
            writer.add_document(np.zeros(size, dtype=np.uint16))
    assert info.value.filename == str(shard) + ".bin"
    assert files_of(tmp_path) == before


def test_swallowed_failure_does_not_pass_for_a_shard(tmp_path):
    with pytest.raises(ValueError, match="close: the writer of .* must be open"):
        with BinidxWriter(tmp_path / "shard") as writer:
            with largest_file(1000), suppress(OSError):
                writer.add_document(np.zeros(2_000_000, dtype=np.uint16))
    assert files_of(tmp_path) == {}


def test_no_second_file_no_first(tmp_path, monkeypatch):
    """Where the index cannot be created, the tokens' file goes away again."""
    (tmp_path / f"shard.idx.{os.getpid()}.tmp").mkdir()
    with pytest.raises(OSError, match="cannot create the shard: Is a directory; choose a name"):
        BinidxWriter(tmp_path / "shard")
    assert [path.name for path in tmp_path.iterdir()] == [f"shard.idx.{os.getpid()}.tmp"]


def test_an_older_index_never_stands_beside_newer_tokens(tmp_path, shard, monkeypatch):
    states, replace = [], os.replace

    def watch(*paths):
        states.append(set(files_of(tmp_path)) & {"shard.bin", "shard.idx"})
        replace(*paths)
        states.append(set(files_of(tmp_path)) & {"shard.bin", "shard.idx"})

    monkeypatch.setattr(os, "replace", watch)
    write(shard, [[1, 0]], overwrite=True)
    assert states == [{"shard.bin"}] * 3 + [{"shard.bin", "shard.idx"}]


def test_overwriting_takes_an_explicit_wish(tmp_path, shard):
    before = files_of(tmp_path)
    with pytest.raises(
        FileExistsError, match="shard.bin: already exists; choose another name, remove it or overwrite it"
    ):
        BinidxWriter(shard)
    assert files_of(tmp_path) == before
    write(shard, [[1, 0]], overwrite=True)
    assert BinidxReader(shard).tokens.tolist() == [1, 0]
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(FileExistsError, match="folder.bin: already exists"):
        BinidxWriter(tmp_path / "folder", overwrite=True)


def test_the_faster_of_two_writers_is_not_overwritten(tmp_path, monkeypatch):
    first = BinidxWriter(tmp_path / "shard")
    monkeypatch.setattr(os, "getpid", lambda: 1)  # the second is another process
    second = BinidxWriter(tmp_path / "shard")
    first.add_document([1, 0])
    second.add_document([2, 0])
    first.close()
    with pytest.raises(FileExistsError, match="shard.bin: already exists; choose another name"):
        second.close()
    assert set(files_of(tmp_path)) == {"shard.bin", "shard.idx"}
    assert BinidxReader(tmp_path / "shard").tokens.tolist() == [1, 0]


def test_shard_in_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot create the shard: .*; choose a name in a folder that you may write to"):
        BinidxWriter(tmp_path / "file" / "shard")


def test_refused_documents_change_nothing(tmp_path):
    endless = np.broadcast_to(np.uint16(0), (2**31,))
    with BinidxWriter(tmp_path / "shard") as writer:
        writer.add_document([1, 0])
        for ids in ([1.5], [[1, 2]], "text", [True]):
            with pytest.raises(TypeError, match="add_document: ids must be integers in one dimension, got "):
                writer.add_document(ids)
        for ids, got in (([1, 65536], "1 to 65536"), (np.array([-1]), "-1 to -1")):
            with pytest.raises(ValueError, match=f"add_document: ids must be 0 to 65535, got {got}"):
                writer.add_document(ids)
        with pytest.raises(
            ValueError, match="ids must be at most 2147483647 tokens, got 2147483648; split the document"
        ):
            writer.add_document(endless)
        writer.add_document(np.arange(6, dtype=np.int64)[::2])
        assert (writer.n_documents, writer.n_tokens) == (2, 5)
    assert BinidxReader(tmp_path / "shard").tokens.tolist() == [1, 0, 0, 2, 4]


def test_closed_writer(shard):
    with BinidxWriter(shard, overwrite=True) as writer:
        writer.add_document([0])
    with pytest.raises(ValueError, match="add_document: the writer of .* must be open, but it was closed or it failed"):
        writer.add_document([0])
    with pytest.raises(ValueError, match="close: the writer of .* must be open"):
        writer.close()

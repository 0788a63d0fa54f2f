"""Shards larger than memory and than 32 bits, as sparse files: what walks an index holds a block of it at a time."""

import struct
import tracemalloc

import numpy as np
import pytest
from test_token_stream import index_file, sparse_shard

from rwkv_ext import cli
from rwkv_ext.data import binidx, shards
from rwkv_ext.data.binidx import HEADER, MAGIC, BinidxReader, BinidxWriter, shard_files
from rwkv_ext.data.token_stream import TokenStream

DOCUMENTS = 4_000_000  # an index of 80 MB
MOST = 8_000_000  # bytes that may be held


@pytest.fixture
def empty_documents(tmp_path):
    """A shard of four million empty documents: nothing but zeros behind the header, but for the last entry of all."""
    bin_path, idx_path = shard_files(tmp_path / "empty")
    bin_path.touch()
    with open(idx_path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, DOCUMENTS, DOCUMENTS + 1))
        file.seek(HEADER.size + 20 * DOCUMENTS)
        file.write(struct.pack("<q", DOCUMENTS))
    return tmp_path / "empty"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(binidx, "BLOCK", 1 << 16)
    monkeypatch.setattr(shards, "BLOCK", 1 << 16)


def heap(function):
    """Return what NumPy and Python allocated at the most during a call; the file's mapped pages are not in it."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_index_is_walked_in_blocks(empty_documents, capsys):
    reader = BinidxReader(empty_documents)
    assert (reader.n_documents, reader.n_tokens) == (DOCUMENTS, 0)
    assert heap(reader.check_documents) < MOST
    assert heap(reader.fingerprint) < MOST and heap(reader.eod_share) < MOST
    assert heap(lambda: cli.main(["data", "info", str(empty_documents)])) < MOST
    assert f"documents        {DOCUMENTS:,}\n" in capsys.readouterr().out
    assert heap(lambda: TokenStream([empty_documents] * 3)) < MOST


def test_shards_are_merged_and_split_in_blocks(empty_documents, tmp_path):
    assert heap(lambda: shards.merge([empty_documents], tmp_path / "merged")) < MOST
    sizes = [shard_files(prefix)[1].stat().st_size for prefix in (empty_documents, tmp_path / "merged")]
    assert sizes[0] == sizes[1] and BinidxReader(tmp_path / "merged").n_documents == DOCUMENTS
    assert heap(lambda: shards.hold_out(empty_documents, tmp_path / "held", 1e-5)) < MOST
    held = BinidxReader(tmp_path / "held-holdout").n_documents
    assert 5 < held < 100 and BinidxReader(tmp_path / "held-train").n_documents == DOCUMENTS - held


def test_documents_are_split_evenly_in_blocks(tmp_path):
    n_tokens = 2 * 500_000
    index_file(tmp_path / "pairs", n_tokens, document=2).write_bytes(np.arange(n_tokens, dtype="<u4").astype("<u2"))
    assert heap(lambda: shards.split_evenly(tmp_path / "pairs", tmp_path / "part", 3)) < MOST
    parts = [BinidxReader(tmp_path / f"part-0000{part}-of-00003") for part in range(3)]
    assert sum(part.n_documents for part in parts) == 500_000
    assert [int(part.tokens[-1]) for part in parts] == [333_333 % 65536, 666_665 % 65536, 999_999 % 65536]


def test_a_writer_holds_no_documents(tmp_path):
    def write():
        with BinidxWriter(tmp_path / "out") as writer:
            for _ in range(64):
                writer.add_documents(np.zeros(0, np.uint16), np.zeros(1 << 16, np.int32))

    assert heap(write) < MOST
    assert BinidxReader(tmp_path / "out").n_documents == 64 << 16


def test_documents_beyond_four_gigabytes(tmp_path):
    n_tokens = 5 << 29  # 5 GiB
    bin_path = sparse_shard(tmp_path / "big", n_tokens)
    with open(bin_path, "r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<HH", 9, 0))
    reader = BinidxReader(tmp_path / "big")
    assert reader.document(19)[-3:].tolist() == [0, 9, 0] and len(reader.document(19)) == 1 << 27
    assert reader.eod_share() == 1.0 and int(reader.offsets[19]) == 19 << 28 > 1 << 32
    known = np.ones(10, bool)
    known[9] = False
    place = 2 * n_tokens - 4
    with pytest.raises(ValueError, match=f"big.bin: the token at byte {place} must be an id of the vocabulary, got 9"):
        reader._check_tokens(n_tokens - 5, n_tokens, known)
    with open(bin_path, "r+b") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(
        ValueError, match="must have 5368709120 bytes, .*cut off at byte 5000000000, in document 18 of 20"
    ):
        BinidxReader(tmp_path / "big")

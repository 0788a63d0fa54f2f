"""Merging and splitting shards: the same documents in the same order, whole or not at all."""

import struct

import numpy as np
import pytest

from rwkv_ext import cli
from rwkv_ext.data import shards
from rwkv_ext.data.binidx import HEADER, MAGIC, BinidxReader, BinidxWriter, part_names, shard_files
from rwkv_ext.data.shards import hold_out, merge, split_evenly


def documents_of(reader):
    return [reader.document(i).tolist() for i in range(reader.n_documents)]


def random_documents(n, seed=0, longest=9):
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 65530, size=generator.integers(0, longest)).tolist() + [0] for _ in range(n)]


def write(prefix, documents):
    with BinidxWriter(prefix) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def write_int32(prefix, documents):
    """A shard as other programs write them, of a wider type."""
    bin_path, idx_path = shard_files(prefix)
    sizes = np.array([len(d) for d in documents], "<i4")
    offsets = np.cumsum([0, *4 * sizes[:-1]]).astype("<i8")
    bin_path.write_bytes(np.array(sum(documents, []), "<i4").tobytes())
    header = HEADER.pack(MAGIC, 1, 4, len(sizes), len(sizes) + 1)
    starts = np.arange(len(sizes) + 1, dtype="<i8")
    idx_path.write_bytes(header + sizes.tobytes() + offsets.tobytes() + starts.tobytes())
    return prefix


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(shards, "COPIED_TOKENS", 13)
    monkeypatch.setattr(shards, "BLOCK", 17)


def test_merge_keeps_documents_and_their_order(tmp_path):
    first, second, third = random_documents(40), [[]], random_documents(25, seed=1, longest=60)
    inputs = [write(tmp_path / "a", first), write(tmp_path / "b", second), write_int32(tmp_path / "c", third)]
    merged = merge(inputs, tmp_path / "out")
    merged.check_documents()
    assert documents_of(merged) == first + second + third
    assert merged.dtype == np.uint16
    assert documents_of(merge(inputs[:1], tmp_path / "out", overwrite=True)) == first


def test_copies_are_bounded(tmp_path, monkeypatch):
    """No more than COPIED_TOKENS at once, or one document."""
    documents = random_documents(60, seed=2, longest=20)
    merge([write(tmp_path / "a", documents)], tmp_path / "out")
    calls, add = [], BinidxWriter.add_documents

    def watched(writer, ids, sizes):
        calls.append(sizes.tolist())
        add(writer, ids, sizes)

    monkeypatch.setattr(BinidxWriter, "add_documents", watched)
    assert documents_of(merge([tmp_path / "a"], tmp_path / "out", overwrite=True)) == documents
    assert all(sum(sizes) <= shards.COPIED_TOKENS or len(sizes) == 1 for sizes in calls)
    assert max(map(len, calls)) > 1


def test_merge_checks_documents_that_opening_does_not_look_at(tmp_path):
    prefix = write(tmp_path / "many", [[7, 7, 0]] * 20_000)
    idx_path = shard_files(prefix)[1]
    with open(idx_path, "r+b") as file:
        file.seek(HEADER.size + 4 * 700)
        file.write(struct.pack("<ii", 2, 4))  # two sizes that add up as before
    BinidxReader(prefix)
    with pytest.raises(ValueError, match="many.idx: document 701 must start at byte 4204"):
        merge([prefix], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_merge_refuses_and_leaves_nothing(tmp_path):
    good, wide = write(tmp_path / "good", [[1, 0]]), write_int32(tmp_path / "wide", [[5, 0], [70000, 0]])
    with pytest.raises(ValueError, match="wide.bin: the token at byte 8 must be an id of the vocabulary, got 70000"):
        merge([good, wide], tmp_path / "out")
    with pytest.raises(ValueError, match="OUT must be another shard than the input .*good, got .*good; name another"):
        merge([good], good, overwrite=True)
    with pytest.raises(FileExistsError, match="wide.bin: already exists"):
        merge([good], wide)
    _, idx_path = shard_files(wide)
    data = bytearray(idx_path.read_bytes())
    data[HEADER.size : HEADER.size + 8] = struct.pack("<ii", 3, 1)  # the second document begins elsewhere
    idx_path.write_bytes(data)
    with pytest.raises(ValueError, match="wide.idx"):
        merge([good, wide], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.bin", "good.idx", "wide.bin", "wide.idx"]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_split_evenly(tmp_path, parts):
    documents = random_documents(60, seed=2)
    readers = split_evenly(write(tmp_path / "in", documents), tmp_path / "out", parts)
    assert sum((documents_of(reader) for reader in readers), []) == documents
    assert [r.prefix for r in readers] == [f"{tmp_path}/out-{i:05d}-of-{parts:05d}" for i in range(parts)]
    share = sum(map(len, documents)) / parts
    assert all(abs(reader.n_tokens - share) <= 9 for reader in readers)  # of the longest document


def test_split_evenly_refuses(tmp_path):
    shard = write(tmp_path / "in", [[1, 0], list(range(1, 50)), [2, 0]])
    with pytest.raises(ValueError, match="parts must be 1 to 3, the documents of .*in, got 4"):
        split_evenly(shard, tmp_path / "out", 4)
    with pytest.raises(ValueError, match="parts must leave every part a document, got 3, .* longer than 17 tokens"):
        split_evenly(shard, tmp_path / "out", 3)
    with pytest.raises(ValueError, match="empty: a shard to split must have documents, got none"):
        split_evenly(write(tmp_path / "empty", []), tmp_path / "out", 1)
    write(tmp_path / "out-00001-of-00002", [[3, 0]])
    with pytest.raises(FileExistsError, match="out-00001-of-00002.bin: already exists"):
        split_evenly(shard, tmp_path / "out", 2)
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out-00001-of-00002.bin", "out-00001-of-00002.idx"]


def test_hold_out(tmp_path):
    documents = [[i + 1, 0] for i in range(2000)]
    shard = write(tmp_path / "in", documents)
    train, held = (documents_of(reader) for reader in hold_out(shard, tmp_path / "a", 0.2, seed=3))
    assert sorted(train + held) == documents
    assert train == sorted(train) and held == sorted(held)
    assert 330 < len(held) < 470  # 400, and four standard deviations
    again = [documents_of(reader) for reader in hold_out(shard, tmp_path / "b", 0.2, seed=3)]
    assert again == [train, held]
    assert documents_of(hold_out(shard, tmp_path / "c", 0.2, seed=4)[1]) != held
    # No pattern that repeats with the blocks of documents that are drawn together.
    chosen = np.isin(np.arange(1, 2001), [document[0] for document in held])
    assert len({chosen[i : i + 17].tobytes() for i in range(0, 1989, 17)}) > 20


def test_hold_out_refuses(tmp_path):
    shard = write(tmp_path / "in", [[1, 0], [2, 0]])
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="share must lie between 0 and 1, such as 0.01, got "):
            hold_out(shard, tmp_path / "out", share)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        hold_out(shard, tmp_path / "out", 0.5, seed=-1)
    with pytest.raises(ValueError, match="got 1e-09 of the 2 documents .*out-holdout has none; take another share"):
        hold_out(shard, tmp_path / "out", 1e-9)
    assert not list(tmp_path.glob("out*"))


def test_writer_refuses_sizes_that_do_not_fit(tmp_path):
    with BinidxWriter(tmp_path / "out") as writer:
        for sizes in ([1, 1], [4, -1], [[3]], [2**31]):
            with pytest.raises(ValueError, match="add_documents: sizes must have one dimension, 0 to 2147483647 each"):
                writer.add_documents([1, 2, 3], sizes)
        with pytest.raises(TypeError, match="add_documents: ids must be integers in one dimension"):
            writer.add_documents([[1.5]], [1])
        with pytest.raises(ValueError, match="add_documents: ids must be 0 to 65535, got 1 to 65536"):
            writer.add_documents([1, 65536], [2])
        writer.add_documents([1, 2, 3], [2, 0, 1])
    assert documents_of(BinidxReader(tmp_path / "out")) == [[1, 2], [], [3]]


def run(*arguments):
    return cli.main(["data", *map(str, arguments)])


def test_commands(tmp_path, capsys):
    shard = write(tmp_path / "in", [[33520, 4600, 0], [5, 0], [6, 0], [7, 0]])
    assert run("split", shard, tmp_path / "part.bin", "--parts", 2) == 0  # either file's name will do
    assert f"{tmp_path}/part-00001-of-00002  2 documents, 4 tokens" in capsys.readouterr().out
    parts = [tmp_path / f"part-0000{i}-of-00002" for i in range(2)]
    assert run("merge", *parts, tmp_path / "whole") == 0
    assert shard_files(tmp_path / "whole")[0].read_bytes() == shard_files(shard)[0].read_bytes()
    assert shard_files(tmp_path / "whole")[1].read_bytes() == shard_files(shard)[1].read_bytes()
    assert run("split", shard, tmp_path / "part", "--hold-out", 0.5, "--seed", 1) == 0
    assert f"{tmp_path}/part-holdout  " in capsys.readouterr().out
    assert run("merge", shard, shard) == 2
    assert "OUT must be another shard" in capsys.readouterr().err


def test_sample_command(tmp_path, capsys):
    shard = write(tmp_path / "in", [[33520, 4600, 0]])
    assert run("sample", shard) == 0
    assert capsys.readouterr().out == f"--- {shard}, document 0 of 1, 3 tokens\nToday is\n"
    assert run("sample", shard, "--tokens", 1) == 0
    assert capsys.readouterr().out.endswith("\nToday\n")
    for option, got in (("--documents", 0), ("--tokens", -1), ("--seed", -1)):
        assert run("sample", shard, option, got) == 2
        assert f"{option} must be" in capsys.readouterr().err
    many = write(tmp_path / "many", [[i + 1, 0] for i in range(100)])
    draws = set()
    for seed in (0, 0, 1):
        assert run("sample", many, "--seed", seed, "--documents", 2) == 0
        draws.add(capsys.readouterr().out)
    assert len(draws) == 2 and all(draw.count("--- ") == 2 for draw in draws)
    assert run("sample", write(tmp_path / "empty", [])) == 0


def test_names_of_parts_sort_in_their_order():
    assert part_names("out", 2) == ["out-00000-of-00002", "out-00001-of-00002"]
    names = part_names("out", 100_001)
    assert names == sorted(names) and names[-1] == "out-100000-of-100001"

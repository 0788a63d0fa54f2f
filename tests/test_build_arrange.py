"""Shuffled, unique and split documents against the plain definitions, whatever the bounds of memory and threads."""

import json
import os

import numpy as np
import pytest
from file_limits import largest_file

from rwkv_ext import cli
from rwkv_ext._load import native
from rwkv_ext.data import build_task, duplicates, pieces, shuffle
from rwkv_ext.data.binidx import BinidxReader, shard_files
from rwkv_ext.data.build import build

TEXTS = [f"{number % 37} " + "word é今\n" * (number * 7 % 11) * (number % 5 > 0) for number in range(120)]
TEXTS[50] = TEXTS[51] = ""


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # takes long, and nothing here needs it
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(params=["large bounds", "small bounds"])
def bounds(request, monkeypatch):
    if request.param == "small bounds":
        monkeypatch.setattr(pieces, "PIECE_BYTES", 700)
        monkeypatch.setattr(build_task, "BLOCK_TOKENS", 90)
        monkeypatch.setattr(shuffle, "BLOCK_TOKENS", 90)
        monkeypatch.setattr(shuffle, "BUCKET_BYTES", 600)
        monkeypatch.setattr(duplicates, "DIGESTS_AT_ONCE", 10)


def texts_of(prefix, world):
    reader = BinidxReader(prefix)
    reader.check_documents()
    return [world.decode(reader.document(i), "strict") for i in range(reader.n_documents)]


def mix(x):
    """splitmix64, with Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def key(number, seed, epoch):
    start = mix((mix(seed) + epoch) % 2**64)
    return mix(mix((number + start) % 2**64) ^ start)


def shuffled(texts, seed, epoch):
    return [text for _, text in sorted((key(number, seed, epoch), text) for number, text in enumerate(texts))]


def test_keys_are_the_definition_and_differ():
    numbers = np.arange(1 << 17)
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 7)):
        found = shuffle.keys(numbers, seed, epoch)
        assert found[:50].tolist() == [key(number, seed, epoch) for number in range(50)]
        assert len(np.unique(found)) == len(numbers)
        counts = np.bincount((found >> np.uint64(54)).astype(np.int64), minlength=1024)
        assert abs(counts - 128).max() < 7 * 128**0.5
        steps = np.diff(found[np.argsort(found)[:100]].astype(np.float64))
        assert steps.std() > 0.5 * steps.mean()


@pytest.mark.parametrize("threads", [1, 3])
def test_shuffle(tmp_path, world, corpus, bounds, threads):
    options = {"tokenizer": world, "shuffle": True, "threads": threads, "show_progress": False}
    for seed in (0, 5):
        summary = build([corpus], tmp_path / f"{seed}", seed=seed, **options)
        assert texts_of(tmp_path / f"{seed}", world) == shuffled(TEXTS, seed, 0)
        assert (summary.documents, summary.text_bytes) == (120, sum(len(text.encode()) for text in TEXTS))
    summary = build([corpus], tmp_path / "three", seed=5, epochs=3, **options)
    assert texts_of(tmp_path / "three", world) == sum((shuffled(TEXTS, 5, epoch) for epoch in range(3)), [])
    assert (summary.documents, summary.text_bytes) == (360, 3 * sum(len(text.encode()) for text in TEXTS))


def test_duplicates_are_dropped_but_for_the_first(tmp_path, world, corpus, bounds):
    unique = list(dict.fromkeys(TEXTS))
    options = {"tokenizer": world, "drop_duplicates": True, "show_progress": False}
    summary = build([corpus, corpus], tmp_path / "unique", **options)
    assert texts_of(tmp_path / "unique", world) == unique
    assert (summary.documents, summary.duplicates) == (len(unique), 240 - len(unique))
    assert summary.text_bytes == sum(len(text.encode()) for text in unique)
    assert f"dropped          {240 - len(unique)} duplicate documents" in summary.lines()
    # The numbers that the order depends on are those of the documents before any is dropped.
    build([corpus], tmp_path / "shuffled", shuffle=True, **options)
    first = {text: number for number, text in reversed(list(enumerate(TEXTS)))}
    expected = sorted(unique, key=lambda text: key(first[text], 0, 0))
    assert texts_of(tmp_path / "shuffled", world) == expected
    build([corpus], tmp_path / "no-eod", eod=False, shuffle=True, **options)
    assert texts_of(tmp_path / "no-eod", world) == expected


def greedy(sizes, limit):
    """Return the number of documents of each shard."""
    counts, tokens = [0], 0
    for size in sizes:
        if counts[-1] and tokens + size > limit:
            counts, tokens = [*counts, 0], 0
        counts[-1], tokens = counts[-1] + 1, tokens + size
    return counts


@pytest.mark.parametrize("limit", [1, 20, 77, 1000, 10**9])
@pytest.mark.parametrize("arrangement", [{}, {"shuffle": True}, {"drop_duplicates": True}], ids=str)
def test_shards(tmp_path, world, corpus, bounds, limit, arrangement):
    options = {"tokenizer": world, "show_progress": False, **arrangement}
    build([corpus], tmp_path / "whole", **options)
    whole = BinidxReader(tmp_path / "whole")
    counts = greedy(whole.sizes.tolist(), limit)
    summary = build([corpus], tmp_path / "part", shard_tokens=limit, **options)
    readers = [BinidxReader(tmp_path / f"part-{i:05d}-of-{len(counts):05d}") for i in range(len(counts))]
    assert [reader.n_documents for reader in readers] == counts
    assert np.array_equal(np.concatenate([reader.tokens for reader in readers]), whole.tokens)
    assert np.array_equal(np.concatenate([reader.sizes for reader in readers]), whole.sizes)
    for reader in readers:
        reader.check_documents()
    assert (summary.documents, summary.tokens) == (whole.n_documents, whole.n_tokens)
    assert len(list(tmp_path.iterdir())) == 3 + 2 * len(counts)


def test_shards_without_end_of_document(tmp_path, world, corpus):
    build([corpus], tmp_path / "part", shard_tokens=1, eod=False, tokenizer=world, show_progress=False)
    readers = [BinidxReader(path) for path in sorted(tmp_path.glob("part-*.bin"))]
    assert sum(reader.n_documents for reader in readers) == 120


def test_existing_shards_are_replaced_together_and_on_request_alone(tmp_path, world, corpus):
    options = {"tokenizer": world, "show_progress": False}
    build([corpus], tmp_path / "part", shard_tokens=300, **options)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"part-00000-of-.*.bin: already exists; choose another name, remove it"):
        build([corpus], tmp_path / "part", shard_tokens=500, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    (tmp_path / "part-00000-of-notes").touch()
    (tmp_path / "apart-00000-of-00001.bin").touch()
    build([corpus], tmp_path / "part", shard_tokens=500, overwrite=True, **options)
    names = {path.name for path in tmp_path.iterdir()}
    count = len(list(tmp_path.glob("part-*.bin")))
    assert count > 1 and len(names) == 3 + 2 * count
    assert all(f"part-{i:05d}-of-{count:05d}.idx" in names for i in range(count))


@pytest.mark.parametrize("options, message", [
    ({"seed": -1}, r"seed must be 0 to 2\*\*64 - 1, got -1"),
    ({"seed": 2**64}, r"seed must be 0 to 2\*\*64 - 1"),
    ({"epochs": 0, "shuffle": True}, "epochs must be 1 or more, got 0"),
    ({"epochs": 2}, "epochs must be 1 without shuffle, got 2: each epoch has an order of its own; add --shuffle"),
    ({"shard_tokens": 0}, "shard_tokens must be 1 or more, got 0"),
])  # fmt: skip
def test_impossible_arrangements(tmp_path, world, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        build([corpus], tmp_path / "out", tokenizer=world, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_full_disk_while_documents_are_arranged(tmp_path, world, corpus, monkeypatch):
    options = {"tokenizer": world, "show_progress": False, "shuffle": True, "epochs": 2}
    build([corpus], tmp_path / "whole", **options)
    room = BinidxReader(tmp_path / "whole").n_tokens  # twice that for all: one epoch fits, two do not
    message = "cannot write after .* documents and .* tokens: File too large; what is finished was kept"
    with largest_file(room + 3000), pytest.raises(OSError, match=message):
        build([corpus], tmp_path / "out", **options)
    assert not (tmp_path / "out.bin").exists()
    build([corpus], tmp_path / "out", **options)
    for made, expected in zip(shard_files(tmp_path / "out"), shard_files(tmp_path / "whole"), strict=True):
        assert made.read_bytes() == expected.read_bytes()
    assert len(list(tmp_path.iterdir())) == 5


def test_full_disk_for_what_finds_duplicates(tmp_path, world):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(300)))  # digests are longer than the ids
    with largest_file(3000), pytest.raises(OSError, match="cannot write after 300 documents and .* tokens: File too"):
        build([corpus], tmp_path / "out", tokenizer=world, drop_duplicates=True)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.jsonl"}


def test_command(tmp_path, world, corpus, capsys):
    arguments = "--shuffle --seed 3 --epochs 2 --shard-tokens 1000 --drop-duplicates --drop-empty --threads 2".split()
    assert cli.main(["data", "build", *arguments, str(corpus), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    unique = list(dict.fromkeys(TEXTS))
    assert f"documents        {2 * len(unique) - 2:,}\n" in printed
    assert "dropped          2 empty documents\n" in printed and "duplicate documents\n" in printed
    names = sorted(path.name for path in tmp_path.glob("*.bin"))
    assert f"wrote            {tmp_path}/{names[0]} to {names[-1]}" in printed
    numbered = [text for text in TEXTS if text]
    first = {text: number for number, text in reversed(list(enumerate(numbered)))}
    expected = [sorted(first, key=lambda text: key(first[text], 3, epoch)) for epoch in range(2)]
    assert sum((texts_of(tmp_path / name, world) for name in names), []) == sum(expected, [])


def test_gather_refuses_what_is_not_there():
    ids = np.arange(10, dtype=np.uint16)
    gather = native().gather
    assert gather(ids, np.array([4, 0, 9]), np.array([2, 0, 1], np.int32)).tolist() == [4, 5, 9]
    for begin, size in ((-1, 1), (10, 1), (0, 11), (2**62, 2**30), (0, -1)):
        with pytest.raises(ValueError, match="gather: document 0 must lie in the 10 ids, got"):
            gather(ids, np.array([begin]), np.array([size], np.int32))
    with pytest.raises(ValueError, match="gather: begins and sizes must be as many"):
        gather(ids, np.array([0, 1]), np.array([1], np.int32))

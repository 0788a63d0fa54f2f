"""Shards as one stream: the tokens of the merged file, whatever the cuts, types, threads, processes and open maps."""

import mmap
import os
import pickle
import re
import resource
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import write_int32

from rwkv_ext.data.binidx import HEADER, MAGIC, BinidxReader, BinidxWriter, shard_files
from rwkv_ext.data.sampler import Sampler, magic_prime
from rwkv_ext.data.shards import merge, split_evenly
from rwkv_ext.data.token_stream import TokenStream, find_shards, open_maps, read_windows


def write(prefix, *documents):
    with BinidxWriter(prefix) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def index_file(prefix, n_tokens, document):
    """Write the .idx of documents of one length, the last one shorter; return the path of the .bin to be."""
    bin_path, idx_path = shard_files(prefix)
    ends = np.minimum(document * np.arange(-(-n_tokens // document) + 1), n_tokens)
    sizes, offsets, starts = np.diff(ends).astype("<i4"), 2 * ends[:-1].astype("<i8"), np.arange(len(ends), dtype="<i8")
    header = HEADER.pack(MAGIC, 1, 8, len(sizes), len(starts))
    idx_path.write_bytes(header + sizes.tobytes() + offsets.tobytes() + starts.tobytes())
    return bin_path


def sparse_shard(prefix, n_tokens):
    """Write a shard of zeros that takes no disk; return the path of its .bin."""
    bin_path = index_file(prefix, n_tokens, document=1 << 27)
    with open(bin_path, "wb") as file:
        file.truncate(2 * n_tokens)
    return bin_path


def write_random(folder, sizes, seed=0):
    """Write shards of these sizes; return their prefixes, sorted by name."""
    generator = np.random.default_rng(seed)
    prefixes = [folder / name for name in sorted(f"{number}-of-{len(sizes)}" for number in range(len(sizes)))]
    for prefix, size in zip(prefixes, sizes, strict=True):
        index_file(prefix, size, document=30).write_bytes(generator.integers(0, 65536, size, np.uint16).tobytes())
    return prefixes


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """(folder of 12 shards, one of them empty and one of a single token; their tokens in one array)."""
    folder = tmp_path_factory.mktemp("pieces")
    prefixes = write_random(folder, [300, 1, 0, 2500, 77, 900, 30, 31, 29, 640, 5, 4000])
    return folder, np.concatenate([BinidxReader(prefix).tokens for prefix in prefixes])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=8),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=9),
    st.integers(1, 3),
)
def test_reads_are_those_of_one_array(tmp_path_factory, sizes, ranges, max_maps):
    prefixes = write_random(tmp_path_factory.mktemp("any"), sizes, seed=len(ranges))
    stream = TokenStream(prefixes, max_maps)
    whole = np.concatenate([np.zeros(0, np.uint16), *(BinidxReader(prefix).tokens for prefix in prefixes)])
    assert stream.n_tokens == len(whole) and stream.dtype == np.uint16
    for start, end in ranges:
        start, end = sorted((min(start, len(whole)), min(end, len(whole))))
        stream.will_read(start, end - start)
        found = stream.read(start, end - start)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, whole[start:end])
        wide = np.full(end - start, -1)
        assert stream.read_into(start, wide) is wide
        np.testing.assert_array_equal(wide, whole[start:end])


def test_a_folder_is_its_shards_by_name(pieces, tmp_path, monkeypatch):
    folder, whole = pieces
    prefixes = find_shards(folder)
    assert prefixes == sorted(prefixes) and len(prefixes) == 12
    stream = TokenStream(folder)
    assert (stream.n_tokens, stream.n_documents) == (len(whole), sum(s.n_documents for s in stream.shards))
    np.testing.assert_array_equal(stream.read(0, len(whole)), whole)
    readers = [BinidxReader(prefix) for prefix in prefixes]
    for same in (prefixes, readers, [prefixes[0] + ".idx", prefixes[1] + ".bin", *readers[2:]]):
        np.testing.assert_array_equal(TokenStream(same).read(0, len(whole)), whole)
    both = TokenStream([prefixes[3], folder])
    np.testing.assert_array_equal(both.read(0, 2500 + 300), np.concatenate([readers[3].tokens, whole[:300]]))
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep.2", [7, 0])  # a dot in the name, a folder of the same name beside the shard
    write(tmp_path / "deep", [8, 0])
    monkeypatch.chdir(tmp_path)
    assert find_shards(["deep.2", "deep"]) == ["deep.2", "deep"]
    relative = TokenStream("deep")
    monkeypatch.chdir("/")
    assert relative.read(0, 2).tolist() == [8, 0]
    (tmp_path / ".hidden.idx").touch()
    (tmp_path / "deep.idx.17.tmp").touch()
    assert find_shards(tmp_path) == [str(tmp_path / "deep"), str(tmp_path / "deep.2")]


def test_sources_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder must hold \*.idx and \*.bin files, got none; name a"):
        TokenStream(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.bin: no such file"):
        TokenStream(["none"])
    (tmp_path / "list.txt").write_text("data/one 100 100\n")
    with pytest.raises(ValueError, match="got another file; RWKV-LM's lists .* steps of their last column in data.w"):
        TokenStream(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="max_maps must be at least 1, got 0"):
        TokenStream([], max_maps=0)


def test_reads_outside_the_stream(tmp_path):
    stream = TokenStream(write(tmp_path / "shard", [1, 2, 0]))
    for start, count in ((-1, 2), (0, 4), (3, 1), (4, 0), (2, -1), (0, 1 << 60)):
        message = rf"tokens must lie within 0 .. 3 of the stream, got {start} .. {start + count}"
        with pytest.raises(ValueError, match=message):
            stream.read(start, count)
        with pytest.raises(ValueError, match=message):
            stream.will_read(start, count)
    assert stream.read(3, 0).tolist() == []
    for read in (lambda: stream.read_into(0, np.zeros(2, np.int16)), lambda: read_windows([(stream, 0)], 2, np.int16)):
        with pytest.raises(
            TypeError, match="the type of what is read must hold every uint16, got .*int16.*; use int64"
        ):
            read()
    with pytest.raises(TypeError, match="float"):
        stream.read(0.0, 1)


def test_shards_of_several_types(tmp_path):
    narrow = write(tmp_path / "narrow", [65535, 0])
    wide = write_int32(tmp_path / "wide", [[5, 0], [70000, 0]])
    stream = TokenStream([narrow, BinidxReader(wide, vocab_size=70001), narrow])
    assert stream.dtype == np.int32
    assert stream.read(0, 8).tolist() == [65535, 0, 5, 0, 70000, 0, 65535, 0]
    assert TokenStream([narrow, narrow]).fingerprint() != TokenStream(narrow).fingerprint()
    signed = write(tmp_path / "signed", [5, 0])
    with open(tmp_path / "signed.idx", "r+b") as file:
        file.seek(17)
        file.write(b"\3")  # int16: no type of 16 bits holds both
    assert TokenStream([signed, narrow]).dtype == np.int32
    assert TokenStream([signed, narrow]).read(0, 4).tolist() == [5, 0, 65535, 0]
    same = write_int32(tmp_path / "same", [[65535, 0]])
    assert TokenStream(same).fingerprint() == TokenStream(narrow).fingerprint()


@pytest.mark.parametrize("ctx_len", [16, 61])
def test_shards_give_the_samples_of_the_merged_file(pieces, tmp_path, ctx_len):
    """Two passes and more: samples, prime and fingerprint of shards, of the merged file, and of that file's parts."""
    folder, _ = pieces
    merged = merge(find_shards(folder), tmp_path / "merged")
    parts = split_evenly(tmp_path / "merged", tmp_path / "part", 7)
    samplers = [Sampler(data, ctx_len) for data in (folder, merged, parts)]
    one = samplers[1]
    for other in samplers:
        assert (other.prime, other.n_slots, other.fingerprint()) == (one.prime, one.n_slots, one.fingerprint())
        indices = range(2 * one.prime + 5)
        np.testing.assert_array_equal(other.batch(indices), one.batch(indices))
    assert any(shard.n_tokens < ctx_len for shard in samplers[0].stream.shards)


def test_fingerprint_names_the_tokens_and_their_order(tmp_path):
    generator = np.random.default_rng(3)
    one, two = (generator.integers(0, 65536, size, dtype=np.uint16) for size in (5000, 3000))
    write(tmp_path / "one", one), write(tmp_path / "two", two)
    stream = TokenStream([tmp_path / "one", tmp_path / "two"])
    changed = np.concatenate([one, two])
    changed[6789] ^= 1
    others = [
        TokenStream([tmp_path / "two", tmp_path / "one"]),
        TokenStream([tmp_path / "one", tmp_path / "two", tmp_path / "two"]),
        TokenStream(write(tmp_path / "changed", changed)),
        TokenStream([]),
    ]
    assert len({s.fingerprint() for s in (stream, *others)}) == 5
    assert stream.fingerprint() == stream.fingerprint()
    zeros = [TokenStream(write(tmp_path / str(size), np.zeros(size, np.uint16))) for size in (3000, 4000)]
    assert zeros[0].fingerprint() != zeros[1].fingerprint()  # alike but for their number


def test_fingerprint_of_much_text_reads_little(tmp_path, monkeypatch):
    """Of 3 * 2**28 tokens, 256 blocks; a change in a block is seen, one between two is not."""
    n_tokens = 3 << 28
    bin_path = sparse_shard(tmp_path / "big", n_tokens)
    read = []
    original = TokenStream.read_into

    def counting(self, start, out):
        read.append(start)
        return original(self, start, out)

    monkeypatch.setattr(TokenStream, "read_into", counting)
    before = TokenStream(tmp_path / "big").fingerprint()
    assert len(read) == 256 and read[0] == 0 and read[-1] == n_tokens - 2048
    for at, seen in ((read[100] + 2047, True), (read[100] + 2048, False)):
        with open(bin_path, "r+b") as file:
            file.seek(2 * at)
            file.write(b"\1")
        assert (TokenStream(tmp_path / "big").fingerprint() != before) == seen
        with open(bin_path, "r+b") as file:
            file.seek(2 * at)
            file.write(b"\0")


def test_positions_of_64_bits(tmp_path):
    """A .bin of 6 GiB (sparse) twice: token 2**32 and bytes beyond 2**32 are where they should be."""
    n_tokens = 3 << 30
    bin_path = sparse_shard(tmp_path / "big", n_tokens)
    marks = {n_tokens - 1: 77, (1 << 31) - 1: 5, 1 << 31: 6}
    with open(bin_path, "r+b") as file:
        for at, token in marks.items():
            file.seek(2 * at)
            file.write(struct.pack("<H", token))
    stream = TokenStream([tmp_path / "big", tmp_path / "big"])
    assert stream.n_tokens == 2 * n_tokens > 1 << 32
    for base in (0, n_tokens):
        assert stream.read(base + n_tokens - 3, 3).tolist() == [0, 0, 77]
        assert stream.read(base + (1 << 31) - 2, 4).tolist() == [0, 5, 6, 0]
    sampler = Sampler(stream, 4096)
    assert sampler.prime == magic_prime(3 << 31, 4096)
    index = next(i for i in range(10**6) if 0 <= n_tokens - 1 - sampler.locate(i) <= 4096)
    assert 77 in sampler.sample(index)


def test_windows_of_several_streams(pieces):
    folder, whole = pieces
    one, other = TokenStream(folder, max_maps=1), TokenStream(find_shards(folder)[3:])
    places = [(one, 290), (other, 2490), (one, 0), (other, 0)]
    offset = len(whole) - other.n_tokens
    for dtype in (np.int64, np.uint16):
        found = read_windows(places, 130, dtype)
        assert found.dtype == dtype
        starts = [290, offset + 2490, 0, offset]
        np.testing.assert_array_equal(found, [whole[start : start + 130] for start in starts])
    assert read_windows([], 130).shape == (0, 130)


def test_maps_are_few(pieces):
    folder, whole = pieces
    stream = TokenStream(folder, max_maps=3)

    def mapped():
        with open("/proc/self/maps") as maps:
            return sum(str(folder) in line for line in maps)

    assert mapped() == 0  # opened when they are read
    for start in np.random.default_rng(0).integers(0, len(whole) - 500, 200):
        np.testing.assert_array_equal(stream.read(start, 500), whole[start : start + 500])
        assert 1 <= mapped() <= 3
    del stream
    assert mapped() == 0


def test_maps_are_read_at_random_places(pieces):
    """The kernel is told not to read ahead in them (the flag rr)."""
    folder, whole = pieces
    stream = TokenStream(folder)
    stream.read(0, len(whole))
    with open("/proc/self/smaps") as maps:
        flags = re.findall(rf"{folder}.*?VmFlags: ([^\n]*)", maps.read(), re.S)
    assert len(flags) == 11 and all("rr" in found.split() for found in flags)  # but of the empty shard


def test_windows_are_asked_for_before_they_are_read(tmp_path, monkeypatch):
    """From the page that holds a window's first byte to its last byte, all windows before the first is copied."""
    prefixes = write_random(tmp_path, [9000, 9000])
    stream = TokenStream(prefixes)
    events = []

    class Map:
        def __init__(self, shard):
            self.shard = shard

        def madvise(self, *arguments):
            events.append((self.shard, *arguments))

    maps = stream._maps
    monkeypatch.setattr(stream, "_maps", lambda shard: (Map(shard), maps(shard)[1]))
    monkeypatch.setattr(stream, "_copy", lambda parts, row: events.append("copy"))
    read_windows([(stream, 5000), (stream, 8990)], 20)
    need = mmap.MADV_WILLNEED
    assert events == [(0, need, 8192, 10040 - 8192), (0, need, 16384, 18000 - 16384), (1, need, 0, 20), "copy", "copy"]


def test_maps_follow_the_limit_of_open_files(pieces):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for files, expected in ((256, 64), (1000, 250), (3, 1)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, limits[1]))
            assert open_maps() == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert 1 <= TokenStream(pieces[0]).max_maps <= 16384


def test_threads_share_a_stream(pieces):
    folder, whole = pieces
    stream = TokenStream(folder, max_maps=1)

    def work(seed):
        for start in np.random.default_rng(seed).integers(0, len(whole) - 300, 300):
            if not np.array_equal(stream.read(start, 300), whole[start : start + 300]):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))


def test_pickles_hold_no_tokens(pieces):
    folder, whole = pieces
    stream = TokenStream(folder, max_maps=2)
    stream.read(0, len(whole))
    data = pickle.dumps(stream)
    assert len(data) < 3000
    copy = pickle.loads(data)
    np.testing.assert_array_equal(copy.read(0, len(whole)), whole)
    assert copy.max_maps == 2 and copy.fingerprint() == stream.fingerprint()


class Samples(torch.utils.data.Dataset):
    """What a user of torch's DataLoader writes."""

    def __init__(self, sampler, count):
        self.sampler, self.count = sampler, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return os.getpid(), self.sampler.sample(index)


def test_worker_processes_need_no_state(pieces):
    folder, _ = pieces
    sampler = Sampler(TokenStream(folder, max_maps=2), 16)
    expected = sampler.batch(range(40))
    loader = torch.utils.data.DataLoader(Samples(sampler, 40), 4, num_workers=2, multiprocessing_context="fork")
    workers, rows = zip(*loader, strict=True)
    np.testing.assert_array_equal(torch.cat(rows).numpy(), expected)
    assert len(set(torch.cat(workers).tolist())) == 2 and os.getpid() not in torch.cat(workers)


@pytest.mark.parametrize("size", [0, 5, 8])
def test_a_shard_that_changes_is_not_read(tmp_path, size):
    """Neither before its first read nor, already mapped, after: what was cut off would end the process."""
    message = f"shard.bin: must still have 6 bytes, got {size}; a shard must stay as it is while it is read"
    write(tmp_path / "shard", [1, 2, 0])
    fresh, mapped = TokenStream(tmp_path / "shard"), TokenStream(tmp_path / "shard")
    assert mapped.read(0, 3).tolist() == [1, 2, 0]
    os.truncate(tmp_path / "shard.bin", size)
    for stream in (fresh, mapped):
        with pytest.raises(ValueError, match=message):
            stream.read(0, 3)
        with pytest.raises(ValueError, match=message):
            read_windows([(stream, 0)], 2)
    os.unlink(tmp_path / "shard.bin")
    with pytest.raises(FileNotFoundError, match="shard.bin"):
        fresh.read(0, 3)


def test_a_shard_replaced_whole_is_read_as_it_was(tmp_path):
    stream = TokenStream(write(tmp_path / "shard", [1, 2, 0]))
    stream.read(0, 1)
    with BinidxWriter(tmp_path / "shard", overwrite=True) as writer:
        writer.add_document([7, 8, 9, 0])
    assert stream.read(0, 3).tolist() == [1, 2, 0]

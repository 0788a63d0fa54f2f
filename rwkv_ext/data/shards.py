"""Shards made of shards: several merged into one, one split into several. Documents stay whole and in their order."""

import bisect
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from rwkv_ext.data.binidx import BLOCK, BinidxReader, BinidxWriter, part_names, shard_files
from rwkv_ext.data.token_stream import find_shards

COPIED_TOKENS = 1 << 24  # at once, if no document is longer


def merge(inputs: Sequence[str | os.PathLike], out: str | os.PathLike, overwrite: bool = False) -> BinidxReader:
    """Write the shard OUT with the documents of all inputs, in that order, as uint16; return its reader.

    An input is a shard's name or a folder, which stands for its shards by sorted name.
    ValueError for a damaged input, for ids above 65535, and for an OUT that is one of the inputs; FileExistsError
    where OUT exists, unless `overwrite`. OUT appears whole or not at all.
    """
    prefixes = find_shards(inputs)
    for prefix in prefixes:  # one open at a time: there may be more than a process may open
        _refuse_itself(_whole(prefix), out)
    with BinidxWriter(out, overwrite) as writer:
        for prefix in prefixes:
            reader = BinidxReader(prefix)
            _copy(reader, 0, reader.n_documents, writer)
    return BinidxReader(out)


def split_evenly(
    prefix: str | os.PathLike, out: str | os.PathLike, parts: int, overwrite: bool = False
) -> list[BinidxReader]:
    """Write OUT-00000-of-00003 and so on, consecutive documents each, about as many tokens in one part as in another.

    A part ends with the document that reaches its share of all tokens. ValueError where that leaves a part
    without a document, and as `merge`, but the parts take their names one after the other: if the disk fails then, some
    may be there and others not.
    """
    reader = _whole(prefix)
    if not reader.n_documents:
        raise ValueError(f"{reader.prefix}: a shard to split must have documents, got none")
    if not 1 <= parts <= reader.n_documents:
        need = f"1 to {reader.n_documents}, the documents of {reader.prefix}"
        raise ValueError(f"parts must be {need}, got {parts}")
    item = reader.dtype.itemsize
    cuts = [0]
    for part in range(1, parts):
        cuts.append(bisect.bisect_left(reader.offsets, part * reader.n_tokens // parts * item))
    cuts.append(reader.n_documents)
    if any(end <= begin for begin, end in zip(cuts, cuts[1:])):
        raise ValueError(
            f"parts must leave every part a document, got {parts}, and a document of {reader.prefix} is longer than "
            f"{reader.n_tokens // parts} tokens; take fewer parts"
        )
    names = part_names(_name(out), parts)
    with _writers(reader, names, overwrite) as writers:
        for writer, begin, end in zip(writers, cuts, cuts[1:]):
            _copy(reader, begin, end, writer)
    return [BinidxReader(name) for name in names]


def hold_out(
    prefix: str | os.PathLike, out: str | os.PathLike, share: float, seed: int = 0, overwrite: bool = False
) -> tuple[BinidxReader, BinidxReader]:
    """Write OUT-train and OUT-holdout: each document is held out with probability `share`, by its number and the seed.

    ValueError for a share outside 0 to 1 or a negative seed, where one of the two gets no document, and as
    `split_evenly`.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, such as 0.01, got {share}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    reader = _whole(prefix)
    names = [f"{_name(out)}-train", f"{_name(out)}-holdout"]
    with _writers(reader, names, overwrite) as writers:
        for begin, end, held in _runs(reader.n_documents, share, seed):
            _copy(reader, begin, end, writers[held])
        for name, writer in zip(names, writers):
            if not writer.n_documents:
                raise ValueError(
                    f"share must leave both parts a document, got {share} of the {reader.n_documents} documents of "
                    f"{reader.prefix}: {Path(name).name} has none; take another share or seed"
                )
    return BinidxReader(names[0]), BinidxReader(names[1])


def _runs(n_documents: int, share: float, seed: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (begin, end, held out) for runs of documents that go the same way."""
    for block, begin in enumerate(range(0, n_documents, BLOCK)):
        held = np.random.default_rng([seed, block]).random(min(BLOCK, n_documents - begin)) < share
        edges = np.flatnonzero(held[1:] != held[:-1]) + 1
        for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(held)]):
            yield begin + first, begin + last, bool(held[first])


def _name(prefix: str | os.PathLike) -> str:
    return os.fspath(shard_files(prefix)[0])[: -len(".bin")]


def _whole(prefix: str | os.PathLike) -> BinidxReader:
    reader = BinidxReader(prefix)
    reader.check_documents()  # documents that are copied together must lie together
    return reader


@contextmanager
def _writers(reader: BinidxReader, names: Sequence[str], overwrite: bool) -> Iterator[list[BinidxWriter]]:
    """Open all before anything is written, so that a name that is taken stops all of them."""
    for name in names:
        _refuse_itself(reader, name)
    with ExitStack() as stack:
        yield [stack.enter_context(BinidxWriter(name, overwrite)) for name in names]


def _refuse_itself(reader: BinidxReader, out: str | os.PathLike) -> None:
    path = shard_files(out)[0]
    if path.exists() and path.samefile(reader.bin_path):
        raise ValueError(f"OUT must be another shard than the input {reader.prefix}, got {out}; name another")


def _copy(reader: BinidxReader, begin: int, end: int, writer: BinidxWriter) -> None:
    item = reader.dtype.itemsize
    while begin < end:
        start = int(reader.offsets[begin])
        # A document ends where the next one starts; the last of all goes by itself. (NumPy would search in a copy of
        # the whole list, because it is not aligned in the file.)
        most = min(end, begin + BLOCK)
        near = bisect.bisect_right(reader.offsets, start + COPIED_TOKENS * item, begin + 1, most) - 1
        stop = max(begin + 1, near)
        sizes, first = reader.sizes[begin:stop], start // item
        writer.add_documents(reader.tokens[first : first + int(sizes.sum(dtype=np.int64))], sizes)
        begin = stop

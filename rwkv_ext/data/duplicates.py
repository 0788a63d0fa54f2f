"""Exact duplicates among documents: the first of each stays."""

import hashlib
from pathlib import Path

import numpy as np

DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])  # BLAKE2b of a document's ids, 16 bytes
DIGESTS_AT_ONCE = 1 << 24  # compared in memory; of more, those with the same first bits at a time
BLOCK = 1 << 20


def digests(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return DIGEST [documents] of documents whose ids (uint16) stand back to back."""
    data = memoryview(ids.astype("<u2", copy=False)).cast("B")
    ends = (2 * np.cumsum(sizes, dtype=np.int64)).tolist()
    parts = (hashlib.blake2b(data[begin:end], digest_size=16).digest() for begin, end in zip([0, *ends], ends))
    return np.frombuffer(b"".join(parts), DIGEST)


def find_duplicates(path: Path, found: np.ndarray) -> None:
    """Set `found`, bool [documents] of zeros, where an earlier document has the same digest of those in `path`."""
    count = len(found)
    bits = max(0, (count - 1) // DIGESTS_AT_ONCE).bit_length()
    for first_bits in range(1 << bits):
        numbers, chosen = _with_first_bits(path, count, bits, first_bits)
        order = np.lexsort((chosen["low"], chosen["high"]))  # keeps the order of equal ones
        chosen = chosen[order]
        found[numbers[order[1:][chosen[1:] == chosen[:-1]]]] = True


def _with_first_bits(path: Path, count: int, bits: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    numbers, chosen = [np.zeros(0, np.int64)], [np.zeros(0, DIGEST)]
    with open(path, "rb") as file:
        for begin in range(0, count, BLOCK):
            block = np.fromfile(file, DIGEST, min(BLOCK, count - begin))
            here = block["high"] >> np.uint64(64 - bits) == wanted if bits else np.ones(len(block), bool)
            numbers.append(begin + np.flatnonzero(here))
            chosen.append(block[here])
    return np.concatenate(numbers), np.concatenate(chosen)

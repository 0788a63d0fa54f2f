"""BinidxReader: a damaged shard is refused with a clear message, or gives what the format says its files hold.

    index_file.py [-runs=N] [-max_total_time=SECONDS] [-seed=N] [-artifact_prefix=PATH] FOLDER...

The options and the last line are libFuzzer's. An input is the length of the .idx in two bytes, the .idx, the .bin.
"""

import hashlib
import random
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402

from rwkv_ext.data.binidx import BinidxReader  # noqa: E402

HEADER = struct.Struct("<9sQBQQ")
LETTERS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
NUMBERS = [0, 1, 2, 3, 7, 8, 34, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**61, 2**63 - 1, 2**64 - 1]
KNOWN = np.arange(65536) < 65530


def documents_of(idx: bytes, data: bytes) -> list[list[int]]:
    """The format, read in the plainest way."""
    _, _, code, count, n_starts = HEADER.unpack_from(idx)
    sizes = struct.unpack_from(f"<{count}i", idx, 34)
    offsets = struct.unpack_from(f"<{count}q", idx, 34 + 4 * count)
    assert len(idx) == 34 + 12 * count + 8 * n_starts
    assert sum(sizes) * struct.calcsize(LETTERS[code]) == len(data)
    return [list(struct.unpack_from(f"<{size}{LETTERS[code]}", data, at)) for size, at in zip(sizes, offsets)]


def read(prefix: Path) -> list[list[int]] | None:
    """All documents of a shard, or None if the reader refuses it in the right way."""
    try:
        reader = BinidxReader(prefix)
        reader.check_documents()
        reader.check_tokens(KNOWN)
        documents = [reader.document(i).tolist() for i in range(reader.n_documents)]
        assert [token for document in documents for token in document] == reader.tokens.tolist()
        assert reader.n_tokens == len(reader.tokens) and 0 <= reader.eod_share() <= 1
        return documents
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{prefix}."), message
        assert "got" in message and ";" in message, message
        return None


def run_one(prefix: Path, data: bytes) -> None:
    length = int.from_bytes(data[:2], "little")
    idx, tokens = data[2 : 2 + length], data[2 + length :]
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(tokens)
    documents = read(prefix)
    assert documents is None or documents == documents_of(idx, tokens), documents


def mutate(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(8)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = rng.randrange(256)
    elif kind == 2:  # a whole number in place of another
        width = rng.choice((1, 2, 4, 8))
        data[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    elif kind == 3:
        del data[at : at + rng.choice((1, 2, 4, 8, 12))]
    elif kind == 4:
        data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
    elif kind == 5:
        del data[at:]
    elif kind == 6:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        data[at : at + 8] = other[start : start + 8]
    else:  # the length of the .idx goes with what was done to it
        length = int.from_bytes(data[:2], "little") + rng.choice((-12, -8, -4, -1, 1, 4, 8, 12))
        data[:2] = (length % 65536).to_bytes(2, "little")


def main(arguments: list[str]) -> int:
    options = dict(argument[1:].split("=", 1) for argument in arguments if argument.startswith("-"))
    folders = [Path(argument) for argument in arguments if not argument.startswith("-")]
    corpus = [path.read_bytes() for folder in folders for path in sorted(folder.iterdir())]
    limit, seconds = int(options.get("runs", -1)), float(options.get("max_total_time", 0))
    rng, started, runs = random.Random(int(options.get("seed", 1))), time.monotonic(), 0
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        while runs < len(corpus) or limit < 0 or runs < limit:
            if seconds and runs % 64 == 0 and time.monotonic() - started > seconds:
                break
            data = corpus[runs] if runs < len(corpus) else bytearray(rng.choice(corpus))
            for _ in range(rng.choice((1, 1, 2, 4)) if runs >= len(corpus) else 0):
                mutate(rng, data, corpus)
            try:
                run_one(Path(folder) / "shard", bytes(data))
            except Exception:
                traceback.print_exc()
                path = f"{options.get('artifact_prefix', 'crash-')}{hashlib.sha256(data).hexdigest()[:16]}"
                Path(path).write_bytes(data)
                print(f"the input of {len(data)} bytes is in {path}", file=sys.stderr)
                return 1
            runs += 1
    print(f"Done {runs} runs in {time.monotonic() - started:.0f} second(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

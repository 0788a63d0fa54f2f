"""`rwkv-ext data build` from JSON lines to a shard, beside the bare tokenizer and the way of RWKV-LM's make_data.py.

    python benchmarks/bench_build.py --output benchmarks/results/amd-epyc_2026-11_build.md

The texts are those of bench_tokenizer.py, cut into documents. The shard is compared with the peer's byte for byte
before anything is timed. All files lie in a RAM disk: what is measured is the work, not the disk.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import struct
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_tokenizer import read_files, read_texts
from common import Timing, header, table
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from rwkv_ext import WorldTokenizer
from rwkv_ext.data.binidx import shard_files
from rwkv_ext.data.build import build
from rwkv_ext.host_memory import keep_freed_memory
from rwkv_ext.vocabulary import WORLD

DOCUMENT = 4000  # characters
SOURCES = {
    "English (Perl's .pod)": "English",
    "code (Python's library)": "code",
    "ru (translations)": "Russian",
    "zh_CN (translations)": "Chinese",
}


def make_data(lines_path: Path, prefix: Path, trie: TRIE_TOKENIZER) -> None:
    """One epoch, not shuffled, as RWKV-LM's make_data.py goes about it.

    All lines are read first; each text is encoded in Python, decoded again and compared; the ids and a 0 are written as
    uint16; the index follows.
    """
    lines = [line for line in lines_path.read_text(encoding="utf-8").split("\n") if line]
    sizes = []
    bin_path, idx_path = shard_files(prefix)
    with open(bin_path, "wb") as file:
        for line in lines:
            text = json.loads(line)["text"]
            ids = trie.encode(text)
            if trie.decode(ids) != text:
                raise SystemExit("bench_build: the peer does not decode what it encoded")
            file.write(np.array([*ids, 0], dtype=np.uint16).tobytes())
            sizes.append(len(ids) + 1)
    pointers = 2 * (np.cumsum(sizes, dtype=np.int64) - sizes)
    with open(idx_path, "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1))
        file.write(np.array(sizes, dtype=np.int32).tobytes())
        file.write(pointers.tobytes())
        file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())


def write_lines(path: Path, documents: list[str], ascii_only: bool) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(documents):
            record = {"id": number, "url": f"https://example.org/{number}", "text": text, "meta": {"score": 0.5}}
            file.write(json.dumps(record, ensure_ascii=ascii_only) + "\n")


def check(lines: Path, folder: Path, world: WorldTokenizer, trie: TRIE_TOKENIZER) -> None:
    """Raise unless the shard is the peer's, byte for byte, for any number of threads."""
    make_data(lines, folder / "peer", trie)
    for threads in (1, 2):
        build([lines], folder / "own", tokenizer=world, threads=threads, overwrite=True, show_progress=False)
        for own, peer in zip(shard_files(folder / "own"), shard_files(folder / "peer"), strict=True):
            if own.read_bytes() != peer.read_bytes():
                raise SystemExit(f"bench_build: {own.name} is not the peer's")


def seconds_of(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def bench(name: str, texts: list[str], ascii_only: bool, options, folder: Path, world, trie) -> list:
    """Return a row. `texts` are the documents, repeated until there is enough to time."""
    small = texts[: max(1, int(options.peer_megabytes * 1e6) // DOCUMENT)]
    lines, small_lines = folder / "lines.jsonl", folder / "small.jsonl"
    write_lines(small_lines, small, ascii_only)
    check(small_lines, folder, world, trie)
    size = sum(len(text.encode()) for text in texts)
    texts = texts * max(1, round(options.megabytes * 1e6 / size))
    write_lines(lines, texts, ascii_only)
    whole = "".join(texts).encode()
    size, small_size = len(whole), sum(len(text.encode()) for text in small)

    def run(threads):
        build([lines], folder / "own", tokenizer=world, threads=threads, overwrite=True, show_progress=False)

    functions = {
        "bare": lambda: world.encode_array(whole, threads=1),
        "one": lambda: run(1),
        "two": lambda: run(2),
        "peer": lambda: make_data(small_lines, folder / "peer", trie),
    }
    seconds = {kind: [] for kind in functions}
    for _ in range(options.rounds):
        for kind, function in functions.items():
            for path in [*shard_files(folder / "own"), *shard_files(folder / "peer")]:
                path.unlink(missing_ok=True)  # giving back its pages is no part of building the next
            seconds[kind].append(seconds_of(function))
    times = {kind: Timing.of(of_kind) for kind, of_kind in seconds.items()}
    speed = {kind: (small_size if kind == "peer" else size) / x.best / 1e6 for kind, x in times.items()}
    row = [name, "\\u escapes" if ascii_only else "UTF-8", f"{size / 1e6:.0f}", f"{lines.stat().st_size / 1e6:.0f}"]
    row += [f"{speed[kind]:.0f}" for kind in ("bare", "one", "two")] + [f"{speed['peer']:.2f}"]
    over_peer = size / small_size * times["one"].speed_over(times["peer"])
    return [*row, times["one"].speed_over(times["bare"]), times["two"].speed_over(times["one"]), f"{over_peer:.0f}"]


COLUMNS = [
    *("text", "written as", "MB of text", "MB of lines", "bare: MB/s", "1 thread: MB/s", "2 threads: MB/s"),
    *("make_data: MB/s", "1 thread / bare", "2 / 1 threads", "1 thread / make_data"),
]
ABOUT = (
    "MB/s of text, the best of {rounds} rounds in which all take turns; ratios are medians of the rounds' own, because "
    "the speed of this machine changes from one second to the next. Documents of {document} characters, one a line "
    "with an id, an address and a nested object beside the text, repeated if there are fewer different ones; of code "
    "there are enough, the English ones are 3 MB of manuals. bare: encode_array of all texts in one piece, one thread: "
    "the roof for one thread, for all that building adds is on top of it: reading, JSON, UTF-8, verifying "
    "the ids, writing and forcing two files to the disk (here a RAM disk: `{folder}`). make_data: one epoch without "
    "a shuffle the way RWKV-LM's make_data.py goes about it, with the World tokenizer of the package rwkv {version}, "
    "on the first {peer:g} MB; no shard is there before; both shards were compared byte for byte."
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=32, help="of text, about")
    parser.add_argument("--peer-megabytes", type=float, default=0.5, help="of text for make_data's way")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="rows whose text's name holds this")
    parser.add_argument("--folder", default="/dev/shm", help="for the files")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args()
    start = header()
    keep_freed_memory()  # as the command does
    world, trie = WorldTokenizer(), TRIE_TOKENIZER(str(WORLD))
    size = int(options.megabytes * 1e6)
    texts = read_texts(6_000_000)
    # all of it different, as far as there is so much
    manuals, library = Path("/usr/share"), Path(sysconfig.get_path("stdlib"))
    for name, paths in (
        ("English (Perl's .pod)", [*manuals.rglob("*.pod"), *manuals.rglob("*.rst")]),
        ("code (Python's library)", library.rglob("*.py")),
    ):
        files = [path for path in paths if path.is_file()]
        texts[name] = read_files(files, size).decode(errors="ignore").encode()
    rows = []
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for source, name in SOURCES.items():
            if source not in texts or options.only not in name:
                continue
            text = texts[source].decode()
            documents = [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
            for ascii_only in (False, True):
                rows.append(bench(name, documents, ascii_only, options, folder, world, trie))
                print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    version = importlib.metadata.version("rwkv")
    about = ABOUT.format(
        rounds=options.rounds,
        document=DOCUMENT,
        folder=options.folder,
        version=version,
        peer=options.peer_megabytes,
    )
    cores = f"{len(os.sched_getaffinity(0))} cores"
    report = "\n\n".join(["# Building shards from JSON lines", start, f"{about} {cores}.", table(COLUMNS, rows)]) + "\n"
    print(report)
    if options.output:
        options.output.write_text(report)


if __name__ == "__main__":
    main()

"""The World tokenizer's speed beside the Rust package and a plain pointer trie in C++, by language.

    python benchmarks/bench_tokenizer.py --output benchmarks/results/amd-epyc_2026-11_tokenizer.md

Encoding and decoding by one thread, two threads beside one, batches, and the time to load. The texts are what this
machine has: Perl's manual, Python's library, C headers, and for other languages the messages of every program's
translations (gettext catalogues). Each text's ids, and the text that they decode to, are compared with the peers'
before anything is timed.
"""

import argparse
import ctypes
import gettext
import importlib.metadata
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyrwkv_tokenizer
from common import ROOT, Timing, header, measure, table

from rwkv_ext import WorldTokenizer
from rwkv_ext._load import native
from rwkv_ext.vocabulary import WORLD

LOCALES = Path("/usr/share/locale")
LANGUAGES = ["fr", "de", "es", "pl", "tr", "vi", "ru", "uk", "el", "he", "ar", "hi", "th", "ja", "ko", "zh_CN"]


class PointerTrie:
    """pointer_trie.cpp, compiled here with -O3 and filled with the World vocabulary."""

    def __init__(self, tokenizer: WorldTokenizer):
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "pointer_trie.so")
            source = ROOT / "benchmarks" / "pointer_trie.cpp"
            subprocess.run(["c++", "-std=c++17", "-O3", "-shared", "-fPIC", source, "-o", library], check=True)
            self.library = ctypes.CDLL(str(library))
        self.library.trie_new.restype = ctypes.c_void_p
        self.library.trie_encode.restype = ctypes.c_size_t
        self.library.trie_encode.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
        self.library.trie_add.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint16]
        self.trie = self.library.trie_new()
        for id in np.flatnonzero(tokenizer.byte_lengths):
            token = tokenizer.decode_bytes([int(id)])
            self.library.trie_add(self.trie, token, len(token), int(id))

    def encode(self, data: bytes) -> np.ndarray:
        ids = np.empty(len(data), np.uint16)
        return ids[: self.library.trie_encode(self.trie, data, len(data), ids.ctypes.data)]


def read_files(paths, size: int) -> bytes:
    """The UTF-8 files among `paths`, sorted, up to `size` bytes."""
    text = ""
    for path in sorted(paths):
        if len(text) >= size:
            break
        try:
            text += path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return text.encode()[:size]


def read_translations(language: str, size: int) -> bytes:
    """The translated messages of every program here, up to `size` bytes."""
    lines = []
    for path in sorted((LOCALES / language / "LC_MESSAGES").glob("*.mo")):
        try:
            with path.open("rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog
        except (OSError, UnicodeDecodeError):
            continue
        lines += [text for key, text in catalogue.items() if key and isinstance(text, str)]
    return "\n".join(lines).encode()[:size]


def read_texts(size: int) -> dict[str, bytes]:
    texts = {
        "English (Perl's .pod)": read_files(Path("/usr/share/perl").rglob("*.pod"), size),
        "code (Python's library)": read_files(Path(sysconfig.get_path("stdlib")).glob("*.py"), size),
        "code (/usr/include/*.h)": read_files(Path("/usr/include").glob("*.h"), size),
    }
    for language in LANGUAGES:
        texts[f"{language} (translations)"] = read_translations(language, size)
    # a cut may lie inside a character, which the Rust package does not take
    texts = {name: text.decode(errors="ignore").encode() for name, text in texts.items()}
    return {name: text for name, text in texts.items() if len(text) >= 200_000}


DOCUMENT = 2000  # characters of each text of a batch


def cut(string: str) -> list[str]:
    return [string[start : start + DOCUMENT] for start in range(0, len(string), DOCUMENT)]


def check(text: bytes, world: WorldTokenizer, trie: PointerTrie, rust) -> np.ndarray:
    """Raise unless all give the same ids and the same text for them; return the ids."""
    ids = world.encode_array(text)
    documents = cut(text.decode())
    packed = world.encode_packed(documents, 2)[0]
    for name, got, expected in (
        ("the pointer trie", trie.encode(text), ids),
        ("pyrwkv-tokenizer", rust.encode(text.decode()), ids),
        ("the list", world.encode(text.decode()), ids),
        ("a second time", world.encode_array(text), ids),
        ("the stream", np.concatenate(encode_chunks(world, text, 4096)), ids),
        ("two threads", world.encode_array(text * 2, threads=2), world.encode_array(text * 2)),
        ("the batch", packed, np.concatenate([world.encode_array(document) for document in documents])),
        ("pyrwkv-tokenizer's batch", np.concatenate(rust.encode_batch(documents)), packed),
    ):
        if not np.array_equal(np.asarray(got, np.uint16), expected):
            raise SystemExit(f"bench_tokenizer: {name} gives other ids")
    if world.decode_bytes(ids) != text or not world.decode(ids) == rust.decode(ids.tolist()) == text.decode():
        raise SystemExit("bench_tokenizer: decoding gives another text")
    return ids


def measure_prepared(functions: dict, rounds: int) -> dict[str, Timing]:
    """As measure(), of functions that make what their timed part, which they return, needs."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, prepare in functions.items():
            run = prepare()
            if name != "first":
                run()  # finds in the caches what it left there, not what another did
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(s) for name, s in seconds.items()}


def speeds(megabytes: float, times: dict[str, Timing], names: Iterable[str] = ()) -> list[str]:
    """Return the best MB/s of each."""
    return [f"{megabytes / times[name].best:.0f}" for name in names or times]


def ratios(times: dict[str, Timing], *pairs: tuple[str, str]) -> list[float]:
    return [times[a].speed_over(times[b]) for a, b in pairs]


def bench_encoding(text: bytes, world: WorldTokenizer, trie: PointerTrie, rust, rounds: int) -> list:
    string = text.decode()

    def first_sight():
        fresh = WorldTokenizer()
        world.encode_array(text)  # so that text and tables are in the caches, as the other functions find them
        return lambda: fresh.encode_array(text)

    functions = {
        "first": first_sight,
        "array": lambda: lambda: world.encode_array(text),
        "trie": lambda: lambda: trie.encode(text),
        "list": lambda: lambda: world.encode(string),
        "rust": lambda: lambda: rust.encode(string),
    }
    times = measure_prepared(functions, rounds)
    pairs = ("first", "trie"), ("array", "trie"), ("first", "rust"), ("array", "rust"), ("list", "rust")
    return [*speeds(len(text) / 1e6, times, ("first", "array", "list", "trie", "rust")), *ratios(times, *pairs)]


def bench_threads(text: bytes, world: WorldTokenizer, rust, rounds: int) -> list:
    """Of a text of 16 MB or more, so that a thread's start is no part of it."""
    text *= -(-16_000_000 // len(text))
    documents = cut(text.decode())
    functions = {
        "one": lambda: world.encode_array(text),
        "two": lambda: world.encode_array(text, threads=2),
        "calls": lambda: list(pool.map(world.encode_array, (text, text))),
        "batch": lambda: world.encode_packed(documents, threads=2),
        "rust": lambda: rust.encode_batch(documents),
    }
    with ThreadPoolExecutor(2) as pool:
        times = measure(functions, rounds, warm=True)
    times["calls"] = Timing.of([seconds / 2 for seconds in times["calls"].rounds])
    pairs = ("two", "one"), ("two", "calls"), ("batch", "rust")
    return [*speeds(len(text) / 1e6, times), *ratios(times, *pairs)]


def bench_decoding(text: bytes, ids: np.ndarray, world: WorldTokenizer, rust, rounds: int) -> list:
    numbers, wide = ids.tolist(), ids.astype(np.int64)
    functions = {
        "array": lambda: world.decode_bytes(ids),
        "int64": lambda: world.decode_bytes(wide),
        "list": lambda: world.decode_bytes(numbers),
        "text": lambda: world.decode(numbers),
        "rust": lambda: rust.decode(numbers),
    }
    times = measure(functions, rounds, warm=True)
    gigabytes = [f"{len(text) / x.best / 1e9:.2f}" for x in times.values()]
    return [*gigabytes, *ratios(times, ("array", "rust"), ("text", "rust"))]


def encode_chunks(world: WorldTokenizer, text: bytes, size: int) -> list[np.ndarray]:
    stream = world.stream_encoder()
    return [*(stream.push(text[at : at + size]) for at in range(0, len(text), size)), stream.flush()]


def bench_streams(text: bytes, world: WorldTokenizer, rounds: int) -> list:
    functions = {
        "whole": lambda: world.encode_array(text),
        "64 KiB": lambda: encode_chunks(world, text, 65536),
        "4 KiB": lambda: encode_chunks(world, text, 4096),
    }
    times = measure(functions, rounds, warm=True)
    return [*speeds(len(text) / 1e6, times), *ratios(times, ("64 KiB", "whole"))]


def bench_loading(rounds: int) -> str:
    functions = {
        "compiled": WorldTokenizer,
        "text": lambda: native().Tokenizer(WORLD.read_bytes(), "World"),
        "rust": pyrwkv_tokenizer.RWKVTokenizer,
    }
    milliseconds = {name: 1e3 * x.best for name, x in measure(functions, rounds, warm=True).items()}
    rows = [[f"{milliseconds[name]:.2f}" for name in functions]]
    return table(["compiled vocabulary: ms", "text parsed: ms", "Rust: ms"], rows)


SECTIONS = {
    "encode": (
        "Encoding",
        "MB/s of text, one thread. first: encode_array by a tokenizer that has encoded nothing yet (its memo is "
        "empty; text and tables are in the caches, as for the others); again: by one that has encoded this text "
        "before; list: encode(str) -> list, again; trie: benchmarks/pointer_trie.cpp, g++ -O3, into a NumPy array; "
        "Rust: pyrwkv-tokenizer, which gives lists alone.",
        [
            *("text", "MB", "bytes a token", "first: MB/s", "again: MB/s", "list: MB/s", "trie: MB/s", "Rust: MB/s"),
            *("first / trie", "again / trie", "first / Rust", "again / Rust", "list / Rust"),
        ],
    ),
    "decode": (
        "Decoding",
        "GB/s of text, one thread. array: decode_bytes(uint16 array); int64: of such an array; list: decode_bytes(list)"
        "; str: decode(list) -> str, as pyrwkv-tokenizer does it.",
        [
            *("text", "MB", "bytes a token", "array: GB/s", "int64: GB/s", "list: GB/s", "str: GB/s", "Rust: GB/s"),
            *("array / Rust", "str / Rust"),
        ],
    ),
    "threads": (
        "Threads",
        "MB/s of the text repeated to 16 MB or more: encode_array(threads=1) and (threads=2); calls: two calls with "
        "threads=1 at once, each of all the text, together: what the machine's two cores give; batch: "
        f"encode_packed(threads=2) of its parts of {DOCUMENT} characters; Rust: encode_batch of the same parts, lists "
        "by as many threads as there are CPUs.",
        [
            *("text", "MB", "bytes a token", "one: MB/s", "two: MB/s", "calls: MB/s", "batch: MB/s", "Rust: MB/s"),
            *("two / one", "two / calls", "batch / Rust"),
        ],
    ),
    "streams": (
        "Text in chunks",
        "MB/s, one thread, again: encode_array of the whole text; stream_encoder() in chunks of 64 KiB and of 4 KiB.",
        ["text", "MB", "bytes a token", "whole: MB/s", "64 KiB: MB/s", "4 KiB: MB/s", "64 KiB / whole"],
    ),
}
ABOUT = (
    "Speeds are the best of {rounds} rounds in which all take turns (9 at most for threads); ratios are medians of the "
    "rounds' own, for this machine is not as fast in one second as in the next. Ids are equal to both peers' and "
    "decode to the text they came from, for every text. Rust: pyrwkv-tokenizer {version} from PyPI. Texts: at most "
    "{size} MB of the files that a row's name says; translations are the messages of every *.mo under "
    "/usr/share/locale/LANGUAGE/LC_MESSAGES."
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=3, help="of each text, at most")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=[""], help="texts whose name begins so")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args()
    start = header()
    loading = bench_loading(options.rounds)
    world, rust = WorldTokenizer(), pyrwkv_tokenizer.RWKVTokenizer()
    trie = PointerTrie(world)
    rows = {section: [] for section in options.sections}
    for name, text in read_texts(int(options.megabytes * 1e6)).items():
        if not name.startswith(tuple(options.only)):
            continue
        ids = check(text, world, trie, rust)
        benches = {
            "encode": lambda text: bench_encoding(text, world, trie, rust, options.rounds),
            "decode": lambda text, ids=ids: bench_decoding(text, ids, world, rust, options.rounds),
            "threads": lambda text: bench_threads(text, world, rust, min(options.rounds, 9)),
            "streams": lambda text: bench_streams(text, world, options.rounds),
        }
        for section in options.sections:
            row = [name, f"{len(text) / 1e6:.1f}", len(text) / len(ids), *benches[section](text)]
            rows[section].append(row)
            print(section, *row, flush=True)
    version = importlib.metadata.version("pyrwkv-tokenizer")
    about = ABOUT.format(rounds=options.rounds, version=version, size=f"{options.megabytes:g}")
    parts = ["# World tokenizer", start, about, "## Loading", loading]
    for section in options.sections:
        title, meaning, columns = SECTIONS[section]
        parts += [f"## {title}", meaning, table(columns, rows[section])]
    report = "\n\n".join(parts) + "\n"
    print(report)
    if options.output:
        options.output.write_text(report)


if __name__ == "__main__":
    main()

"""The World tokenizer's speed beside the Rust package and a plain pointer trie in C++, one thread, by language.

    python benchmarks/bench_tokenizer.py --output benchmarks/results/amd-epyc_2026-11_tokenizer.md

The texts are what this machine has: Perl's manual, Python's library, C headers, and for other languages the messages
of every program's translations (gettext catalogues). Each text's ids are compared with both peers' before it is timed.
"""

import argparse
import ctypes
import gettext
import importlib.metadata
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import pyrwkv_tokenizer
from common import ROOT, header, table

from rwkv_ext import WorldTokenizer

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


def check(text: bytes, world: WorldTokenizer, trie: PointerTrie, rust) -> int:
    """Raise unless all give the same ids; return how many."""
    ids = world.encode_array(text)
    for name, other in (
        ("the pointer trie", trie.encode(text)),
        ("pyrwkv-tokenizer", rust.encode(text.decode())),
        ("the list", world.encode(text.decode())),
        ("a second time", world.encode_array(text)),
    ):
        if not np.array_equal(ids, np.asarray(other, np.uint16)):
            raise SystemExit(f"bench_tokenizer: {name} gives other ids")
    return len(ids)


def best_seconds(functions: dict, rounds: int) -> dict[str, float]:
    """The shortest time of each, taking turns. A function makes what its timed part, which it returns, needs."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, prepare in functions.items():
            run = prepare()
            if name != "first":
                run()  # finds in the caches what it left there, not what another did
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def bench(text: bytes, world: WorldTokenizer, trie: PointerTrie, rust, rounds: int) -> list:
    tokens = check(text, world, trie, rust)
    string = text.decode()

    def first_sight():
        fresh = WorldTokenizer()
        return lambda: fresh.encode_array(text)

    functions = {
        "first": first_sight,
        "array": lambda: lambda: world.encode_array(text),
        "trie": lambda: lambda: trie.encode(text),
        "list": lambda: lambda: world.encode(string),
        "rust": lambda: lambda: rust.encode(string),
    }
    speed = {name: len(text) / seconds / 1e6 for name, seconds in best_seconds(functions, rounds).items()}
    return [
        f"{len(text) / 1e6:.1f}",
        len(text) / tokens,
        *(f"{speed[name]:.0f}" for name in ("first", "array", "list", "trie", "rust")),
        speed["first"] / speed["trie"],
        speed["array"] / speed["trie"],
        speed["first"] / speed["rust"],
        speed["array"] / speed["rust"],
        speed["list"] / speed["rust"],
    ]


COLUMNS = [
    *("text", "MB", "bytes a token", "first: MB/s", "again: MB/s", "list: MB/s", "trie: MB/s", "Rust: MB/s"),
    *("first / trie", "again / trie", "first / Rust", "again / Rust", "list / Rust"),
]
ABOUT = (
    "MB/s of text, one thread, the best of {rounds} rounds in which all take turns; ids equal to both peers' on every "
    "text. first: encode_array by a tokenizer that has encoded nothing yet (its memo is empty); again: by one that has "
    "encoded this text before; list: encode(str) -> list, again; trie: benchmarks/pointer_trie.cpp, g++ -O3, into a "
    "NumPy array; Rust: pyrwkv-tokenizer {version} from PyPI, which gives lists alone. Loading the vocabulary takes "
    "{load:.1f} ms. Texts: at most {size} MB of the files that a row's name says; translations are the messages "
    "of every *.mo under /usr/share/locale/LANGUAGE/LC_MESSAGES."
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=3, help="of each text, at most")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="texts whose name holds this")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args()
    start = header()
    load = best_seconds({"load": lambda: WorldTokenizer}, options.rounds)["load"]
    world, rust = WorldTokenizer(), pyrwkv_tokenizer.RWKVTokenizer()
    trie = PointerTrie(world)
    rows = []
    for name, text in read_texts(int(options.megabytes * 1e6)).items():
        if options.only in name:
            rows.append([name, *bench(text, world, trie, rust, options.rounds)])
            print(*rows[-1], flush=True)
    version = importlib.metadata.version("pyrwkv-tokenizer")
    about = ABOUT.format(rounds=options.rounds, version=version, load=1e3 * load, size=f"{options.megabytes:g}")
    report = "\n\n".join(["# World tokenizer: encoding", start, about, table(COLUMNS, rows)]) + "\n"
    print(report)
    if options.output:
        options.output.write_text(report)


if __name__ == "__main__":
    main()

"""Builds the fuzz targets: each a program of one target, the library's own sources under sanitizers, and a driver.

With clang the driver is its libFuzzer, elsewhere driver.cpp; both take the same options. What is built is kept.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emulator.build import ROOT, compile_object, compiler, compiler_version

FOLDER = ROOT / "tests" / "fuzz"
OUT = ROOT / "build" / "fuzz"
TARGETS = sorted(path.stem for path in FOLDER.glob("*.cpp") if path.stem not in ("driver", "oracle"))
PYTHON_TARGETS = ["index_file"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
WORLD = ROOT / "rwkv_ext" / "vocabulary" / "rwkv_vocab_v20230424.txt"


def makes_libfuzzer(command: str) -> bool:
    """Tell whether a compiler is there and comes with libFuzzer, which is a package of its own in places."""
    source = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    options = ["-fsanitize=fuzzer", "-x", "c++", "-", "-o", os.devnull]
    return (
        bool(shutil.which(command))
        and not subprocess.run([command, *options], input=source, text=True, capture_output=True).returncode
    )


def has_libfuzzer() -> bool:
    return "clang" in compiler_version()


def build(targets=TARGETS, jobs: int = 2) -> dict[str, list[str]]:
    """Return the command that runs each target, with options and folders of inputs to follow."""
    OUT.mkdir(parents=True, exist_ok=True)
    edges = "-fsanitize=fuzzer-no-link" if has_libfuzzer() else "-fsanitize-coverage=trace-pc"
    common = ["-std=c++17", "-Wall", "-Wextra"]
    checked = [*common, "-O1", "-g1", *SANITIZERS, edges, "-Icsrc", f'-DRWKV_WORLD="{WORLD}"']
    library = [*ROOT.glob("csrc/tokenizer/*.cpp"), *ROOT.glob("csrc/data/*.cpp")]
    own = [FOLDER / f"{name}.cpp" for name in ["oracle", *targets]]
    sources = [(source, checked) for source in [*library, *own]]
    if not has_libfuzzer():
        sources.append((FOLDER / "driver.cpp", [*common, "-O2"]))  # its own edges are not counted
    with ThreadPoolExecutor(jobs) as pool:
        compiled = pool.map(lambda pair: compile_object(*pair, OUT), sources)
        objects = {source: str(path) for (source, _), path in zip(sources, compiled)}
    shared = [path for source, path in objects.items() if source.stem not in targets or source.parent != FOLDER]
    return {target: [str(link(target, [*shared, objects[FOLDER / f"{target}.cpp"]]))] for target in targets}


def link(target: str, objects: list[str]) -> Path:
    program = OUT / target
    driver = ["-fsanitize=fuzzer"] if has_libfuzzer() else []
    subprocess.run([compiler(), *SANITIZERS, *driver, *objects, "-o", str(program), "-pthread"], check=True)
    return program


def python_command(target: str) -> list[str]:
    return [sys.executable, str(FOLDER / f"{target}.py")]

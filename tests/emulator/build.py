"""Compile the emulator and the kernels' own sources with the host compiler; what is built is kept under build/emulator.

    build(PLAIN)       tests/emulator/run.cpp with every kernel instance
    build(TSAN)        the same with the main instances alone, so that the compiler has less to do

An object is named by a hash of its flags and of every file that went into it, so a build compiles what changed and
nothing else, and builds of different sources lie side by side.
"""

import hashlib
import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "emulator"
JOBS = 2
COMMON = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off"]
RUNTIME_ONLY = ["-O3", "-fno-tree-loop-distribute-patterns"]  # no calls of memcpy that ThreadSanitizer would see
RUNTIME = ["report", "fiber", "block", "shared_memory", "async_copies", "device", "warp_operations"]


@dataclass(frozen=True)
class Variant:
    """How the kernels are compiled. define tells the runtime, which has no instrumentation, about theirs."""

    name: str
    kernel_flags: tuple[str, ...]
    define: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    command: tuple[str, ...] = ()  # in front of the program
    environment: dict = field(default_factory=dict, hash=False)
    main_instances_only: bool = False


PLAIN = Variant("plain", ("-O2",), ("-fPIC",))  # for a shared library as well (emulated_device.py)
PLAIN_MAIN = replace(PLAIN, main_instances_only=True)
TSAN = Variant(
    "tsan",
    ("-O1", "-g", "-fsanitize=thread"),
    ("-DEMULATOR_TSAN",),
    ("-fsanitize=thread",),
    ("setarch", "-R"),  # this ThreadSanitizer cannot place its shadow under some layouts of the address space
    {"TSAN_OPTIONS": "exitcode=66:report_thread_leaks=0"},
    main_instances_only=True,
)
ASAN = Variant(
    "asan",
    # AddressSanitizer finds null pointers and foreign objects by itself; these checks triple the time to compile.
    ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    + ("-fno-sanitize=null,object-size,vptr,nonnull-attribute,returns-nonnull-attribute",),
    ("-DEMULATOR_ASAN",),
    ("-fsanitize=address,undefined",),
    (),
    {"ASAN_OPTIONS": "detect_leaks=0:exitcode=67", "UBSAN_OPTIONS": "print_stacktrace=1"},
    main_instances_only=True,
)


def compiler():
    return os.environ.get("CXX", "g++")


@cache
def compiler_version():
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def is_main_instance(source: Path) -> bool:
    """bf16, N = 64 of the chunk kernels; fp32 of the kernels that have no other types."""
    return not re.search(r"fp16|fp64|_32\b|_128\b", source.stem)


def kernel_sources(main_only: bool) -> list[Path]:
    host = [x for x in sorted((ROOT / "csrc/cuda").glob("*.cu")) if x.name != "cuda_errors.cu"]  # CUDA's own errors
    instances = sorted((ROOT / "csrc/cuda/instances").glob("*.cu"))
    return [*host, *(x for x in instances if is_main_instance(x) or not main_only)]


def digest(flags, files):
    known = hashlib.sha256(repr((compiler_version(), flags)).encode())
    for file in files:
        known.update(file.encode())
        known.update((ROOT / file).read_bytes())
    return known.hexdigest()[:20]


def dependencies(text):
    """Return the files named in what -MD wrote."""
    return sorted(set(re.sub(r"\\\n", " ", text).split(":", 1)[1].split()))


def name_of(source: Path) -> str:
    return str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(source)


def record_of(source: Path, flags: list[str], folder: Path) -> Path:
    """Return where it is written which files the source included when it was last compiled with these flags."""
    return folder / f"{source.stem}-{hashlib.sha256(repr((name_of(source), flags)).encode()).hexdigest()[:20]}.files"


def compile_object(source: Path, flags: list[str], folder: Path) -> Path:
    source_name, known = name_of(source), record_of(source, flags, folder)
    if known.exists():
        files = known.read_text().split()
        if all((ROOT / x).exists() for x in files):
            existing = folder / f"{source.stem}-{digest(flags, files)}.o"
            if existing.exists():
                return existing
    scratch = folder / f"{source.stem}-{os.getpid()}-{time.monotonic_ns()}"
    started = time.time()
    command = [compiler(), *flags, "-MD", "-MF", f"{scratch}.d", "-x", "c++", "-c", source_name, "-o", f"{scratch}.o"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    files = [x for x in dependencies(Path(f"{scratch}.d").read_text()) if not x.startswith("/usr/")]
    Path(f"{scratch}.d").unlink()
    target = folder / f"{source.stem}-{digest(flags, files)}.o"
    if any((ROOT / x).stat().st_mtime > started for x in files):  # edited meanwhile: belongs to no known content
        target = folder / f"{source.stem}-edited-{time.monotonic_ns()}.o"
    else:
        known.write_text("\n".join(files))
    os.replace(f"{scratch}.o", target)
    return target


def kernel_flags(variant: Variant, first_include: Path | None = None) -> list[str]:
    includes = ["-Itests/emulator", *([f"-I{first_include}"] if first_include else []), "-Icsrc"]
    return [*COMMON, *variant.kernel_flags, *variant.define, *includes]


def depends_on(variant: Variant, source: Path, header: str) -> bool:
    """Tell whether a source that has been built includes csrc/<header>."""
    return f"csrc/{header}" in record_of(source, kernel_flags(variant), OUT / variant.name).read_text().split()


def build(variant: Variant, program: str = "run", *, sources=None, instead: tuple[Path, str] | None = None) -> Path:
    """Return the path of an executable: tests/emulator/<program>.cpp, the runtime and the kernels.

    sources: the kernel sources, when not those of the variant; [] for a program that includes its own.
    instead: (directory, header): the header in this directory stands in for csrc/<header>. Built without it before.
    """
    folder = OUT / variant.name
    folder.mkdir(parents=True, exist_ok=True)
    emulator = ROOT / "tests/emulator"
    runtime = [*COMMON, *RUNTIME_ONLY, *variant.define, "-Itests/emulator", "-Icsrc"]
    if sources is None:
        sources = kernel_sources(variant.main_instances_only)
    jobs = [(emulator / f"{x}.cpp", runtime) for x in RUNTIME]
    jobs += [(emulator / f"{program}.cpp", runtime if sources else kernel_flags(variant))]
    for source in sources:
        changed = instead is not None and depends_on(variant, source, instead[1])
        jobs.append((source, kernel_flags(variant, instead[0] if changed else None)))
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda job: compile_object(*job, folder), jobs))
    names = hashlib.sha256(repr((objects, variant.link_flags)).encode()).hexdigest()[:20]
    target = folder / f"{program}-{names}"
    if not target.exists():
        scratch = folder / f"{program}-{os.getpid()}-{time.monotonic_ns()}"
        # The main instances alone leave the others undefined; a call of one of those ends the program.
        partial = ["-Wl,--unresolved-symbols=ignore-all"] if variant.main_instances_only and sources else []
        command = [compiler(), *variant.link_flags, *partial, "-rdynamic", *map(str, objects), "-ldl"]
        done = subprocess.run([*command, "-o", str(scratch)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        os.replace(scratch, target)
    return target


def run(variant: Variant, program: Path, *arguments, timeout: float = 600) -> subprocess.CompletedProcess:
    command = list(variant.command)
    if command and not shutil.which(command[0]):
        raise RuntimeError(f"{command[0]} (of util-linux) is needed to run the {variant.name} build")
    return subprocess.run(
        [*command, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env={**os.environ, **variant.environment},
    )



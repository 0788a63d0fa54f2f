"""What nvcc makes of the CUDA kernels: registers, spills, and machine instructions, counted without a GPU."""

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "kernel_code"
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v", "-Icsrc"]  # as setup.py compiles them


def nvdisasm() -> str | None:
    try:
        import nvidia
    except ImportError:
        return shutil.which("nvdisasm")
    found = [x for folder in nvidia.__path__ for x in Path(folder).glob("*/bin/nvdisasm")]
    return str(found[0]) if found else shutil.which("nvdisasm")


@cache
def nvcc_release() -> str | None:
    """Return the CUDA version of nvcc, or None without one."""
    if not shutil.which("nvcc"):
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


@dataclass
class Loop:
    """Instructions from the target of a backward branch to the branch, without those of the loops within."""

    first: int
    last: int
    instructions: int = 0
    loops: list["Loop"] = field(default_factory=list)

    def shape(self) -> list:
        return [loop.shape() for loop in self.loops]

    def weighted(self, trips) -> float:
        """Return the instructions of one iteration, where trips[i] is how often loop i runs in it.

        A trip count is a number, or (number, trip counts of the loops within).
        """
        total = self.instructions
        for loop, trip in zip(self.loops, trips, strict=True):
            times, within = trip if isinstance(trip, tuple) else (trip, [0] * len(loop.loops))
            total += times * loop.weighted(within)
        return total


@dataclass
class Kernel:
    name: str
    registers: int
    spilled_bytes: int
    instructions: list[str]
    branches: list[tuple[int, int]]  # (at, to), indices of instructions

    def main_loop(self) -> Loop:
        """Return the largest loop. Two backward branches to one place are one loop."""
        ends = {}
        for at, to in self.branches:
            if to < at:
                ends[to] = max(at, ends.get(to, at))
        spans = sorted(ends.items(), key=lambda x: (x[0], -x[1]))
        loops: list[Loop] = []
        stack: list[Loop] = []
        for first, last in spans:
            while stack and stack[-1].last < first:
                stack.pop()
            loop = Loop(first, last, last - first + 1)
            if stack:
                stack[-1].loops.append(loop)
                stack[-1].instructions -= loop.instructions
            else:
                loops.append(loop)
            stack.append(loop)
        return max(loops, key=lambda x: x.last - x.first)


def readable(symbol: str) -> str:
    """wkv_forward_kernel<BFloat16, float, 64, false> for the mangled name."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    return short(name)


def short(name: str) -> str:
    return re.sub(r"rwkv::|^void |\(.*\)$", "", name)


def included(source: Path) -> list[Path]:
    """Return the source and the project's headers that it includes, directly or not."""
    found, waiting = [], [source]
    while waiting:
        file = waiting.pop()
        found.append(file)
        names = re.findall(r'^#include "(.+)"', file.read_text(), flags=re.M)
        waiting += [x for x in (ROOT / "csrc" / name for name in names) if x not in found + waiting]
    return sorted(found)


def compile_for(source: Path, arch: str) -> Path:
    """Return the cubin; what ptxas said lies beside it."""
    known = hashlib.sha256(repr((FLAGS, arch, nvcc_release())).encode())
    for file in included(source):
        known.update(file.read_bytes())
    OUT.mkdir(parents=True, exist_ok=True)
    cubin = OUT / f"{source.stem}-{arch}-{known.hexdigest()[:20]}.cubin"
    if not cubin.exists():
        target = f"-gencode=arch=compute_{arch[3:]},code={arch}"
        scratch = cubin.with_suffix(".part")
        command = ["nvcc", *FLAGS, target, "-cubin", str(source), "-o", str(scratch)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        cubin.with_suffix(".ptxas").write_text(done.stderr)
        scratch.rename(cubin)
    return cubin


def resources(ptxas: str) -> dict[str, tuple[int, int]]:
    """Return symbol -> (registers, spilled bytes) from ptxas -v."""
    found = {}
    for part in ptxas.split("Compiling entry function '")[1:]:
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        found[part.split("'")[0]] = int(re.search(r"Used (\d+) registers", part)[1]), int(stores) + int(loads)
    return found


def kernels_of(source: Path, arch: str) -> dict[str, Kernel]:
    cubin = compile_for(source, arch)
    text = subprocess.run([nvdisasm(), str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = {}
    used = resources(cubin.with_suffix(".ptxas").read_text())
    for part in re.split(r"^\t\.section\t\.text\.", text, flags=re.M)[1:]:
        symbol = part.split(",")[0]
        if symbol not in used:
            continue
        instructions, labels, jumps = [], {}, []
        for line in part.splitlines():
            if label := re.match(r"(\.L_\S+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                if target := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1]):
                    jumps.append((len(instructions), target[1]))
                instructions.append(instruction[1])
        branches = [(at, labels[to]) for at, to in jumps if to in labels]
        name = readable(symbol)
        kernels[name] = Kernel(name, *used[symbol], instructions, branches)
    return kernels

"""What every benchmark shares: timing with spread, a header that names the machine and the build, Markdown output."""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent


class Timing(NamedTuple):
    median: float  # seconds
    best: float
    worst: float
    rounds: tuple[float, ...] = ()

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), tuple(seconds))

    def speed_over(self, other: "Timing") -> float:
        """Return how many times as fast as the other this is: the median of what each round says.

        The two of a round were timed one after the other, while the machine was as fast for both. The best times of
        each may lie seconds apart, and the longer of two functions is less likely to meet a quiet moment.
        """
        return statistics.median(b / a for a, b in zip(self.rounds, other.rounds, strict=True))

    def __str__(self):
        return f"{1e3 * self.median:.1f} ({1e3 * self.best:.1f} .. {1e3 * self.worst:.1f})"


def measure(
    functions: dict[str, Callable[[], object]], repeats: int = 7, cpu_time: bool = False, warm: bool = False
) -> dict[str, Timing]:
    """Time every function once per round, after one round of warm-up.

    Taking turns means that a load from outside falls on all of them: their ratios hold where single times do not.
    cpu_time counts the CPU time of this thread instead of the time passed, which holds on a busy machine, but makes
    sense with one thread only. warm runs each function once untimed before it is timed, so that it finds in the caches
    what it left there and not what another did.
    """
    if cpu_time and torch.get_num_threads() > 1:
        raise ValueError(f"measure: cpu_time needs one thread, got {torch.get_num_threads()}; use --threads 1")
    clock = time.thread_time if cpu_time else time.perf_counter
    seconds = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            if warm:
                function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(clock() - start)
    return {name: Timing.of(s) for name, s in seconds.items()}


def header() -> str:
    """Return the lines every report starts with: date, machine, versions, commit, threads, load, command."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"):
        commit += " with local changes"
    lines = [
        f"- date: {time.strftime('%Y-%m-%d')}",
        f"- device: {device()}",
        f"- torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}",
        f"- commit: {commit}",
        f"- threads: {torch.get_num_threads()}, load average before the run: {_load():.1f}",
        f"- command: `python {' '.join(sys.argv)}`",
    ]
    return "\n".join(lines)


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    family = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("cpu family")), "?")
    return f"{cpu} (family {family}), {torch.get_num_threads()} threads"


def table(columns: list[str], rows: list[list]) -> str:
    """Return a Markdown table; floats get two decimals."""
    cells = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _load() -> float:
    path = Path("/proc/loadavg")
    return float(path.read_text().split()[0]) if path.exists() else float("nan")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or ("unknown" if done.returncode else "")

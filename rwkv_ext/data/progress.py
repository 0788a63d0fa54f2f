"""Progress of a long run over files: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_PER_LINE = 10  # where there is no terminal


@contextmanager
def show_progress(what: str, total: int, show: bool = True) -> Iterator["Report"]:
    """Yield a Report of `total` bytes to read, 0 if nobody knows how many."""
    if not show:
        yield Report(what, total)
    elif sys.stderr.isatty():
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}")]
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            yield _Bar(what, total, bar)
    else:
        yield _Lines(what, total)


class Report:
    """Says nothing itself; counts."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.begin, self.skipped = what, total, time.monotonic(), 0

    def skip(self, done: int) -> None:
        """Say that `done` bytes were read by an earlier run."""
        self.begin, self.skipped = time.monotonic(), done

    def update(self, done: int, status: str) -> None:
        """Say that `done` bytes are read, and what that gave."""
        self.show(done, f"{self._speed(done)}, {status}")

    def show(self, done: int, status: str) -> None:
        pass

    def note(self, text: str) -> None:
        """Print a sentence."""

    def seconds_left(self, done: int) -> float | None:
        passed = time.monotonic() - self.begin
        if done <= self.skipped or not self.total:
            return None
        return passed * max(0, self.total - done) / (done - self.skipped)

    def _speed(self, done: int) -> str:
        whole = f" of {self.total / 1e6:,.1f}" if self.total else ""
        passed = time.monotonic() - self.begin
        speed = f", {(done - self.skipped) / 1e6 / passed:,.0f} MB/s" if done > self.skipped and passed else ""
        return f"{done / 1e6:,.1f}{whole} MB{speed}"


class _Lines(Report):
    def __init__(self, what: str, total: int):
        super().__init__(what, total)
        self.next_line = time.monotonic() + SECONDS_PER_LINE

    def show(self, done: int, status: str) -> None:
        if time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SECONDS_PER_LINE
            left = self.seconds_left(done)
            left = "" if left is None else f", {_duration(left)} left"
            self.note(f"{self.what}: {status}{left}")

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Bar(Report):
    def __init__(self, what: str, total: int, bar: Progress):
        super().__init__(what, total)
        self.bar, self.task = bar, bar.add_task(what, total=total or None, status="")

    def show(self, done: int, status: str) -> None:
        self.bar.update(self.task, completed=done, status=status)

    def note(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {round(seconds) % 60:02d} s" if minutes else f"{seconds:.0f} s"

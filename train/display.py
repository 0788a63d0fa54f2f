"""What the person at the screen sees: a live panel on a terminal, one line every few steps elsewhere."""

import sys
from dataclasses import dataclass

VISIBLE_WAIT = 0.01  # of a step; less is not worth a word


@dataclass
class Reading:
    """The numbers shown after a step; None where they are not known."""

    step: int
    tokens: int
    total_tokens: int
    total_steps: int
    loss: float
    rate: float
    grad_norm: float
    tokens_per_second: float
    mfu: float | None
    seconds_left: float | None
    data_wait: float
    """Share of the step that this rank waited for its samples."""

    def line(self) -> str:
        """Format everything on one line."""
        steps = f"{self.step}/{self.total_steps}" if self.total_steps else f"{self.step}"
        return (
            f"step {steps}  loss {self.loss:.4f}  lr {self.rate:.2e}  grad norm {self.grad_norm:.3f}  "
            f"{self.tokens_per_second:,.0f} tokens/s  MFU {_percent(self.mfu)}  left {clock(self.seconds_left)}"
            + (f"  waiting for data {_percent(self.data_wait)}" if self.data_wait >= VISIBLE_WAIT else "")
        )


def clock(seconds: float | None) -> str:
    """Format seconds as h:mm:ss, or ? if unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f}%"


class Display:
    """Shows a run on rank 0; on the other ranks every method does nothing."""

    def __init__(self, active: bool, every: int) -> None:
        self._active, self._every = active, every
        self._live = None
        self._bar = None
        self._validation = ""
        if active and sys.stdout.isatty():
            self._start_panel()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        elif self._active:
            print(text, flush=True)

    def step(self, reading: Reading) -> None:
        """Show one optimizer step."""
        if self._live is not None:
            self._bar.update(self._task, completed=reading.tokens, total=reading.total_tokens or None)
            self._live.update(self._panel(reading))
        elif self._active and (reading.step % self._every == 0 or reading.step in (1, reading.total_steps)):
            print(reading.line(), flush=True)

    def validation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        """Show a validation."""
        bits = "" if bits_per_byte is None else f"  {bits_per_byte:.4f} bits per byte"
        self._validation = f"held-out text at step {step}: loss {loss:.4f}{bits}"
        self.note(self._validation)

    def close(self) -> None:
        """Leave the last panel on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _start_panel(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(bar_width=None))
        self._bar = Progress(*columns, expand=True)
        self._task = self._bar.add_task("tokens", total=None)
        self._live = Live("starting", console=Console(), refresh_per_second=4)
        self._live.start()

    def _panel(self, reading: Reading):
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table

        numbers = Table.grid(padding=(0, 2), expand=True)
        for _ in range(4):
            numbers.add_column()
        steps = f"{reading.step:,}" + (f" of {reading.total_steps:,}" if reading.total_steps else "")
        numbers.add_row("step", steps, "tokens seen", f"{reading.tokens:,}")
        numbers.add_row("loss", f"[bold]{reading.loss:.4f}[/]", "learning rate", f"{reading.rate:.2e}")
        numbers.add_row("grad norm", f"{reading.grad_norm:.3f}", "tokens/s", f"{reading.tokens_per_second:,.0f}")
        numbers.add_row("MFU", _percent(reading.mfu), "time left", clock(reading.seconds_left))
        if reading.data_wait >= VISIBLE_WAIT:
            numbers.add_row("waiting for data", _percent(reading.data_wait), "", "")
        return Panel(Group(numbers, self._bar), title="training", subtitle="Ctrl-C saves and stops", expand=True)

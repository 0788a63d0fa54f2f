"""Ctrl-C and SIGTERM: the first asks the loop to save and stop, a later one quits at once."""

import os
import signal
import sys
import time


class Interrupt:
    """Context manager that turns SIGINT and SIGTERM into `requested`.

    A terminal's Ctrl-C reaches every rank and torchrun, which then sends a signal of its own: signals that follow
    within a second are therefore one request, and later ones mean "now".
    """

    SAME_REQUEST_SECONDS = 1.0

    def __init__(self, announce: bool) -> None:
        self.requested = False
        self._announce = announce
        self._first = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
            if self._announce:
                # os.write: print may be interrupted inside itself.
                os.write(2, b"\nStopping: the checkpoint is saved after this step. Ctrl-C again quits at once.\n")
        elif time.monotonic() - self._first > self.SAME_REQUEST_SECONDS:
            if self._announce:
                os.write(2, b"\nQuit without saving.\n")
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h")  # the live panel hides the cursor
            os._exit(128 + number)

"""Ctrl-C and SIGTERM: the first asks the loop to save and stop, a later one quits at once."""

import os
import signal
import socket
import sys
import threading
import time


class Interrupt:
    """Context manager that turns SIGINT and SIGTERM into `requested`.

    A terminal's Ctrl-C reaches every rank and torchrun, which then sends a signal of its own: signals that follow
    within a second are therefore one request, and later ones mean "now". What counts is when a signal arrives, which a
    thread notes: Python runs the handler only when the main thread is back from a long backward pass.
    """

    SAME_REQUEST_SECONDS = 1.0

    def __init__(self, announce: bool) -> None:
        self.requested = False
        self._announce = announce
        self._arrivals: list[float] = []
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        self._inbox, outbox = socket.socketpair()
        outbox.setblocking(False)
        self._outbox = outbox  # the interpreter writes a byte here as each signal arrives
        self._previous_wakeup = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._note_arrivals, daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._outbox.close()  # ends the thread

    def _note_arrivals(self) -> None:
        with self._inbox:
            while self._inbox.recv(1):
                self._arrivals.append(time.monotonic())

    def _handle(self, number: int, frame: object) -> None:
        if not self.requested:
            self.requested = True
            if self._announce:
                # os.write: print may be interrupted inside itself.
                os.write(2, b"\nStopping: the checkpoint is saved after this step. Ctrl-C again quits at once.\n")
        elif self._arrivals and self._arrivals[-1] - self._arrivals[0] > self.SAME_REQUEST_SECONDS:
            if self._announce:
                os.write(2, b"\nQuit without saving.\n")
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h")  # the live panel hides the cursor
            os._exit(128 + number)

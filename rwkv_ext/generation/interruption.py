"""uninterrupted: Ctrl-C waits until a change that must be whole is whole."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def uninterrupted():
    """Hold SIGINT back inside the with statement; at its end it is raised, and does what it would have done.

    Only in the main thread, where Python delivers signals; elsewhere nothing can interrupt. A handler that was not
    installed from Python is left alone.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    came = []
    previous = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if came:
            signal.raise_signal(signal.SIGINT)

"""Whether work in one thread lets the others run."""

import threading


def turns_beside(work) -> int:
    """Call work() in a thread; return how often this one got to run before its end: never, if it kept Python's lock."""
    started, finished = threading.Event(), threading.Event()

    def run():
        started.set()
        work()
        finished.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    turns = 0
    while not finished.wait(0.001):
        turns += 1
    thread.join()
    return turns

"""run_until_killed: a function in a process of its own that dies as by kill -9, wherever a test wants it."""

import os
import signal
import traceback


class Step:
    """Counts what changes files; the process kills itself before number `fatal`, counted from 1."""

    def __init__(self, fatal: int | None):
        self.fatal, self.done = fatal, 0

    def before(self, owner, name: str) -> None:
        """Let every call of owner.name be a step."""
        function = getattr(owner, name)

        def counted(*arguments, **options):
            self.done += 1
            if self.done == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        setattr(owner, name, counted)


def run_until_killed(function, *arguments) -> bool:
    """Call function(*arguments) in a child; return whether it came to its end, False if the child was killed."""
    child = os.fork()
    if not child:
        status = 1
        try:
            function(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the child failed; its traceback is above"
    return True

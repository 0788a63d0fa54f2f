"""in_order: work done by several threads, its results in the order of the items."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def in_order(work: Callable, numbered: Iterable[tuple], threads: int) -> Iterator[tuple]:
    """Yield (number, work(item)) for each (number, item), in order; `threads` work at once, one item waits for each.

    An error, of `work` or of the iterable, is raised in its turn.
    """
    if threads == 1:
        for number, item in numbered:
            yield number, work(item)
        return
    items, error = iter(numbered), None
    pending: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                try:
                    number, item = next(items)
                except StopIteration:
                    break
                except Exception as failure:
                    error = failure
                    break
                pending.append((number, pool.submit(work, item)))
                del item
                if len(pending) >= 2 * threads:
                    number, future = pending.popleft()
                    yield number, future.result()
            while pending:
                number, future = pending.popleft()
                yield number, future.result()
            if error:
                raise error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

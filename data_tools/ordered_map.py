"""Work in a pool whose results come in order, with bounded memory: what sharding and extraction share."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def ordered_map(
    pool: Executor | None, function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """`map` in order over a pool with at most `ahead` items in flight, so that a corpus is never read into memory."""
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

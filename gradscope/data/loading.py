"""Making the next batches in threads while the present one is used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

from gradscope.errors import UsageError

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make(step)` for one step after another, the following `depth` steps already under way in `workers` threads.

    `make` must depend on the step alone and must bear being called from several threads and for steps that
    nobody takes, past the end too: then what `take` returns depends neither on `depth` nor on `workers`.
    With depth 0 there are no threads. Up to `depth` finished results are held in memory.

    A context manager: leaving it closes. Raises UsageError for a negative depth or no workers.
    """

    def __init__(self, make: Callable[[int], T], *, depth: int, workers: int) -> None:
        if depth < 0:
            raise UsageError(f"depth is {depth}; it must be at least 0, the number of batches made in advance")
        if workers < 1:
            raise UsageError(f"workers is {workers}; it must be at least 1 thread")
        self._make = make
        self._depth = depth
        self._started: dict[int, Future[T]] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="gradscope-ahead") if depth else None
        self._lock = threading.Lock()
        self._closed = False

    def take(self, step: int) -> T:
        """`make(step)`; any step may be asked for, an exception of `make` is raised here.

        Results under way for steps outside of step + 1..step + depth are dropped. Raises RuntimeError after
        `close`.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("Ahead.take after close: make another one")
            wanted = self._started.pop(step, None)
            following = range(step + 1, step + 1 + self._depth)
            for other in [other for other in self._started if other not in following]:
                self._started.pop(other).cancel()
            if self._pool is not None:
                for other in following:
                    if other not in self._started:
                        self._started[other] = self._pool.submit(self._make, other)
        if wanted is None:
            return self._make(step)
        return wanted.result()

    def close(self) -> None:
        """Drop what has not begun and wait for what has. A second call does nothing."""
        with self._lock:
            self._closed = True
            self._started.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

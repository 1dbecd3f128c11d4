"""Stop at a safe point: turn SIGINT and SIGTERM into a flag that a loop looks at between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from gradscope.errors import Interrupted


class StopFlag:
    """Context manager; `signal` is the number of the first signal received, else None.

    A SIGINT after another signal interrupts at once. Outside the main thread, where Python allows no handlers,
    it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:  # a launcher may send SIGTERM more than once while the last cells are saved
            raise KeyboardInterrupt

    def raise_if_set(self, message: str) -> None:
        """Raise Interrupted with exit code 128 + signal when a signal has come."""
        if self.signal is not None:
            raise Interrupted(message, exit_code=128 + self.signal)

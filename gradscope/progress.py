"""Progress on stderr: a bar on a terminal, otherwise one plain line at most every 30 seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType

PLAIN_SECONDS = 30.0


class Progress:
    """Context manager; `update(fraction, text)` may be called as often as one likes.

    `quiet` shows nothing. Without a terminal (a batch job's log) the first line comes at once, later ones at
    most every 30 seconds, each with the time left at the present speed.
    """

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title, self.quiet = title, quiet
        self.started = time.monotonic()
        self.shown = -PLAIN_SECONDS
        self.first: float | None = None
        self._bar: object | None = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=False)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=1.0, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.update(self._task, completed=1.0)  # type: ignore[attr-defined]
            self._bar.stop()  # type: ignore[attr-defined]

    def update(self, fraction: float, text: str) -> None:
        """Show that `fraction` in [0, 1] is done, with one line of news."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, text=text)  # type: ignore[attr-defined]
            return
        now = time.monotonic()
        if self.first is None:
            self.first = fraction
        if now - self.shown < PLAIN_SECONDS:
            return
        self.shown = now
        done = fraction - self.first
        left = f"  eta {_minutes((1 - fraction) * (now - self.started) / done)}" if done > 0 else ""
        say(f"{time.strftime('%H:%M:%S')} {self.title} {fraction:4.0%}  {text}{left}")

    def note(self, text: str) -> None:
        """A line of its own that stays, whenever it comes; also without a bar."""
        if self.quiet:
            return
        line = f"{time.strftime('%H:%M:%S')} {self.title}       {text}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)  # type: ignore[attr-defined]
            return
        say(line)


def say(line: str) -> None:
    """Write a line to stderr; where that cannot be (a full disk, a closed pipe), it is lost and nothing stops."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{line}\n")  # in one piece, for lines come from several threads
            sys.stderr.flush()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f}s" if seconds < 90 else f"{seconds / 60:.0f}m"

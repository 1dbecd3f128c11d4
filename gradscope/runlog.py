"""What a training run writes down while it runs: one JSON object a line, and TensorBoard's files where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gradscope.errors import UsageError, WriteError
from gradscope.files import write_text
from gradscope.progress import say

COUNTED = ("step", "units", "samples", "seconds")  # what rows have as numbers
LOG_FILE = "log.jsonl"
SCHEDULE_FILE = "schedule.json"  # what an online run ran, to be used again
FOLLOWED_FILE = "followed.json"  # the schedule that a run follows, or ran
SCALARS = ("loss", "lr", "accuracy", "samples_per_second", "units")


class RunLog:
    """Rows of a run, in memory and in `log.jsonl`; the file is written whole, so it is never half a row.

    `tensorboard`: also write event files to `out/tensorboard`, with optimizer steps on the axis. Raises UsageError
    where the package tensorboard is missing.
    """

    def __init__(self, out: Path, *, tensorboard: bool = False) -> None:
        self.out, self.rows = out, list[dict[str, Any]]()
        self._make_events = _writer() if tensorboard else None
        self._events: Any = None

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._make_events is not None:
            self._with_events(lambda events: _add_scalars(events, row))

    def write(self) -> None:
        write_text(self.out / LOG_FILE, "".join(json.dumps(row) + "\n" for row in self.rows))
        if self._events is not None:
            self._with_events(lambda events: events.flush())

    def load(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take up the rows of an earlier part of the run."""
        self.rows = list(rows)

    def close(self) -> None:
        if self._events is not None:
            self._with_events(lambda events: events.close())

    def _with_events(self, action: Callable[[Any], None]) -> None:
        """Do something with the event files. Where they cannot be written there are no more of them; that is told."""
        assert self._make_events is not None
        folder = self.out / "tensorboard"
        try:
            self._events = self._events or self._make_events(folder)
            action(self._events)
        except OSError as error:
            say(f"warning: {WriteError.of(folder, error)}; going on without event files, {LOG_FILE} has the numbers")
            self._make_events = self._events = None


def read_log(out: Path) -> list[dict[str, Any]]:
    """Rows of a run's `log.jsonl`. Raises UsageError when there is none."""
    path = out / LOG_FILE
    if not path.is_file():
        raise UsageError(f"{path}: no training log; give a folder that `gradscope train --out` wrote")
    try:
        rows = [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, row in enumerate(rows, 1):
            for name in COUNTED:
                if not isinstance(row.get(name, 0), int | float):
                    raise ValueError(f"row {number}: {name} is {row[name]!r}")
        return rows
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{path}: not a training log of gradscope ({error}); remove it or name another folder"
        ) from error


def _add_scalars(events: Any, row: dict[str, Any]) -> None:
    for name in SCALARS:
        if name in row:
            events.add_scalar(name, row[name], row["step"])


def _writer() -> Callable[[Path], Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs the package tensorboard (pip install tensorboard); without it log.jsonl has the same "
            "numbers"
        ) from error
    return SummaryWriter

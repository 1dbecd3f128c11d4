"""The project's exceptions: each is a user's error, told in one to three lines, with an exit code."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass


class GradscopeError(Exception):
    """Something the user can put right; the message names the argument, the value and the cure."""

    exit_code = 1


class UsageError(GradscopeError, ValueError):
    """A value that was asked for cannot be: wrong name, wrong form, out of range."""

    exit_code = 2


class ScheduleError(GradscopeError, ValueError):
    """A schedule (file or value) is not valid; the message names the field."""


class WriteError(GradscopeError):
    """A file that could not be written; what stood there before is as it was."""

    @classmethod
    def of(cls, path: str | os.PathLike[str], error: OSError) -> WriteError:
        """The error in one line: the file, the system's reason, the cure."""
        reason = error.strerror or str(error).splitlines()[0][:80]
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "choose a folder with room, or make room and run the same command again" if full else "choose a folder"
        return cls(f"{os.fspath(path)}: cannot be written ({reason}); {cure}{'' if full else ' you may write to'}")


@dataclass(frozen=True)
class Change:
    """A change of one constraint that makes a question feasible: its name in `Constraints`, and the value to set.

    `value` None: the constraint has to go; a text: what is to be allowed as well. `budget`: the largest one for which
    nothing else needs to change, None where the budget does not matter.
    """

    name: str
    value: float | str | None = None
    budget: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return self.name
        text = f"{self.name} by {self.value}" if isinstance(self.value, str) else f"{self.name} to {self.value:.15g}"
        return text + ("" if self.budget is None else f" (or lower the budget to {self.budget:.15g})")


class InfeasibleError(GradscopeError):
    """No schedule satisfies the constraints or the budget.

    `smallest` is the smallest feasible budget in units where the budget is what fails, else None. `changes` are the
    smallest changes of constraints that help, each alone.
    """

    exit_code = 3

    def __init__(self, message: str, smallest: float | None = None, changes: Sequence[Change] = ()) -> None:
        super().__init__(message)
        self.smallest, self.changes = smallest, tuple(changes)

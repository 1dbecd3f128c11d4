"""The project's exceptions: each is a user's error, told in one to three lines, with an exit code."""

from __future__ import annotations


class GradscopeError(Exception):
    """Something the user can put right; the message names the argument, the value and the cure."""

    exit_code = 1


class UsageError(GradscopeError, ValueError):
    """A value that was asked for cannot be: wrong name, wrong form, out of range."""

    exit_code = 2


class ScheduleError(GradscopeError, ValueError):
    """A schedule (file or value) is not valid; the message names the field."""


class InfeasibleError(GradscopeError):
    """No schedule satisfies the constraints or the budget.

    `smallest` is the smallest feasible budget in units where the budget is what fails, else None.
    """

    exit_code = 3

    def __init__(self, message: str, smallest: float | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest

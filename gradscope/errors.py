"""Errors of the measuring and training half; the base class and the exit codes are the schedulers'."""

from __future__ import annotations

from schedulers.errors import GradscopeError, InfeasibleError, ScheduleError, UsageError, WriteError


class DataError(GradscopeError):
    """Data that cannot be found, read or trusted; the message names the file and the cure."""


class BusyError(GradscopeError):
    """Another process is writing the same output; the message names it."""


class CheckpointError(GradscopeError):
    """A checkpoint, or a folder of them, that cannot be used; the message names the file and the cure."""


class CubeError(GradscopeError):
    """A cube file that cannot be used as asked; the message names the file and the cure."""


class TaskError(GradscopeError):
    """A user's task that breaks its contract; the message names the method or parameter and the cure."""


class NonFiniteError(GradscopeError):
    """A loss or gradient that is NaN or infinite."""


class RankError(GradscopeError):
    """Another process of a distributed job is gone or does not answer."""


class Interrupted(GradscopeError):
    """A signal asked the run to stop; everything finished is saved. Exit code 130 (SIGINT) or 143 (SIGTERM)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


__all__ = [
    "BusyError",
    "CheckpointError",
    "CubeError",
    "DataError",
    "GradscopeError",
    "InfeasibleError",
    "Interrupted",
    "NonFiniteError",
    "RankError",
    "ScheduleError",
    "TaskError",
    "UsageError",
    "WriteError",
]

"""gradscope: what cheaper gradients of a Vision Transformer are worth, and when to use which.

Measure with `profile`, decide with `optimize`, run what `load_schedule` returns; a user's own model needs a `Task`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradscope.adaptive import AdaptiveController, LoopTask
    from gradscope.cube import open_cube, profile_of, save_cube
    from gradscope.merge import merge_cubes
    from gradscope.profile_options import ProfileOptions
    from gradscope.profiler import profile
    from gradscope.task import Checkpoint, Task
    from schedulers import (
        AdaptiveRule,
        Constraints,
        Decay,
        Grid,
        Schedule,
        Strategy,
        compare_schedules,
        load_schedule,
        optimize,
        predict,
        smallest_budget,
    )

_HOMES = {
    "AdaptiveController": "gradscope.adaptive",
    "AdaptiveRule": "schedulers",
    "Checkpoint": "gradscope.task",
    "Constraints": "schedulers",
    "Decay": "schedulers",
    "Grid": "schedulers",
    "LoopTask": "gradscope.adaptive",
    "ProfileOptions": "gradscope.profile_options",
    "Schedule": "schedulers",
    "Strategy": "schedulers",
    "Task": "gradscope.task",
    "compare_schedules": "schedulers",
    "load_schedule": "schedulers",
    "merge_cubes": "gradscope.merge",
    "open_cube": "gradscope.cube",
    "optimize": "schedulers",
    "predict": "schedulers",
    "profile": "gradscope.profiler",
    "profile_of": "gradscope.cube",
    "save_cube": "gradscope.cube",
    "smallest_budget": "schedulers",
}

__all__ = [
    "AdaptiveController",
    "AdaptiveRule",
    "Checkpoint",
    "Constraints",
    "Decay",
    "Grid",
    "LoopTask",
    "ProfileOptions",
    "Schedule",
    "Strategy",
    "Task",
    "compare_schedules",
    "load_schedule",
    "merge_cubes",
    "open_cube",
    "optimize",
    "predict",
    "profile",
    "profile_of",
    "save_cube",
    "smallest_budget",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use, so that `import gradscope` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gradscope' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

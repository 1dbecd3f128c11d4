"""What a schedule must keep, and what that means on a grid of strategies."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schedulers.counts import exact
from schedulers.errors import UsageError
from schedulers.profile import Profile
from schedulers.strategy import Grid, Strategy

BoolArray = NDArray[np.bool_]
COST = "cost"


@dataclass(frozen=True)
class Constraints:
    """What a schedule must keep; the defaults constrain nothing, and all can be combined.

    allowed: the strategies to choose from (None: all). monotone: names of axes along which strategies
    only move towards the reference's position, and "cost" for a cost per sample that never falls.
    max_switches: changes of strategy. min_dwell: shortest stage, the last one included, as a fraction
    of the budget. final_reference: last fraction of the budget that must run the reference; it
    and min_dwell are rounded up to whole slices. max_seconds: seconds
    that the whole budget may take, by the profile's measured seconds per sample. max_memory: bytes per sample that
    a strategy may keep for its backward pass, by the profile's measured memory.
    They bind a stage's main strategy; its exploration obeys `allowed` and `max_memory`, and is counted in seconds.
    Raises UsageError for values out of range.
    """

    allowed: tuple[Strategy, ...] | None = None
    monotone: tuple[str, ...] = ()
    max_switches: int | None = None
    min_dwell: float = 0.0
    final_reference: float = 0.0
    max_seconds: float | None = None
    max_memory: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.monotone, str):
            raise UsageError(f"monotone={self.monotone!r} must be a tuple of names, as in ({self.monotone!r},)")
        if self.allowed is not None:
            object.__setattr__(self, "allowed", tuple(self.allowed))
            if not self.allowed:
                raise UsageError("allowed is empty; name at least one strategy, or leave it out to allow all")
        object.__setattr__(self, "monotone", tuple(self.monotone))
        if self.max_switches is not None and self.max_switches < 0:
            raise UsageError(f"max_switches={self.max_switches} must be at least 0")
        for name in ("min_dwell", "final_reference"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UsageError(f"{name}={value} is not a fraction of the budget in [0, 1]")
        for name, unit in (("max_seconds", "seconds"), ("max_memory", "bytes")):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name}={value} must be a positive number of {unit}")

    def active(self) -> tuple[str, ...]:
        """What is constrained, each by the text in which an error message asks to relax it."""
        names = [f"monotone={name}" for name in self.monotone]
        unset = {f.name: f.default for f in fields(self) if f.name != "monotone"}
        return (*names, *(name for name, free in unset.items() if getattr(self, name) != free))

    def without(self, names: tuple[str, ...]) -> Constraints:
        """These constraints less those named as `active` names them."""
        unset = {f.name: f.default for f in fields(self) if f.name in names}
        monotone = tuple(name for name in self.monotone if f"monotone={name}" not in names)
        changes: dict[str, Any] = {"monotone": monotone, **unset}
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as a schedule's file holds them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["allowed"] = None if self.allowed is None else [str(strategy) for strategy in self.allowed]
        values["monotone"] = list(self.monotone)
        return values


UNCONSTRAINED = Constraints()


def on_grid(constraints: Constraints, profile: Profile) -> Constraints:
    """The constraints with strategies as the grid spells them.

    Raises UsageError for names and strategies that are not on it, and for limits on what was not measured.
    """
    grid = profile.grid
    for name in constraints.monotone:
        if name != COST and name not in grid.axes:
            raise UsageError(f"monotone={name!r} is neither cost nor one of the axes {', '.join(grid.axes)}")
    for name, values in (("max_seconds", profile.seconds), ("max_memory", profile.memory)):
        if getattr(constraints, name) is not None and (values is None or not np.isfinite(values).any()):
            raise UsageError(
                f"{name} asks for measured {name.removeprefix('max_')} per sample, which the profile does not hold; "
                "measure them with `gradscope cost CKPT_DIR --cube cube.nc`"
            )
    if constraints.allowed is None:
        return constraints
    return replace(constraints, allowed=tuple(grid.check(strategy) for strategy in constraints.allowed))


def allowed_strategies(profile: Profile, constraints: Constraints) -> BoolArray:
    """(C,): allowed by name and memory, their cost known and, where seconds are limited, their seconds."""
    strategies = profile.grid.strategies()
    found = np.isfinite(profile.cost)
    if constraints.allowed is not None:
        found &= np.array([strategy in constraints.allowed for strategy in strategies])
    if constraints.max_memory is not None and profile.memory is not None:
        found &= np.nan_to_num(profile.memory, nan=np.inf) <= constraints.max_memory * (1 + 1e-12)
    if constraints.max_seconds is not None and profile.seconds is not None:
        found &= np.isfinite(profile.seconds)
    return found


def followers(grid: Grid, cost: NDArray[np.float64], constraints: Constraints) -> BoolArray | None:
    """Whether strategy b may come after a, (C, C), by the monotone constraints; None where any may."""
    if not constraints.monotone:
        return None
    may = np.ones((len(grid), len(grid)), dtype=bool)
    if COST in constraints.monotone:
        may &= cost[None, :] >= cost[:, None]
    positions = np.array([grid.position(strategy) for strategy in grid.strategies()])
    distance = np.abs(positions - np.array(grid.position(grid.reference)))
    for name in constraints.monotone:
        if name != COST:
            d = distance[:, list(grid.axes).index(name)]
            may &= d[None, :] <= d[:, None]
    return may


def dwell_slices(constraints: Constraints, slices: int) -> int:
    """Slices that a stage must last at least."""
    return max(1, math.ceil(exact(constraints.min_dwell) * slices))


def final_slice(constraints: Constraints, slices: int) -> int:
    """First slice that must run the reference; `slices` when none must."""
    return math.floor(slices * (1 - exact(constraints.final_reference)))

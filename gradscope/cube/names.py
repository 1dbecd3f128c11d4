"""What the names and labels of a cube may be: those that its file holds and that a strategy's text brings back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import UsageError
from schedulers import Grid, Strategy
from schedulers.strategy import AxisValue

OWN_PREFIX = "_nc4_non_coord_"  # with which NetCDF4 files mark names of their own


def check_grid(grid: Grid) -> None:
    """Raise UsageError for an axis, a value or a unit of the grid that a cube cannot hold."""
    for axis, values in grid.axes.items():
        check_name("grid axis", axis)
        if _read(axis, "a") != {axis: "a"}:
            raise UsageError(
                f"grid axis {axis!r} cannot be read back from a text such as {axis}=1; leave out commas, equals signs "
                "and spaces at the ends"
            )
        check_text(f"unit of the axis {axis!r}", grid.units.get(axis, ""))
        if len({isinstance(value, str) for value in values}) > 1:
            raise UsageError(
                f"axis {axis!r} mixes texts and numbers ({', '.join(map(str, values))}); write all as texts"
            )
        for value in values:
            check_text(f"value on the axis {axis!r}", str(value))
            if isinstance(value, str) and _read(axis, value) != {axis: value}:
                raise UsageError(
                    f"axis {axis!r}: the text {value!r} reads as something else in {axis}={value}; write numbers as "
                    "numbers, and texts without commas and spaces at their ends"
                )


def check_name(what: str, name: str) -> None:
    """Raise UsageError for a name that no variable of a cube's file can have."""
    check_text(what, name)
    if not name or "/" in name or name in (".", "..", "param_groups") or name.startswith(OWN_PREFIX):
        raise UsageError(f"{what} cannot be called {name!r}: a cube's file cannot hold that name; choose another")


def check_text(what: str, text: str) -> None:
    """Raise UsageError for a text that a cube's file would lose: one with a NUL character, or that is no Unicode."""
    try:
        held = "\0" not in text.encode().decode()
    except UnicodeEncodeError:
        held = False
    if not held:
        raise UsageError(
            f"{what} {text!r}: a cube's file holds neither NUL characters nor lone surrogates; choose another"
        )


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Raise UsageError for an attribute that a cube's file would lose."""
    for name, value in attributes.items():
        if isinstance(value, str):
            check_text(f"attribute {name} of the cube", value)


def axis_labels(axis: str, values: Sequence[AxisValue]) -> NDArray[Any]:
    """The coordinate of an axis. Raises UsageError for numbers that no one type of a cube's file holds exactly."""
    labels = np.array(values)
    if labels.dtype == object:
        labels = labels.astype(float)
    if labels.tolist() != list(values):
        raise UsageError(
            f"axis {axis!r}: the numbers {', '.join(map(str, values))} are not held exactly side by side, neither as "
            "whole numbers of 64 bits nor as floating-point numbers; round them"
        )
    return labels


def _read(axis: str, value: str) -> dict[str, AxisValue]:
    """The strategy whose text is `axis=value`; {} where that is the text of none."""
    try:
        return dict(Strategy.parse(f"{axis}={value}"))
    except UsageError:
        return {}

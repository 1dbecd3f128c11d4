"""From values to positions on the one colour scale: linear, logarithmic, or both around zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradscope.plots._theme import number

Floats = NDArray[np.float64]
Kind = Literal["linear", "log", "symlog"]

DECADES = 2.0  # a span above this is drawn logarithmically
_MOST_DECADES = 6  # what lies lower by chance would leave one colour for everything else
_LINEAR_SHARE = 0.01  # symlog: linear within this share of the largest magnitude


@dataclass(frozen=True)
class ColourRange:
    """One range for all frames of a figure.

    kind "linear": colour = value. "log": log10(max(value, unit)), so that estimates of something
    non-negative that came out at or below zero, or far below all others, take the colour of the range's
    lower end. "symlog": sign(value) · log10(1 + |value|/unit). `low` and `high` bound the colours; `ticks`
    are positions with their texts, which are values and not logarithms.
    """

    kind: Kind
    unit: float
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def colour(self, values: Floats) -> Floats:
        """Colour positions of `values`; NaN stays NaN."""
        if self.kind == "linear":
            return values
        if self.kind == "log":
            return np.log10(np.maximum(values, self.unit))
        return np.sign(values) * np.log10(1 + np.abs(values) / self.unit)


def colour_range(values: Floats, errors: Floats, *, signed: bool) -> ColourRange:
    """The range that holds every finite entry of `values`, of any shape.

    What decides between linear and logarithmic are the values that exceed their own standard error
    (all of them where none is known): an estimate that is zero within its error says nothing about a
    span. `signed` says whether a negative value means anything, as it does for `inner` and `descent`;
    otherwise values at or below zero are those of an unbiased estimate of zero.
    """
    known = values[np.isfinite(values)]
    if not known.size:
        return ColourRange("linear", 1.0, 0.0, 1.0, ())
    clear = np.abs(values) > np.nan_to_num(errors)
    magnitudes = np.abs(values[np.isfinite(values) & clear & ((values > 0) | signed) & (values != 0)])
    wide = magnitudes.size > 1 and float(np.ptp(np.log10(magnitudes))) > DECADES
    low, high = float(known.min()), float(known.max())
    if not wide:
        return _linear(low, high)
    if signed and low < 0:
        unit = _LINEAR_SHARE * float(np.abs(known).max())
        return _with_ticks("symlog", unit, low, high)
    unit = max(float(magnitudes.min()) if low <= 0 else low, high / 10**_MOST_DECADES)
    return _with_ticks("log", unit, unit, high, below=low < unit)


def _linear(low: float, high: float) -> ColourRange:
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-280):
        half = abs(high) / 2 or 0.5
        return ColourRange("linear", 1.0, low - half, high + half, ((high, number(high)),))
    step = _nice((high - low) / 6)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    levels = [round((first + i) * step, 12) for i in range(count)]  # the outer ones may lie just beyond the ends
    ticks = tuple((min(max(level, low), high), number(level)) for level in levels)
    return ColourRange("linear", 1.0, low, high, ticks)


def _with_ticks(kind: Kind, unit: float, low: float, high: float, *, below: bool = False) -> ColourRange:
    """`below`: values under the range take its lower colour, and the lowest tick says so."""
    bare = ColourRange(kind, unit, 0.0, 1.0, ())
    ends = bare.colour(np.array([low, high]))
    top = math.floor(math.log10(max(abs(low), abs(high))))
    powers = range(math.floor(math.log10(unit)), top + 1)
    steps = (1, 3) if ends[1] - ends[0] < 3.5 else (1,)
    levels = [m * 10.0**p for p in powers for m in steps if m * 10.0**p >= unit * 0.999]
    levels = sorted({*levels, *(-level for level in levels), 0.0}) if kind == "symlog" else levels
    if below:
        levels = [unit, *(level for level in levels if level > 2 * unit)]
    gap = float(ends[1] - ends[0]) / 12
    ticks: list[tuple[float, str]] = []
    for level in levels:
        position = float(bare.colour(np.array([level]))[0])
        inside = ends[0] - 1e-9 <= position <= ends[1] + 1e-9
        if inside and (not ticks or position - ticks[-1][0] >= gap):
            ticks.append((position, ("≤ " if below and not ticks else "") + number(level, 2)))
    return ColourRange(kind, unit, float(ends[0]), float(ends[1]), tuple(ticks))


def _nice(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 5) if m * power >= rough * 0.999), 10 * power)

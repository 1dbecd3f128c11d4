"""Schedules in one line, as typed on a command line: patch=30,dropout=0.5@0.4;patch=16."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NoReturn

from schedulers.counts import exact
from schedulers.errors import UsageError
from schedulers.schedule import Schedule, Stage
from schedulers.strategy import AxisValue, Strategy

MOST_PARTS = 1000
_PLUS = re.compile(r"\+(?=[^=+*,]*[=*])")  # between the entries of a mixture; not within 1e+3 or crop+flip
_WEIGHT_TOLERANCE = Fraction(1, 1_000_000)

Mixture = tuple[tuple[Strategy, float], ...]


def parse_schedule(text: str, *, cost: Callable[[Strategy], float], reference: Strategy) -> Schedule:
    """Pieces separated by semicolons, each `what@end`: what runs until that fraction of the budget.

    The last piece ends at 1 and needs no `@`; an axis that is not given takes the reference's value.
    `what` is one of

    - a strategy: `patch=4` or `patch=30,dropout=0.5`;
    - a ramp: `dropout=0.8->0/5` is five equal parts of the piece at .8, .6, .4, .2 and 0, and
      `patch=48>40>30>16` equal parts at the values that are listed. Several axes may ramp together when
      they have equally many parts; an axis with one value keeps it;
    - a mixture: `0.7*patch=30+0.3*patch=16`, each step drawing one strategy with these weights, which sum
      to 1 (1/3 is a weight too). Its cost is the weighted mean of costs. It cannot ramp in the same piece.

    `cost` gives a strategy's units per sample. Raises UsageError, naming the piece, for another form,
    an axis that the reference does not have, and ends that do not increase to 1.

    >>> def shown(text):
    ...     plan = parse_schedule(text, cost=lambda s: 64 / s.number("patch"), reference=Strategy(patch=16, dropout=0))
    ...     for stage in plan.stages:
    ...         mixture = " + ".join(f"{weight:g} {strategy}" for strategy, weight in stage.mixture)
    ...         print(f"{stage.start:g} to {stage.end:g}: {mixture}, {stage.cost:g} units")
    >>> shown("patch=32@0.4;patch=16")
    0 to 0.4: 1 patch=32,dropout=0, 2 units
    0.4 to 1: 1 patch=16,dropout=0, 4 units
    >>> shown("patch=32>16,dropout=0.8->0/2@0.5;patch=16")
    0 to 0.25: 1 patch=32,dropout=0.8, 2 units
    0.25 to 0.5: 1 patch=16,dropout=0, 4 units
    0.5 to 1: 1 patch=16,dropout=0, 4 units
    >>> shown("0.75*patch=32+0.25*patch=16")
    0 to 1: 0.75 patch=32,dropout=0 + 0.25 patch=16,dropout=0, 2.5 units
    """
    pieces = [piece.strip() for piece in text.split(";")]
    stages: list[Stage] = []
    start = 0.0
    for i, piece in enumerate(pieces):
        what, at, end_text = piece.partition("@")
        last = i == len(pieces) - 1
        if not at and not last:
            raise UsageError(f"schedule {text!r}: {piece!r} does not say until when; add @ and a fraction, as in @0.4")
        end = _fraction(text, piece, end_text) if at else 1.0
        if last and end != 1:
            raise UsageError(f"schedule {text!r}: it stops at {end:g}; the last part must run until 1")
        if not start < end <= 1:
            raise UsageError(f"schedule {text!r}: {piece!r} ends at {end:g}, which is not in ({start:g}, 1]")
        mixtures = _Piece(text, piece, reference).mixtures(what)
        for (first, until), mixture in zip(_equal_parts(start, end, len(mixtures)), mixtures, strict=True):
            mean = math.fsum(weight * float(cost(strategy)) for strategy, weight in mixture)
            stages.append(Stage(first, until, mixture, mean))
        start = end
    return Schedule(stages=tuple(stages))


class _Piece:
    """Reads what runs in one piece; every error quotes the schedule's text and the piece."""

    def __init__(self, text: str, piece: str, reference: Strategy) -> None:
        self.text, self.piece, self.reference = text, piece, reference

    def mixtures(self, what: str) -> list[Mixture]:
        """One mixture for each equal part of the piece: several of a ramp, else one."""
        entries = _PLUS.split(what)
        if len(entries) > 1 or "*" in what.partition("=")[0]:
            return [self._mixture(entries)]
        return [((strategy, 1.0),) for strategy in self._ramp(what)]

    def _mixture(self, entries: list[str]) -> Mixture:
        mixture: dict[Strategy, Fraction] = {}
        for entry in entries:
            weight_text, star, strategy_text = entry.partition("*")
            if not star or "=" in weight_text:
                self._refuse(f"{entry.strip()!r} has no weight; a mixture is written 0.7*patch=30+0.3*patch=16")
            try:
                weight = _weight(weight_text.strip())
            except (ValueError, ZeroDivisionError):
                self._refuse(f"{weight_text.strip()!r} is not a weight; write a number in (0, 1], as in 0.7*patch=30")
            if not 0 < weight <= 1:
                self._refuse(f"the weight {weight_text.strip()} is not in (0, 1]")
            parts = self._ramp(strategy_text)
            if len(parts) > 1:
                self._refuse(
                    f"a mixture cannot ramp, and {strategy_text.strip()!r} does; give each part a piece of its own, as "
                    "in 0.7*patch=30+0.3*patch=16@0.4;patch=16"
                )
            if parts[0] in mixture:
                self._refuse(f"{parts[0]} is in the mixture twice; give it one weight")
            mixture[parts[0]] = weight
        total = sum(mixture.values(), Fraction(0))
        if abs(total - 1) > _WEIGHT_TOLERANCE:
            self._refuse(f"the weights sum to {float(total):.6g}, not 1")
        return tuple((strategy, float(weight)) for strategy, weight in mixture.items())

    def _ramp(self, strategy_text: str) -> list[Strategy]:
        """The strategy of each equal part, one where no axis ramps."""
        given = Strategy.parse(strategy_text)
        for axis in given:
            if axis not in self.reference:
                self._refuse(f"unknown axis {axis!r}; the axes are {', '.join(self.reference)}")
        values = {axis: self._values(axis, value) for axis, value in given.items()}
        ramps = {axis: len(listed) for axis, listed in values.items() if len(listed) > 1}
        parts = max(ramps.values(), default=1)
        for (axis, count), (other, other_count) in itertools.pairwise(ramps.items()):
            if count != other_count:
                self._refuse(
                    f"{axis} ramps in {count} parts and {other} in {other_count}; axes of one piece ramp together, in "
                    "equally many"
                )
        return [
            Strategy(
                {
                    axis: values[axis][part if axis in ramps else 0] if axis in values else self.reference[axis]
                    for axis in self.reference
                }
            )
            for part in range(parts)
        ]

    def _values(self, axis: str, value: AxisValue) -> list[AxisValue]:
        """The values that an axis runs through: those of `a->b/n`, of `a>b>c`, or the one value."""
        if not isinstance(value, str) or ">" not in value:
            return [value]
        ends, slash, count = value.partition("/")
        if "->" in value:
            first, _, last = ends.partition("->")
            return self._linear(f"{axis}={value}", first.strip(), last.strip(), count.strip() if slash else None)
        items = value.split(">")
        if not all(item.strip() for item in items):
            self._refuse(
                f"{axis}={value} lacks a value beside a >; write {axis}=48>40>16 for values one after the other"
            )
        listed = [Strategy.parse(f"{axis}={item}")[axis] for item in items]
        if len({isinstance(item, str) for item in listed}) > 1:
            self._refuse(
                f"{axis}={value} mixes numbers with texts; write {axis}=48>40>16 for values one after the other, or "
                f"{axis}=0.8->0/5 for equal steps"
            )
        return listed

    def _linear(self, shown: str, first: str, last: str, count: str | None) -> list[AxisValue]:
        form = "write dropout=0.8->0/5 for five equal parts at .8, .6, .4, .2 and 0"
        if count is None:
            self._refuse(f"{shown} does not say in how many parts; {form}")
        if not (count.isascii() and count.isdigit() and 2 <= int(count[:5]) <= MOST_PARTS):
            self._refuse(f"{shown}: {count!r} is not a number of parts from 2 to {MOST_PARTS}; {form}")
        try:
            low, high = (exact(_finite(end)) for end in (first, last))
        except ValueError:
            self._refuse(f"{shown} is not a ramp between two numbers; {form}")
        steps = int(count) - 1
        return [float(low + (high - low) * k / steps) for k in range(steps + 1)]

    def _refuse(self, why: str) -> NoReturn:
        raise UsageError(
            f"schedule {self.text!r}: {why}" + (f" (in {self.piece!r})" if self.piece != self.text else "")
        )


def _weight(text: str) -> Fraction:
    """`1/3`, or a number as a double has it: Fraction itself would work out 1e-999999999. Raises as Fraction does."""
    return Fraction(text) if "/" in text else Fraction(repr(float(text)))


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _equal_parts(start: float, end: float, parts: int) -> list[tuple[float, float]]:
    low, high = exact(start), exact(end)
    edges = [start, *(float(low + (high - low) * k / parts) for k in range(1, parts)), end]
    return list(itertools.pairwise(edges))


def _fraction(text: str, piece: str, end_text: str) -> float:
    try:
        return float(end_text)
    except ValueError:
        raise UsageError(f"schedule {text!r}: {end_text!r} in {piece!r} is not a fraction of the budget") from None

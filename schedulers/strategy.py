"""Strategies and grids: a strategy is a value on each named axis, a grid is all of them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from schedulers.errors import UsageError

AxisValue = int | float | str
_LARGEST = int(sys.float_info.max)


class Strategy(Mapping[str, AxisValue]):
    """One way of computing a cheaper gradient: an immutable, hashable mapping axis -> value.

    >>> Strategy(patch=4, dropout=0.5)
    Strategy(patch=4, dropout=0.5)
    >>> str(Strategy.parse("patch=4,dropout=0.5"))
    'patch=4,dropout=0.5'

    Numbers that are whole are kept as `int` so that 4 and 4.0 are one strategy with one text.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, AxisValue] | None = None, /, **axes: AxisValue) -> None:
        merged = {**(values or {}), **axes}
        self._values = {name: _normal(name, value) for name, value in merged.items()}

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Read `axis=value,axis=value`. Raises UsageError on anything else."""
        values: dict[str, AxisValue] = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            name, value = name.strip(), value.strip()
            if not (name and equals and value):
                raise UsageError(
                    f"strategy {text!r}: {part!r} is not of the form axis=value (as in patch=4,dropout=0.5)"
                )
            if name in values:
                raise UsageError(f"strategy {text!r}: axis {name!r} is given twice")
            values[name] = _number_or_text(value)
        return cls(values)

    def __getitem__(self, axis: str) -> AxisValue:
        return self._values[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self._values.items())

    def __repr__(self) -> str:
        return f"Strategy({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"

    def number(self, axis: str) -> float:
        """The value on `axis` as a float. Raises UsageError where it is text or the axis is missing."""
        if axis not in self._values:
            raise UsageError(f"strategy {self} has no axis {axis!r}; its axes are {', '.join(self._values)}")
        value = self._values[axis]
        if isinstance(value, str):
            raise UsageError(f"strategy {self}: axis {axis!r} must be a number, not {value!r}")
        return float(value)


@dataclass(frozen=True)
class Grid:
    """All strategies of a profile: the product of the axes' values, in row-major order.

    `axes` maps a name to its values, in the order in which plots show them; `reference` is the
    strategy without acceleration and must lie on the grid; `units` gives an axis's unit ("pixel").
    """

    axes: Mapping[str, tuple[AxisValue, ...]]
    reference: Strategy
    units: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        axes: dict[str, tuple[AxisValue, ...]] = {}
        for name, values in self.axes.items():
            normal = tuple(_normal(name, value) for value in values)
            if not normal:
                raise UsageError(f"grid axis {name!r} has no values")
            if len(set(normal)) != len(normal):
                raise UsageError(f"grid axis {name!r} lists a value twice: {', '.join(map(str, normal))}")
            axes[name] = normal
        if not axes:
            raise UsageError("a grid needs at least one axis")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "reference", self.check(self.reference))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(values) for values in self.axes.values())

    def __len__(self) -> int:
        return math.prod(self.shape)

    def strategies(self) -> list[Strategy]:
        """Every strategy, the last axis varying fastest."""
        return [
            Strategy(dict(zip(self.axes, values, strict=True))) for values in itertools.product(*self.axes.values())
        ]

    def position(self, strategy: Strategy) -> tuple[int, ...]:
        """Index of `strategy` along each axis. Raises UsageError when it is not on the grid."""
        strategy = self.check(strategy)
        return tuple(values.index(strategy[name]) for name, values in self.axes.items())

    def check(self, strategy: Mapping[str, AxisValue]) -> Strategy:
        """`strategy` with its axes in the grid's order. Raises UsageError when it is not on the grid."""
        for name in strategy:
            if name not in self.axes:
                raise UsageError(f"unknown axis {name!r} in {Strategy(strategy)}; the axes are {', '.join(self.axes)}")
        for name, values in self.axes.items():
            if name not in strategy:
                raise UsageError(f"strategy {Strategy(strategy)} gives no value for axis {name!r}")
            if strategy[name] not in values:
                raise UsageError(
                    f"strategy {Strategy(strategy)}: {name}={strategy[name]} is not on the grid; "
                    f"{name} is one of {', '.join(map(str, values))}"
                )
        return Strategy({name: strategy[name] for name in self.axes})


def _normal(axis: str, value: AxisValue) -> AxisValue:
    if hasattr(value, "item"):  # a NumPy scalar, as read back from a cube's coordinate
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UsageError(f"axis {axis!r}: {value!r} is neither a number nor a text")
    if not (_is_unicode(axis) and (not isinstance(value, str) or _is_unicode(value))):
        raise UsageError(f"axis {axis!r}: {value!r} holds half of a surrogate pair, which no file can")
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise UsageError(f"axis {axis!r}: a whole number of {value.bit_length()} bits is too large")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"axis {axis!r}: {value!r} is not a finite number")
        if value.is_integer():
            return int(value)
    return value


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _number_or_text(text: str) -> AxisValue:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text

"""Strategies as points: the colour says the value on the grid's first axis, the shape that on its second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradscope.plots import _theme
from gradscope.plots._theme import plain
from schedulers.strategy import AxisValue, Strategy


@dataclass(frozen=True)
class Marks:
    """Looks of `strategies`: values of the first and second axis in order, and their names ("" = no second one)."""

    strategies: tuple[Strategy, ...]
    first: tuple[AxisValue, ...]
    second: tuple[AxisValue, ...]
    axis: str
    other: str

    @classmethod
    def of(cls, strategies: Sequence[Strategy]) -> Marks:
        names = list(strategies[0])
        first = tuple(dict.fromkeys(strategy[names[0]] for strategy in strategies))
        second = tuple(dict.fromkeys(strategy[names[1]] for strategy in strategies)) if len(names) > 1 else ()
        return cls(tuple(strategies), first, second, names[0], names[1] if second else "")

    def with_value(self, value: AxisValue) -> list[int]:
        """Positions of the strategies with this value on the first axis."""
        return [c for c, strategy in enumerate(self.strategies) if strategy[self.axis] == value]

    def colour(self, value: AxisValue) -> str:
        return _theme.PALETTE[self.first.index(value) % len(_theme.PALETTE)]

    def symbol(self, position: int) -> str:
        strategy = self.strategies[position]
        second = self.second.index(strategy[self.other]) if self.other else 0
        return _symbol(second, self.first.index(strategy[self.axis]))

    def marker(self, positions: Sequence[int], value: AxisValue) -> dict[str, Any]:
        """The marker of the points at `positions`, all with `value` on the first axis."""
        symbols = [self.symbol(c) for c in positions]
        return {
            "color": self.colour(value),
            "symbol": symbols or "circle",
            "size": 12,
            "line": {"width": 1.5, "color": "white"},
        }

    def legend(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and marker of every colour and every shape."""
        colours = [
            (f"{self.axis} {value}", {"symbol": _symbol(0, i), "color": self.colour(value)})
            for i, value in enumerate(self.first)
        ]
        shapes = [
            (f"{self.other} {value}", {"symbol": _symbol(i, 0), "color": _theme.MUTED})
            for i, value in enumerate(self.second)
        ]
        return [(plain(name), {**marker, "size": 10}) for name, marker in colours + shapes]


def _symbol(second: int, first: int) -> str:
    """Symbol of the second axis's value; open where the first axis has used up the colours."""
    symbol = _theme.SYMBOLS[second % len(_theme.SYMBOLS)]
    return f"{symbol}-open" if first // len(_theme.PALETTE) % 2 else symbol

"""The dynamic program under a second resource: the best path whose seconds stay within a limit.

Of two paths that stand at the same place, the one that is worth more may have taken longer, so both must be kept:
every state holds several labels, each with its value and its exact seconds. Labels of one state whose seconds
fall into the same one of W equal intervals compete, and the one that is worth most stays. The limit is
therefore never broken; what is lost is that a label which was worth a little less and had taken a little less
time is forgotten. Where the path's seconds can only take few values (small problems) each gets an interval of its
own, and the result is exact.

Shape legend: N slices, C strategies, U switches used so far, W intervals of seconds, n labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from schedulers.errors import InfeasibleError
from schedulers.program import (
    EQUAL,
    STARTED,
    Advance,
    BoolArray,
    FloatArray,
    IntArray,
    Predecessors,
    Rules,
    additive,
    best_path,
)

INTERVALS = 200
DISTINCT = 2000  # as many different values of a path's seconds are told apart exactly
ROUNDING = 1e-9  # of the limit: what rounding may add to a sum of seconds


def least_seconds_path(rules: Rules, seconds: FloatArray) -> IntArray:
    """The fastest path, with `seconds` (N, C). Raises InfeasibleError when no path keeps the rules."""
    return best_path(rules, additive(-seconds))


def path_seconds(seconds: FloatArray, path: IntArray) -> float:
    """Seconds of a path (N,), with `seconds` (N, C)."""
    return float(seconds[np.arange(len(path)), path].sum())


def best_path_within(
    rules: Rules,
    advance: Advance,
    seconds: FloatArray,
    limit: float,
    start: float = 0.0,
    intervals: int = INTERVALS,
) -> tuple[IntArray, bool]:
    """The path (N,) that is worth most among those of at most `limit` seconds, and whether that is exact.

    `seconds` (N, C): those of a strategy in a slice, finite where it is usable. The rest as in `best_path`. Raises
    InfeasibleError when no path keeps rules and limit.
    """
    path = best_path(rules, advance, start)
    if path_seconds(seconds, path) <= limit * (1 + ROUNDING):
        return path, True
    if path_seconds(seconds, least_seconds_path(rules, seconds)) > limit * (1 + ROUNDING):
        raise InfeasibleError(f"no sequence of strategies that keeps the constraints takes at most {limit:g} seconds")
    return _Labels(rules, advance, seconds, limit, start, intervals).best()


@dataclass
class _Found:
    """Labels after one slice, (C, U, W): value (-inf where there is none), seconds above the least, where from."""

    value: FloatArray
    slack: FloatArray
    origin: IntArray  # position of the label before, in its array; STARTED for a path's first stage
    entered: BoolArray  # whether the label before stands min_dwell slices back, under another strategy


class _Labels:
    def __init__(
        self, rules: Rules, advance: Advance, seconds: FloatArray, limit: float, start: float, intervals: int
    ) -> None:
        self.rules, self.advance, self.start = rules, advance, start
        least_N = np.where(rules.usable, seconds, np.inf).min(axis=1)
        slack = np.where(rules.usable, seconds - least_N[:, None], 0.0)
        self.slack_sum = np.concatenate([np.zeros((1, rules.strategies)), slack.cumsum(axis=0)])
        self.room = limit * (1 + ROUNDING) - float(least_N.sum())
        sums = _distinct_sums(slack, self.room)
        self.exact = sums is not None
        self.edges = np.linspace(0, self.room, intervals + 1)[1:-1] if sums is None else (sums[1:] + sums[:-1]) / 2
        self.shape = (rules.strategies, rules.counted, len(self.edges) + 1)
        self.counts = rules.counted > 1 or rules.max_switches == 0

    def slack(self, first: int, count: int, strategies: IntArray) -> FloatArray:
        """Seconds (n,) above the least possible of `count` slices under `strategies` (n,)."""
        return np.asarray(self.slack_sum[first + count, strategies] - self.slack_sum[first, strategies])

    def best(self) -> tuple[IntArray, bool]:
        rules, dwell = self.rules, self.rules.min_dwell
        through = rules.through()
        before = Predecessors(rules.follows, rules.strategies)
        seen: list[_Found] = []
        for k in range(rules.slices):
            first = k - dwell + 1
            parts = []
            if first == 0:
                parts.append(self._begin(through[0]))
            elif first > 0:
                parts.append(self._enter(before, seen[first - 1], first, through[first]))
            if k:
                parts.append(self._stay(seen[-1], k))
            seen.append(self._merge(parts))
        return self._follow_back(seen), self.exact

    def _begin(self, usable_C: BoolArray) -> _Part:
        count = self.rules.min_dwell
        c = np.flatnonzero(usable_C)
        c = c[self.slack(0, count, c) <= self.room]
        value, slack = self.advance(0, count, np.full(c.size, self.start), c), self.slack(0, count, c)
        none = np.zeros(c.size, dtype=np.intp)
        return _Part(c, none, value, slack, np.full(c.size, STARTED), np.ones(c.size, dtype=bool))

    def _enter(self, before: Predecessors, old: _Found, first: int, usable_C: BoolArray) -> _Part:
        strategies, used, width = self.shape
        reach, whose = before.best(old.value.reshape(strategies, used * width))
        columns = np.arange(used * width)
        live = np.isfinite(reach) & usable_C[:, None]
        if self.counts:
            live &= columns < (used - 1) * width  # all switches are used up
        c, x = np.nonzero(live)
        origin = np.ravel_multi_index((whose[c, x], x), (strategies, used * width))
        count = self.rules.min_dwell
        slack = old.slack.ravel()[origin] + self.slack(first, count, c)
        fits = slack <= self.room
        c, x, origin, slack = c[fits], x[fits], origin[fits], slack[fits]
        value = self.advance(first, count, old.value.ravel()[origin], c)
        return _Part(c, x // width + int(self.counts), value, slack, origin, np.ones(c.size, dtype=bool))

    def _stay(self, old: _Found, k: int) -> _Part:
        strategies = self.shape[0]
        live = np.isfinite(old.value) & self.rules.usable[k][:, None, None]
        slack = old.slack + self.slack(k, 1, np.arange(strategies))[:, None, None]
        live &= slack <= self.room
        c, u, _ = np.nonzero(live)
        value = self.advance(k, 1, old.value[live], c)
        return _Part(c, u, value, slack[live], np.flatnonzero(live), np.zeros(c.size, dtype=bool))

    def _merge(self, parts: list[_Part]) -> _Found:
        """The best label of every interval; among equal ones the least seconds, then the one that stayed."""
        size = int(np.prod(self.shape))
        found = _Found(
            np.full(size, -np.inf), np.full(size, np.inf), np.zeros(size, dtype=np.intp), np.zeros(size, dtype=bool)
        )
        if parts:
            part = _Part(*(np.concatenate(columns) for columns in zip(*(p.columns() for p in parts), strict=True)))
            interval = np.searchsorted(self.edges, part.slack)
            at = (part.strategy * self.shape[1] + part.used) * self.shape[2] + interval
            worth = part.value - np.where(part.entered, EQUAL * np.abs(part.value), 0.0)
            top = np.full(size, -np.inf)
            np.maximum.at(top, at, worth)
            wins = np.flatnonzero(worth == top[at])
            np.minimum.at(found.slack, at[wins], part.slack[wins])
            wins = wins[part.slack[wins] == found.slack[at[wins]]]
            found.value[at[wins]] = part.value[wins]
            found.origin[at[wins]] = part.origin[wins]
            found.entered[at[wins]] = part.entered[wins]
        found.value, found.slack = found.value.reshape(self.shape), found.slack.reshape(self.shape)
        before = np.maximum.accumulate(found.value, axis=2)[:, :, :-1]
        found.value[:, :, 1:][found.value[:, :, 1:] <= before] = -np.inf  # later and not worth more
        return found

    def _follow_back(self, seen: list[_Found]) -> IntArray:
        last = seen[-1].value
        if not np.isfinite(last).any():
            raise InfeasibleError("no sequence of strategies keeps all the constraints within the seconds")
        at = int(last.argmax())
        path = np.empty(len(seen), dtype=np.intp)
        k = len(seen) - 1
        while k >= 0:
            c = at // (self.shape[1] * self.shape[2])
            origin, entered = int(seen[k].origin[at]), bool(seen[k].entered[at])
            count = self.rules.min_dwell if entered else 1
            path[k - count + 1 : k + 1] = c
            k, at = k - count, origin
        return path


@dataclass
class _Part:
    """Labels on their way, one entry each: strategy, switches used, value, slack, origin, entered."""

    strategy: IntArray
    used: IntArray
    value: FloatArray
    slack: FloatArray
    origin: IntArray
    entered: BoolArray

    def columns(self) -> tuple[IntArray, IntArray, FloatArray, FloatArray, IntArray, BoolArray]:
        return self.strategy, self.used, self.value, self.slack, self.origin, self.entered


def _distinct_sums(slack: FloatArray, room: float) -> FloatArray | None:
    """All values up to `room` that sums of `slack` (N, C) over the first slices can take; None when they are many."""
    step = max(room, float(slack.max()), 1e-300) * ROUNDING
    sums = everything = np.zeros(1)
    for slack_C in slack:
        sums = np.unique((sums[:, None] + np.unique(np.round(slack_C / step))).ravel())
        sums = sums[sums * step <= room * (1 + ROUNDING) + step]
        everything = np.union1d(everything, sums)
        if everything.size > DISTINCT:
            return None
    return everything * step


def with_fewer_switches(
    path: IntArray, rules: Rules, seconds: FloatArray, limit: float, value: Callable[[IntArray], float]
) -> IntArray:
    """A path that is worth as much (to a relative 1e-9), within rules and limit, and does not run to and fro.

    Where scores or speeds do not change, the order of stages does not matter, and a search under a limit of seconds
    returns any. A stage between two of one strategy is moved before or after them while nothing is lost by it.
    """
    worth = value(path)
    slack = ROUNDING * abs(worth)
    moved = True
    while moved:
        moved = False
        cuts = [0, *(np.flatnonzero(np.diff(path)) + 1).tolist(), len(path)]
        for i in range(len(cuts) - 3):
            a, b, c, d = cuts[i : i + 4]
            if path[a] != path[c]:
                continue
            for order in ((path[b:c], path[a:b], path[c:d]), (path[a:b], path[c:d], path[b:c])):
                other = path.copy()
                other[a:d] = np.concatenate(order)
                fits = path_seconds(seconds, other) <= limit * (1 + ROUNDING)
                if fits and _keeps(rules, other) and value(other) >= worth - slack:
                    path, moved = other, True
                    break
            if moved:
                break
    return path


def _keeps(rules: Rules, path: IntArray) -> bool:
    """Whether a path keeps rules that a path of the same stages in another order keeps: dwell, switches aside."""
    changes = np.flatnonzero(np.diff(path))
    follows = rules.follows is None or bool(rules.follows[path[changes], path[changes + 1]].all())
    return follows and bool(rules.usable[np.arange(len(path)), path].all())

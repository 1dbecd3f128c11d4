"""The exact dynamic program: the best sequence of strategies under constraints, on plain arrays.

A path runs one strategy in each of N slices. What it is worth so far is one number, and running strategy c
through some slices maps that number to another by a function that keeps order: what is worth more before is
worth at least as much after. So of all paths that stand at the same place with the same strategy and the same
number of switches only the best can be part of the optimum (Bellman), whether the number is a sum of scores
or the progress that training has reached.

Shape legend: N slices, C strategies, U switches used so far, X columns side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from schedulers.errors import InfeasibleError, UsageError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]
# (first slice, how many slices, values (n,), strategies (n,)) -> what the values are worth after those slices
Advance = Callable[[int, int, FloatArray, IntArray], FloatArray]

STAYED, STARTED = -1, -2
EQUAL = 1e-12  # relative difference below which two values count as equal, so that rounding causes no switch


@dataclass(frozen=True, eq=False)
class Rules:
    """Which paths are allowed.

    `usable` (N, C): whether a strategy may run in a slice. `follows[a, b]`: whether b may come right after a (None:
    always; staying always may). At most `max_switches` changes of strategy (None: any number), each run of one
    strategy, the last one included, at least `min_dwell` slices long. Raises UsageError for values out of range.
    """

    usable: BoolArray
    follows: BoolArray | None = None
    max_switches: int | None = None
    min_dwell: int = 1

    def __post_init__(self) -> None:
        if self.usable.ndim != 2 or 0 in self.usable.shape:
            raise UsageError(f"usable has shape {self.usable.shape}; it needs at least one slice and one strategy")
        strategies = self.usable.shape[1]
        if self.min_dwell < 1 or (self.max_switches is not None and self.max_switches < 0):
            raise UsageError(
                f"min_dwell={self.min_dwell} must be at least 1 and max_switches={self.max_switches} at least 0"
            )
        if self.follows is not None and self.follows.shape != (strategies, strategies):
            raise UsageError(f"follows has shape {self.follows.shape}; {strategies} strategies need a square of them")

    @property
    def slices(self) -> int:
        return int(self.usable.shape[0])

    @property
    def strategies(self) -> int:
        return int(self.usable.shape[1])

    @property
    def counted(self) -> int:
        """Numbers of switches to tell apart: more than stages of min_dwell slices fit in need no counting."""
        most = self.slices // self.min_dwell - 1
        return self.max_switches + 1 if self.max_switches is not None and self.max_switches < most else 1

    def through(self) -> BoolArray:
        """(N, C): whether a strategy may run in the `min_dwell` slices that begin with this one."""
        runs = self.usable.copy()
        for ahead in range(1, self.min_dwell):
            runs[: self.slices - ahead] &= self.usable[ahead:]
            runs[self.slices - ahead :] = False
        return runs


def best_path(rules: Rules, advance: Advance, start: float = 0.0) -> IntArray:
    """The path (N,) of strategy indices that is worth most in the end, under `rules`.

    V[k][c, u] is the most that a path can be worth after slice k when it ran c for at least min_dwell slices up to
    there, after u switches; with D = min_dwell and f_c^D what D slices of c make of a value,

        E[j][c, u] = max over a with follows[a, c] of V[j][a, u - 1]
        V[k][c, u] = max( f_c(V[k-1][c, u]), f_c^D(E[k-D][c, u]) )

    Time O(N · U · C log C) where any strategy may follow any, at most O(N · U · C²) otherwise; memory O(N · U · C).
    Among equals (to a relative 1e-12) staying is preferred, then fewer switches, then the first strategy.

    Raises InfeasibleError when no path keeps the rules.
    """
    slices, strategies, used, dwell = rules.slices, rules.strategies, rules.counted, rules.min_dwell
    counts = used > 1 or rules.max_switches == 0
    through = rules.through()
    before = Predecessors(rules.follows, strategies)
    ready_CU = np.full((strategies, used), -np.inf)
    from_NCU = np.full((slices, strategies, used), STAYED, dtype=np.int32)
    entered: dict[int, tuple[FloatArray, IntArray]] = {}  # after slice j: what can be entered next, and from where
    for k in range(slices):
        here_CU = _advanced(advance, k, 1, ready_CU, rules.usable[k])
        first = k - dwell + 1
        if first == 0:
            begun_CU = np.full((strategies, used), -np.inf)
            begun_CU[:, 0] = start
            origin_CU = np.full((strategies, used), STARTED)
        elif first > 0:
            begun_CU, origin_CU = entered.pop(first - 1)
        if first >= 0:
            begun_CU = _advanced(advance, first, dwell, begun_CU, through[first])
            better = begun_CU > here_CU + EQUAL * np.abs(np.where(np.isfinite(here_CU), here_CU, 0.0))
            here_CU = np.where(better, begun_CU, here_CU)
            from_NCU[k][better] = origin_CU[better]
        ready_CU = here_CU
        if k < slices - dwell:
            reach_CU, origin_CU = before.best(ready_CU)
            if counts:
                reach_CU = np.concatenate([np.full((strategies, 1), -np.inf), reach_CU[:, :-1]], axis=1)
                origin_CU = np.concatenate([np.full((strategies, 1), STAYED), origin_CU[:, :-1]], axis=1)
            entered[k] = reach_CU, origin_CU
    if not np.isfinite(ready_CU).any():
        raise InfeasibleError("no sequence of strategies keeps all the constraints")
    return _follow_back(from_NCU, ready_CU, dwell, counts)


def additive(score: FloatArray) -> Advance:
    """Values are sums of `score` (N, C) over the slices: NaN counts as nothing, so such slices must not be usable."""
    known = np.where(np.isfinite(score), score, 0.0)

    def advance(first: int, count: int, values: FloatArray, strategies: IntArray) -> FloatArray:
        for k in range(first, first + count):
            values = values + known[k][strategies]
        return values

    return advance


def solve(
    loss: ArrayLike,
    *,
    follows: ArrayLike | None = None,
    max_switches: int | None = None,
    min_dwell: int = 1,
    final: tuple[int, int] | None = None,
) -> IntArray:
    """The path (N,) of strategy indices with the smallest sum of `loss` (N, C) that keeps the constraints.

    A cell of `loss` that is NaN or infinite cannot be used; with `final = (first, index)` every slice from `first` on
    runs strategy `index`; the others as in `Rules`. See `best_path` for the recursion and for ties.

    Raises InfeasibleError when no path keeps the constraints, UsageError for arguments out of range.
    """
    loss_NC = np.array(loss, dtype=np.float64)
    if loss_NC.ndim != 2 or 0 in loss_NC.shape:
        raise UsageError(f"loss has shape {loss_NC.shape}; it needs at least one slice and one strategy")
    usable = np.isfinite(loss_NC)
    if final is not None:
        first, index = final
        if not (first >= 0 and 0 <= index < loss_NC.shape[1]):
            raise UsageError(f"final={final} is not a slice and one of {loss_NC.shape[1]} strategies")
        usable[first:, np.arange(loss_NC.shape[1]) != index] = False
    rules = Rules(usable, None if follows is None else np.array(follows, dtype=bool), max_switches, min_dwell)
    return best_path(rules, additive(-loss_NC))


class Predecessors:
    """For every strategy the best value among those that it may come after.

    One result in four ways: where any may follow any, the best and the second best are all that is needed; in
    a relation that ranks all strategies (by cost, say) a running best; with many columns a transitive relation is
    walked along its covers; else candidates are tried best first.
    """

    def __init__(self, follows: BoolArray | None, strategies: int) -> None:
        self._strategies = strategies
        allowed = np.ones((strategies, strategies), dtype=bool) if follows is None else follows.copy()
        np.fill_diagonal(allowed, True)
        self._any = bool(allowed.all())
        self._order, self._last = _ranking(allowed)
        self._walk = [] if self._any or self._order is not None else _covers(allowed)
        np.fill_diagonal(allowed, False)
        self._allowed = allowed

    def best(self, values_CX: FloatArray) -> tuple[FloatArray, IntArray]:
        """(C, X) of each: the best value among the predecessors of c, -inf where there are none, and whose it is."""
        if self._strategies == 1:
            return np.full(values_CX.shape, -np.inf), np.full(values_CX.shape, STAYED)
        if self._any:
            return _best_of_others(values_CX)
        if self._order is not None:
            return _running_best(values_CX, self._order, self._last)
        if self._walk and values_CX.shape[1] > 2 * self._strategies:
            return self._along_covers(values_CX)
        return self._best_first(values_CX)

    def _best_first(self, values_CX: FloatArray) -> tuple[FloatArray, IntArray]:
        strategies, columns = values_CX.shape
        origin_CX = np.full((strategies, columns), STAYED)
        for x in range(columns):
            order = np.argsort(-values_CX[:, x], kind="stable")
            order = order[: np.count_nonzero(values_CX[:, x] > -np.inf)]
            open_C, tried, chunk = np.arange(strategies), 0, 16
            while open_C.size and tried < order.size:
                part = order[tried : tried + chunk]
                may = self._allowed[np.ix_(part, open_C)]
                found = may.any(axis=0)
                origin_CX[open_C[found], x] = part[may.argmax(axis=0)[found]]
                open_C, tried, chunk = open_C[~found], tried + chunk, 4 * chunk
        reach_CX = np.where(origin_CX >= 0, np.take_along_axis(values_CX, np.maximum(origin_CX, 0), axis=0), -np.inf)
        return reach_CX, origin_CX

    def _along_covers(self, values_CX: FloatArray) -> tuple[FloatArray, IntArray]:
        """Here a strategy counts among its own predecessors: switching to itself gains nothing over staying."""
        reach_CX = values_CX.copy()
        origin_CX = np.broadcast_to(np.arange(self._strategies)[:, None], values_CX.shape).copy()
        columns = np.arange(values_CX.shape[1])
        for members, covers in self._walk:
            rows = np.array([*members, *covers])
            if rows.size == 1:
                continue
            top_X = rows[reach_CX[rows].argmax(axis=0)]
            reach_CX[members], origin_CX[members] = reach_CX[top_X, columns], origin_CX[top_X, columns]
        return reach_CX, origin_CX


def _best_of_others(values_CX: FloatArray) -> tuple[FloatArray, IntArray]:
    """The best of all other rows, by the best and the second best of each column."""
    columns = np.arange(values_CX.shape[1])
    first_X = values_CX.argmax(axis=0)
    others = values_CX.copy()
    others[first_X, columns] = -np.inf
    second_X = others.argmax(axis=0)
    second_X = np.where(second_X == first_X, (first_X + 1) % len(values_CX), second_X)
    is_first = np.arange(len(values_CX))[:, None] == first_X
    return (
        np.where(is_first, others[second_X, columns], values_CX[first_X, columns]),
        np.where(is_first, second_X, first_X),
    )


def _ranking(allowed: BoolArray) -> tuple[IntArray | None, IntArray]:
    """Strategies from first to last, and for each the place of the last one that may come before it.

    None for a relation that does not rank all strategies, ties allowed.
    """
    before_C = allowed.sum(axis=0)
    if not (allowed == (before_C[:, None] <= before_C[None, :])).all():
        return None, before_C
    return np.argsort(before_C, kind="stable"), before_C - 1


def _running_best(values_CX: FloatArray, order: IntArray, last: IntArray) -> tuple[FloatArray, IntArray]:
    """The best up to each place of a ranking, a strategy itself included: switching to itself gains nothing."""
    ranked_CX = values_CX[order]
    best_CX = np.maximum.accumulate(ranked_CX, axis=0)
    rises_CX = np.ones(ranked_CX.shape, dtype=bool)
    rises_CX[1:] = best_CX[1:] > best_CX[:-1]
    place_CX = np.maximum.accumulate(np.where(rises_CX, np.arange(len(order))[:, None], 0), axis=0)
    return best_CX[last], order[place_CX][last]


def _covers(allowed: BoolArray) -> list[tuple[list[int], list[int]]]:
    """Classes of mutually reachable strategies in an order in which predecessors come first, each with its covers.

    A cover is one member of a class right before it. [] for a relation that is not transitive.
    """
    steps = allowed.astype(np.float32)
    if ((steps @ steps > 0) & ~allowed).any():
        return []
    both = allowed & allowed.T
    heads = [c for c in range(len(allowed)) if not both[:c, c].any()]
    members = {head: np.flatnonzero(both[head]).tolist() for head in heads}
    strict = allowed[np.ix_(heads, heads)] & ~np.eye(len(heads), dtype=bool)
    order = np.argsort(strict.sum(axis=0), kind="stable")
    path = strict.astype(np.float32)
    direct = strict & ~(path @ path > 0)
    return [(members[heads[i]], [heads[j] for j in np.flatnonzero(direct[:, i])]) for i in order]


def _advanced(advance: Advance, first: int, count: int, values_CU: FloatArray, usable_C: BoolArray) -> FloatArray:
    """What the reachable values become; -inf where they are not reachable or their strategy is not usable."""
    live = np.isfinite(values_CU) & usable_C[:, None]
    after_CU = np.full(values_CU.shape, -np.inf)
    if live.any():
        after_CU[live] = advance(first, count, values_CU[live], np.nonzero(live)[0])
    return after_CU


def _follow_back(from_NCU: NDArray[np.int32], last_CU: FloatArray, dwell: int, counts: bool) -> IntArray:
    """The path that the stored origins describe, from the best end."""
    best = last_CU.max()
    near = last_CU >= best - EQUAL * abs(best)
    used, current = (int(i) for i in np.argwhere(near.T)[0])
    path = np.empty(len(from_NCU), dtype=np.intp)
    k = len(from_NCU) - 1
    while k >= 0:
        path[k] = current
        origin = int(from_NCU[k, current, used])
        if origin == STAYED:
            k -= 1
            continue
        path[k - dwell + 1 : k + 1] = current
        k -= dwell
        if origin != STARTED:
            current, used = origin, used - int(counts)
    return path

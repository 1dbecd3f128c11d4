"""The best sum of scores within a limit of seconds, exactly: labels that a Lagrangian bound cannot rule out.

With a price per second the limit can be moved into the score; the best such sum bounds what any path within the limit
is worth (Lagrangian duality), and the price at which the bound is lowest is found by following the two paths on
either side of the limit (Handler, Zang 1980). A path's beginning is then only kept while its value, plus the most
that can follow at that price, may still beat the best path known. Of two beginnings at the same place one
that is neither worth more nor faster is dropped. What is left is few, and the result is the optimum.

Shape legend: N slices, C strategies, U switches used so far, n labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schedulers.errors import InfeasibleError
from schedulers.program import FloatArray, IntArray, Predecessors, Rules, additive, best_path
from schedulers.program_within import ROUNDING, best_path_within, least_seconds_path, path_seconds

MOST_LABELS = 300_000  # after one slice; beyond it the answer is that of `best_path_within`


def best_sum_within(rules: Rules, score: FloatArray, seconds: FloatArray, limit: float) -> tuple[IntArray, float]:
    """The path (N,) with the largest sum of `score` (N, C) among those of at most `limit` seconds, and a bound.

    `seconds` (N, C): those of a strategy in a slice, finite where it is usable. The bound is what no path can exceed:
    the path's own sum where the search was complete, else that of the Lagrangian. Raises InfeasibleError when no path
    keeps rules and limit.
    """
    score, seconds = (np.where(rules.usable, values, 0.0) for values in (score, seconds))
    rows = np.arange(rules.slices)
    path = best_path(rules, additive(score))
    if path_seconds(seconds, path) <= limit * (1 + ROUNDING):
        return path, float(score[rows, path].sum())
    fastest = least_seconds_path(rules, seconds)
    if path_seconds(seconds, fastest) > limit * (1 + ROUNDING):
        raise InfeasibleError(f"no sequence of strategies that keeps the constraints takes at most {limit:g} seconds")
    price, bound, known = _price(rules, score, seconds, limit, path, fastest)
    search = _Search(rules, score, seconds, limit, price)
    found = search.beyond(float(score[rows, known].sum()))
    if found is not None:
        best = known if found.size == 0 else found
        return best, float(score[rows, best].sum())
    near, _ = best_path_within(rules, additive(score), seconds, limit)
    best = max((known, near), key=lambda p: float(score[rows, p].sum()))
    return best, bound


def _price(
    rules: Rules, score: FloatArray, seconds: FloatArray, limit: float, slow: IntArray, fast: IntArray
) -> tuple[float, float, IntArray]:
    """The price per second with the lowest bound, that bound, and the best path within the limit met on the way."""
    rows = np.arange(rules.slices)

    def facts(path: IntArray) -> tuple[float, float]:
        return float(score[rows, path].sum()), path_seconds(seconds, path)

    known = fast
    while True:
        (v0, s0), (v1, s1) = facts(slow), facts(fast)
        price = max((v0 - v1) / (s0 - s1), 0.0)
        bound = v0 - price * (s0 - limit)
        path = best_path(rules, additive(score - price * seconds))
        value, taken = facts(path)
        reached = value - price * (taken - limit)
        if taken <= limit * (1 + ROUNDING) and value > facts(known)[0]:
            known = path
        if reached <= bound + 1e-12 * (abs(bound) + abs(v0)) or taken in (s0, s1):
            return price, max(bound, reached), known
        if taken <= limit * (1 + ROUNDING):
            fast = path
        else:
            slow = path


@dataclass
class _Labels:
    """Beginnings of paths after one slice: strategy, switches used, value, seconds, label before, whether entered."""

    strategy: IntArray
    used: IntArray
    value: FloatArray
    seconds: FloatArray
    before: IntArray
    entered: IntArray

    def take(self, which: IntArray) -> _Labels:
        return _Labels(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    @classmethod
    def join(cls, parts: list[_Labels]) -> _Labels:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))


class _Search:
    def __init__(self, rules: Rules, score: FloatArray, seconds: FloatArray, limit: float, price: float) -> None:
        self.rules, self.seconds, self.limit, self.price = rules, seconds, limit * (1 + ROUNDING), price
        self.counts = rules.counted > 1 or rules.max_switches == 0
        self.through = rules.through()
        self.score = score
        self.block, self.block_seconds = _blocks(score, rules.min_dwell), _blocks(seconds, rules.min_dwell)
        self.follow = self._most_to_follow(score - price * seconds, self.block - price * self.block_seconds)

    def _most_to_follow(self, priced: FloatArray, block: FloatArray) -> FloatArray:
        """(N, C, U): the most that the slices after k can add, at the price, to a path that stands ready after k."""
        rules, dwell = self.rules, self.rules.min_dwell
        strategies, used = rules.strategies, rules.counted
        after = Predecessors(None if rules.follows is None else rules.follows.T.copy(), strategies)
        most = np.full((rules.slices, strategies, used), -np.inf)
        most[-1] = 0.0
        for k in range(rules.slices - 2, -1, -1):
            stay = np.where(rules.usable[k + 1, :, None], priced[k + 1, :, None] + most[k + 1], -np.inf)
            if k + dwell < rules.slices:
                enter = np.where(self.through[k + 1, :, None], block[k + 1, :, None] + most[k + dwell], -np.inf)
                if self.counts:
                    enter = np.concatenate([enter[:, 1:], np.full((strategies, 1), -np.inf)], axis=1)
                stay = np.maximum(stay, after.best(enter)[0])
            most[k] = stay
        return most

    def beyond(self, known: float) -> IntArray | None:
        """The best path worth more than `known`; an empty one when there is none, None when labels are too many."""
        rules, dwell = self.rules, self.rules.min_dwell
        whole = np.empty(0, dtype=np.intp)
        none = _Labels(whole, whole, np.empty(0), np.empty(0), whole, whole)
        seen: list[_Labels] = []
        for k in range(rules.slices):
            first, parts = k - dwell + 1, list[_Labels]()
            if first == 0:
                c = np.flatnonzero(self.through[0])
                zero = np.zeros(c.size, dtype=np.intp)
                parts.append(_Labels(c, zero, self.block[0, c], self.block_seconds[0, c], zero, zero + 1))
            elif first > 0:
                parts.append(self._entering(seen[first - 1], first))
            if k:
                old = seen[-1]
                c, here = old.strategy, np.arange(old.strategy.size)
                stayed = _Labels(
                    c,
                    old.used,
                    old.value + self.score[k, c],
                    old.seconds + self.seconds[k, c],
                    here,
                    np.zeros_like(here),
                )
                parts.append(stayed.take(np.flatnonzero(rules.usable[k, c])))
            labels = _undominated(self._promising(_Labels.join([none, *parts]), k, known), rules.counted)
            if labels.strategy.size > MOST_LABELS:
                return None
            seen.append(labels)
        if not seen[-1].strategy.size:
            return np.empty(0, dtype=np.intp)
        return self._follow_back(seen, int(seen[-1].value.argmax()))

    def _entering(self, old: _Labels, first: int) -> _Labels:
        rules = self.rules
        may = self.through[first][None, :] & (old.strategy[:, None] != np.arange(rules.strategies))
        if rules.follows is not None:
            may &= rules.follows[old.strategy]
        if self.counts:
            may &= (old.used < rules.counted - 1)[:, None]
        before, c = np.nonzero(may)
        return _Labels(
            c,
            old.used[before] + int(self.counts),
            old.value[before] + self.block[first, c],
            old.seconds[before] + self.block_seconds[first, c],
            before,
            np.ones_like(before),
        )

    def _promising(self, labels: _Labels, k: int, known: float) -> _Labels:
        """Those that may still be worth more than `known` within the limit."""
        most = self.follow[k, labels.strategy, labels.used]
        reach = labels.value - self.price * (labels.seconds - self.limit) + most
        return labels.take(np.flatnonzero((reach > known + 1e-12 * abs(known)) & (labels.seconds <= self.limit)))

    def _follow_back(self, seen: list[_Labels], at: int) -> IntArray:
        path = np.empty(len(seen), dtype=np.intp)
        k = len(seen) - 1
        while k >= 0:
            labels = seen[k]
            count = self.rules.min_dwell if labels.entered[at] else 1
            path[k - count + 1 : k + 1] = labels.strategy[at]
            k, at = k - count, int(labels.before[at])
        return path


def _undominated(labels: _Labels, used: int) -> _Labels:
    """Of each state the labels than which no faster one is worth as much."""
    state = labels.strategy * used + labels.used
    order = np.lexsort((-labels.value, labels.seconds, state))
    value, state = labels.value[order], state[order]
    if not order.size:
        return labels
    # a running maximum within each state: states are lifted apart by more than all values span
    span = value.max() - value.min() + 1.0
    lifted = value - value.min() + (state - state[0]) * span
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(lifted)[:-1]])
    fresh = np.concatenate([[True], state[1:] != state[:-1]])
    return labels.take(order[fresh | (lifted > best_before)])


def _blocks(values: FloatArray, dwell: int) -> FloatArray:
    """Sums of `values` (N, C) over the `dwell` slices that begin with each; 0 where so many are not left."""
    summed = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(axis=0)])
    blocks = np.zeros_like(values)
    blocks[: len(values) - dwell + 1] = summed[dwell:] - summed[:-dwell]
    return blocks

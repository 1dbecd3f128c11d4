"""Which strategies the next probe of an online run measures, on how many sub-batches, and what that may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from schedulers.adaptive_rule import ProbePlan
from schedulers.strategy import Grid, Strategy

PROBES = 12  # what the cap should pay for, before a probe gets more sub-batches than PRECISE
PRECISE = 12  # sub-batches of a probe that come before more than LEAST_PROBES of them
LEAST_PROBES = 3  # where it does not pay for so many of all candidates, a probe measures fewer of them
ENOUGH = 5  # strategies in a probe, where it pays for three
RETRIES = 3  # probes in a row that may fail, of one strategy or altogether, before no more are tried


class ProbePlanner:
    """Plans probes of strategies of a grid at `costs` units per sample, with sub-batches of `sub_batch` samples.

    `shared`: parts of a cost that a probe spends once for all strategies naming the same key. A probe has from
    `minimum` to `maximum` sub-batches.
    """

    def __init__(
        self,
        grid: Grid,
        costs: Mapping[Strategy, float],
        shared: Mapping[Strategy, Mapping[str, float]],
        sub_batch: int,
        minimum: int,
        maximum: int,
    ) -> None:
        self.grid, self.costs, self.sub_batch = grid, costs, sub_batch
        self.minimum, self.maximum = minimum, maximum
        self.strategies = tuple(grid.strategies())
        self.shared = {s: dict(shared.get(s, {})) for s in self.strategies}
        self.probes = 0
        self._planned: tuple[tuple[object, ...], ProbePlan | None] | None = None
        self._blank = 0  # probes in a row that gave nothing at all
        self._seen = dict.fromkeys(self.strategies, -1)  # number of the last probe that tried it
        self._failed = dict.fromkeys(self.strategies, 0)  # probes in a row in which it failed

    def plan(
        self, candidates: Sequence[Strategy], incumbent: Strategy | None, cap: float, set_up: float
    ) -> ProbePlan | None:
        """A probe that a cap of so many units pays for several times: all candidates, or those that matter most.

        Where it pays for few probes, it is better spent on fewer of more strategies. None where it does not even pay
        for one of the reference and one other, or where probes keep failing.
        """
        key = (self.probes, tuple(candidates), incumbent, cap, set_up)
        if self._planned is None or self._planned[0] != key:
            self._planned = key, self._plan(candidates, incumbent, cap, set_up)
        return self._planned[1]

    def _plan(
        self, candidates: Sequence[Strategy], incumbent: Strategy | None, cap: float, set_up: float
    ) -> ProbePlan | None:
        if self._blank >= RETRIES:
            return None
        reference, wanted = self.grid.reference, self._by_interest(candidates, incumbent)
        many, few = (int(max(cap / probes - set_up, 0.0) // self.units(wanted, 1)) for probes in (PROBES, LEAST_PROBES))
        sub_batches = min(max(many, min(PRECISE, few), self.minimum), self.maximum)
        for probes in range(LEAST_PROBES, 0, -1):
            chosen = [reference]
            for strategy in wanted:
                more = [*chosen, strategy]
                if strategy != reference and (self.units(more, sub_batches) + set_up) * probes <= cap:
                    chosen = more
            if len(chosen) >= min(len(wanted), ENOUGH):
                break
        if len(chosen) < 2:
            return None
        ordered = tuple(s for s in self.strategies if s in chosen)
        return ProbePlan(ordered, sub_batches, self.units(ordered, sub_batches) + set_up)

    def shorter(self, plan: ProbePlan, units: float, set_up: float) -> ProbePlan | None:
        """The same probe with as many sub-batches as `units` pay for; None where these are fewer than the minimum."""
        sub_batches = int(max(units - set_up, 0.0) // self.units(plan.strategies, 1))
        if sub_batches < self.minimum:
            return None
        return ProbePlan(plan.strategies, sub_batches, self.units(plan.strategies, sub_batches) + set_up)

    @property
    def last_units(self) -> float:
        """What the plan that was asked for last may cost; 0 where there was none."""
        plan = None if self._planned is None else self._planned[1]
        return 0.0 if plan is None else plan.units

    def units(self, strategies: Sequence[Strategy], sub_batches: int) -> float:
        """What measuring `strategies` costs, keys and the like that they share counted once."""
        paid: set[str] = set()
        per_sample = 0.0
        for strategy in strategies:
            parts = self.shared[strategy]
            per_sample += self.costs[strategy] - math.fsum(parts[key] for key in paid & parts.keys())
            paid |= parts.keys()
        return per_sample * self.sub_batch * sub_batches

    def note(self, measured: Sequence[Strategy], failed: Sequence[Strategy]) -> None:
        """Note what a probe measured, and what failed in it."""
        number, self.probes = self.probes, self.probes + 1
        self._blank = 0 if self.grid.reference in measured else self._blank + 1
        if self._blank:
            return
        for strategy in (*measured, *failed):
            self._seen[strategy] = number
            self._failed[strategy] = self._failed[strategy] + 1 if strategy in failed else 0

    def measured(self, strategy: Strategy) -> bool:
        """Whether a probe has tried a strategy."""
        return self._seen[strategy] >= 0

    def leave_out(self, strategy: Strategy) -> None:
        """Never measure a strategy."""
        self._failed[strategy] = RETRIES
        self._planned = None

    def _by_interest(self, candidates: Sequence[Strategy], incumbent: Strategy | None) -> list[Strategy]:
        """Strategies to measure, the most interesting first.

        What runs now, then those never measured, then its neighbours on the grid; a strategy gains a place for every
        probe that it has been left out of, so all are measured again. Those that failed are tried again, last.
        """
        centre = self.grid.position(incumbent or self.grid.reference)

        def interest(strategy: Strategy) -> tuple[bool, bool, int, int]:
            apart = sum(abs(a - b) for a, b in zip(self.grid.position(strategy), centre, strict=True))
            missed = self.probes - 1 - self._seen[strategy]
            return (apart > 0, self._seen[strategy] >= 0, apart - missed, apart)

        again = [s for s in self.strategies if 0 < self._failed[s] < RETRIES and s not in candidates]
        return sorted(candidates, key=interest) + again

    def state(self) -> dict[str, Any]:
        """Everything that plans depend on, as plain values."""
        return {
            "probes": self.probes,
            "blank": self._blank,
            "seen": [self._seen[s] for s in self.strategies],
            "failed": [self._failed[s] for s in self.strategies],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`. Raises ValueError, KeyError or TypeError for anything else."""
        seen = dict(zip(self.strategies, map(int, state["seen"]), strict=True))
        failed = dict(zip(self.strategies, map(int, state["failed"]), strict=True))
        self.probes, self._blank = int(state["probes"]), int(state["blank"])
        self._seen, self._failed, self._planned = seen, failed, None

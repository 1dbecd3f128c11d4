"""What a profile still has to measure: jobs of strategies at a checkpoint, from what its cube holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gradscope.cube import profile_of
from gradscope.measuring import unshared_cost
from gradscope.profile_cube import ProfileCube
from gradscope.profile_options import ProfileOptions
from gradscope.races import Race
from gradscope.task import Task
from schedulers import RaceRule, Strategy, boundary_cells, get_criterion


@dataclass(frozen=True)
class Job:
    """Strategies to measure at checkpoint t, the sub-batches at which to look, the race if it is one."""

    t: int
    strategies: tuple[Strategy, ...]
    looks: tuple[int, ...]
    race: Race | None


@dataclass(frozen=True)
class Plan:
    """Decides the next job; a function of the cube and the options alone."""

    task: Task
    options: ProfileOptions
    rule: RaceRule
    batch_size: int
    cells: ProfileCube

    def next_job(self, t: int, tried: Collection[Strategy]) -> Job | None:
        """The next cells to measure at checkpoint t that were not tried before in this call."""
        cells, most = self.cells, self.rule.maximum * self.batch_size
        strategies = [s for s in self._ordered() if s not in tried]
        if not self.options.racing:
            wanted = [s for s in strategies if not cells.done(t, s, most)]
            group = tuple(wanted[: self.options.group_size])
            return Job(t, group, (self.rule.maximum,), None) if group else None
        missing = [s for s in strategies if not cells.done(t, s)]
        digest, book = cells.digests[t], cells.book
        raced = book.cells(digest)
        cut_off = [s for s in missing if str(s) in raced and not cells.failed(t, s)]
        if cut_off:
            return self._race(t, cut_off, book.checked(digest))
        if not raced:
            missing = [s for s in strategies if not cells.done(t, s, most)]
        if missing:
            best = cells.best(t, self._ordered(), get_criterion(self.options.criterion), self.options.race_metric)
            return self._race(t, [*missing, *([best] if best is not None and best not in missing else [])], 0)
        still_open = [s for s in strategies if str(s) in book.still_open(digest)]
        if still_open and book.checked(digest) < self.rule.maximum:
            return self._race(t, still_open, book.checked(digest))
        return None

    def boundary_job(self) -> Job | None:
        """The cells of one checkpoint whose errors leave open where the best strategy changes, at twice the samples."""
        if not self.cells.done_count:
            return None
        strategies, most = self.task.grid.strategies(), self.rule.maximum * self.batch_size
        found = boundary_cells(
            profile_of(self.cells.cube, metric=self.options.race_metric),
            self.options.criterion,
            tolerance=self.rule.tolerance,
        )
        found = [(t, c) for t, c in found if self.cells.samples(t, strategies[c]) < most]
        if not found:
            return None
        t = found[0][0]
        here = tuple(strategies[c] for u, c in found if u == t)
        blocks = 2 * min(self.cells.samples(t, s) for s in here) // self.batch_size
        return Job(t, here, (min(max(blocks, self.rule.minimum), self.rule.maximum),), None)

    def expected_work(self, chosen: Sequence[int]) -> tuple[int, float, float]:
        """Cells wanted at the `chosen` checkpoints, and the least and most units they and the reference cost."""
        cells, least, most = 0, 0.0, 0.0
        for t in chosen:
            tried: set[Strategy] = set()
            while job := self.next_job(t, tried):
                tried |= set(job.strategies)
                cells += len(job.strategies)
                shared = set[str]()
                cost = sum(
                    unshared_cost(self.task, s, shared)
                    for s in dict.fromkeys([self.task.grid.reference, *job.strategies])
                )
                least += cost * job.looks[0] * self.batch_size
                most += cost * job.looks[-1] * self.batch_size
        return cells, least, most

    def _race(self, t: int, strategies: Sequence[Strategy], floor: int) -> Job:
        race = Race(
            self.rule,
            get_criterion(self.options.criterion),
            self.options.metrics.index(self.options.race_metric),
            {s: self.task.cost(s) for s in self.task.grid.strategies()},
            self.task.cost(self.task.grid.reference),
            self.batch_size,
            tuple(strategies),
            floor,
        )
        return Job(t, race.cells, tuple(race.looks()), race)

    def _ordered(self) -> list[Strategy]:
        strategies = list(self.task.grid.strategies())
        return list(self.options.order(strategies)) if self.options.order else strategies

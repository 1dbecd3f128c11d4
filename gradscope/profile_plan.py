"""What a profile still has to measure: jobs of strategies at a checkpoint, from what its cube holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from gradscope.cube import profile_of
from gradscope.measuring import unshared_cost
from gradscope.profile_cube import ProfileCube
from gradscope.profile_options import ProfileOptions
from gradscope.races import Entry, Race
from gradscope.task import Task
from schedulers import RaceRule, Strategy, boundary_cells, get_criterion


@dataclass(frozen=True)
class Job:
    """Strategies to measure at checkpoint t, the sub-batches at which to look, the race if it is one.

    `marks`: what counts as tried once the job is done.
    """

    t: int
    strategies: tuple[Strategy, ...]
    looks: tuple[int, ...]
    race: Race | None
    marks: frozenset[object] = frozenset()


@dataclass(frozen=True)
class Plan:
    """Decides the next job; a function of the cube and the options alone."""

    task: Task
    options: ProfileOptions
    rule: RaceRule
    batch_size: int
    cells: ProfileCube

    def next_job(self, t: int, tried: Collection[object]) -> Job | None:
        """The next cells to measure at checkpoint t that are not among the marks `tried` in this call."""
        cells, most, ordered = self.cells, self.rule.maximum * self.batch_size, self._ordered()
        fresh = [s for s in ordered if s not in tried]
        if not self.options.racing:
            group = tuple([s for s in fresh if not cells.done(t, s, most)][: self.options.group_size])
            return Job(t, group, (self.rule.maximum,), None, frozenset(group)) if group else None
        known = cells.book.races(cells.row(t), self._race(t, ordered).identity)
        for entry in known:  # cut off: those not yet measured go on, against those still in it
            mark = (entry.cells, entry.checked)
            cut_off = {str(s) for s in ordered if str(s) in entry.cells and not cells.there(t, s)}
            if cut_off and mark not in tried:
                return self._again(t, entry, cut_off | {*entry.open}, mark)
        raced = {text for entry in known for text in entry.cells}
        new = [s for s in fresh if str(s) not in raced and (not known or not cells.done(t, s))]
        new = [s for s in new if known or not cells.done(t, s, most)]
        new += [s for s in fresh if s not in new and not cells.done(t, s)]
        if new:
            best = cells.best(t, ordered, get_criterion(self.options.criterion), self.options.race_metric)
            return self._job(t, self._race(t, [*new, *([best] if best and best not in new else [])]), {*new})
        for entry in known:
            mark = (entry.cells, entry.checked)
            if entry.undecided and entry.checked < self.rule.maximum and mark not in tried:
                return self._again(t, entry, {*entry.open}, mark)
        return None

    def boundary_job(self, tried: Collection[object]) -> Job | None:
        """The cells of one checkpoint whose errors leave open where the best strategy changes, at twice the samples.

        Cells at numbers of sub-batches that are `tried` are passed over.
        """
        if not self.cells.done_count:
            return None
        strategies, most = self.task.grid.strategies(), self.rule.maximum * self.batch_size
        found = boundary_cells(
            profile_of(self.cells.cube, metric=self.options.race_metric),
            self.options.criterion,
            tolerance=self.rule.tolerance,
        )
        for t in sorted({t for t, _ in found}):
            here = tuple(strategies[c] for u, c in found if u == t and self.cells.samples(t, strategies[c]) < most)
            if not here:
                continue
            twice = 2 * min(self.cells.samples(t, s) for s in here) // self.batch_size
            blocks = min(max(twice, self.rule.minimum), self.rule.maximum)
            mark = (t, here, blocks)
            if mark not in tried:
                return Job(t, here, (blocks,), None, frozenset({mark}))
        return None

    def expected_work(self, chosen: Sequence[int]) -> tuple[int, float, float]:
        """Cells wanted at the `chosen` checkpoints, and the least and most units they and the reference cost."""
        cells, least, most = 0, 0.0, 0.0
        for t in chosen:
            tried: set[object] = set()
            while job := self.next_job(t, tried):
                tried |= job.marks
                cells += len(job.strategies)
                shared = set[str]()
                cost = sum(
                    unshared_cost(self.task, s, shared)
                    for s in dict.fromkeys([self.task.grid.reference, *job.strategies])
                )
                least += cost * job.looks[0] * self.batch_size
                most += cost * job.looks[-1] * self.batch_size
        return cells, least, most

    def _again(self, t: int, entry: Entry, texts: Collection[str], mark: object) -> Job:
        """A race that goes on, without looks before the last one, for the strategies of those texts."""
        strategies = [s for s in self._ordered() if str(s) in texts]
        return self._job(t, replace(self._race(t, strategies), floor=entry.checked, all_cells=entry.cells), {mark})

    def _job(self, t: int, race: Race, marks: Collection[object]) -> Job:
        return Job(t, race.cells, tuple(race.looks()), race, frozenset(marks))

    def _race(self, t: int, strategies: Sequence[Strategy]) -> Race:
        return Race(
            self.rule,
            get_criterion(self.options.criterion),
            self.options.metrics.index(self.options.race_metric),
            {s: self.task.cost(s) for s in self.task.grid.strategies()},
            self.task.cost(self.task.grid.reference),
            self.batch_size,
            tuple(strategies),
        )

    def _ordered(self) -> list[Strategy]:
        strategies = self.task.grid.strategies()
        if self.options.only is not None:
            strategies = [s for s in strategies if s in self.options.only]
        return list(self.options.order(strategies)) if self.options.order else strategies

"""Races among the strategies of a checkpoint: who goes on, and what a cube remembers of it.

The cube keeps, per checkpoint, which cells raced, at how many sub-batches the race was last looked at and who
was still in it. A race that was interrupted is run again for those alone, without looking before that point:
the strategies that had left cannot come back, so the decisions, and the numbers, are those of an uninterrupted
race.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gradscope.errors import CubeError
from gradscope.estimators import ESTIMATES, Estimates
from schedulers import MOMENTS, Criterion, Moments, RaceRule, Strategy, contenders


@dataclass(frozen=True)
class Race:
    """One race: its rule, what decides it, and who is in it.

    `cells`: those measured now; `all_cells`: texts of all of the race, when some have left before; nobody leaves
    up to `floor` sub-batches.
    """

    rule: RaceRule
    criterion: Criterion
    metric_index: int
    costs: Mapping[Strategy, float]
    reference_cost: float
    batch_size: int
    cells: tuple[Strategy, ...]
    floor: int = 0
    all_cells: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[Any, ...]:
        """What must be the same for a race to be the same one; the cap may grow."""
        rule = self.rule
        return (self.criterion.name, self.metric_index, rule.minimum, rule.tolerance, rule.confidence, rule.growth)

    @property
    def entry_cells(self) -> tuple[str, ...]:
        """Texts of all strategies that ever were in this race, sorted."""
        return self.all_cells or tuple(sorted(map(str, self.cells)))

    def looks(self) -> list[int]:
        return [look for look in self.rule.looks() if look > self.floor or look == self.rule.maximum]

    def open(self, found: Mapping[Strategy, Estimates]) -> list[Strategy]:
        """The strategies that may still be the best by more than the tolerance; one alone has won."""
        if not found:
            return []
        strategies = list(found)
        totals = np.stack([e.total_WE[self.metric_index] for e in found.values()])
        deleted = np.stack([e.deleted_MWE[:, self.metric_index] for e in found.values()], axis=1)
        cost = np.array([self.costs[s] for s in strategies])
        stays = contenders(
            self._score(totals, cost),
            self._score(deleted, cost),
            lower_is_better=self.criterion.lower_is_better,
            tolerance=self.rule.tolerance,
            confidence=self.rule.confidence,
        )
        return [s for s, stay in zip(strategies, stays, strict=True) if stay]

    def _score(self, estimates_E: np.ndarray, cost_C: np.ndarray) -> np.ndarray:
        """Scores (..., C) with |G|^2 = 1, which all strategies have in common and which cancels in a race."""
        values = {name: estimates_E[..., ESTIMATES.index(name)] for name in MOMENTS}
        values["norm_sq_ref"] = np.ones_like(values["norm_sq_ref"])
        return self.criterion.score(
            Moments(**values),
            cost_C,
            beta=self.batch_size * self.reference_cost,
            batch_size=self.batch_size,
            reference_cost=self.reference_cost,
        )


@dataclass(frozen=True)
class Entry:
    """One race as remembered: its rule, its cells, the sub-batches at the last look and who was then in it."""

    rule: tuple[Any, ...]
    cells: tuple[str, ...]
    checked: int
    open: tuple[str, ...]

    @classmethod
    def of(cls, race: Race, blocks: int, still_open: Sequence[Strategy]) -> Entry:
        return cls(race.identity, race.entry_cells, blocks, tuple(map(str, still_open)))

    @property
    def undecided(self) -> bool:
        return len(self.open) > 1


@dataclass
class RaceBook:
    """What is remembered of the races: checkpoint -> entries, one per rule and set of cells, in order."""

    entries: dict[str, list[Entry]] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> RaceBook:
        """The book as `text` wrote it. Raises CubeError for anything else."""
        try:
            return cls(
                {
                    checkpoint: [
                        Entry(tuple(e["rule"]), tuple(e["cells"]), int(e["checked"]), tuple(e["open"])) for e in entries
                    ]
                    for checkpoint, entries in json.loads(text).items()
                }
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CubeError("the cube's attribute races_json is damaged; profile again with --overwrite") from error

    def text(self) -> str:
        return json.dumps({checkpoint: [asdict(e) for e in entries] for checkpoint, entries in self.entries.items()})

    def races(self, checkpoint: str, rule: tuple[Any, ...]) -> list[Entry]:
        """The races at a checkpoint under a rule (its cap aside)."""
        return [entry for entry in self.entries.get(checkpoint, []) if entry.rule == rule]

    def contenders(self, checkpoint: str, criterion: str, metric_index: int) -> set[str] | None:
        """Texts of the strategies that no race by this criterion and metric has ruled out; None without a race."""
        left: set[str] = set()
        found = [e for e in self.entries.get(checkpoint, []) if e.rule[:2] == (criterion, metric_index)]
        for entry in found:
            left = (left - set(entry.cells)) | set(entry.open)
        return left if found else None

    def note(self, checkpoint: str, entry: Entry) -> None:
        """Remember a race, in place of what was known of it."""
        known = self.entries.setdefault(checkpoint, [])
        at = next((i for i, e in enumerate(known) if (e.rule, e.cells) == (entry.rule, entry.cells)), None)
        if at is None:
            known.append(entry)
        else:
            known[at] = entry

    def join(self, other: RaceBook) -> None:
        """Take in what another part of the profile remembers.

        Of one race the part that got further counts. Races of other strategies at the same checkpoint, measured
        apart, leave a race among those that are left in either.
        """
        for checkpoint, theirs in other.entries.items():
            for entry in theirs:
                ours = self.races(checkpoint, entry.rule)
                same = next((e for e in ours if e.cells == entry.cells), None)
                if same is not None:
                    self.note(checkpoint, max(same, entry, key=lambda e: e.checked))
                    continue
                mine = set(entry.cells)
                apart = [e for e in ours if not (mine <= set(e.cells) or mine >= set(e.cells))]
                self.note(checkpoint, entry)
                for e in apart:
                    left = tuple(sorted({*e.open, *entry.open}))
                    self.note(checkpoint, Entry(entry.rule, left, min(e.checked, entry.checked), left))

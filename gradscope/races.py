"""Races among the strategies of a checkpoint: who goes on, and what a cube remembers of it.

The cube keeps, per checkpoint, which cells raced, at how many sub-batches the race was last looked at and who
was still in it. A race that was interrupted is run again for those alone, without looking before that point:
the strategies that had left cannot come back, so the decisions, and the numbers, are those of an uninterrupted
race.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gradscope.estimators import ESTIMATES, Estimates
from schedulers import MOMENTS, Criterion, Moments, RaceRule, Strategy, contenders


@dataclass(frozen=True)
class Race:
    """One race: its rule, what decides it, and the sub-batches before which nobody leaves (`floor`)."""

    rule: RaceRule
    criterion: Criterion
    metric_index: int
    costs: Mapping[Strategy, float]
    reference_cost: float
    batch_size: int
    cells: tuple[Strategy, ...]
    floor: int = 0

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


@dataclass
class RaceBook:
    """What is remembered of the races: checkpoint digest -> cells, the last look, and who was still open."""

    entries: dict[str, dict[str, object]] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> RaceBook:
        return cls(json.loads(text))

    def text(self) -> str:
        return json.dumps(self.entries)

    def join(self, other: RaceBook) -> None:
        """Take in what another part of the profile remembers.

        Of races of the same checkpoint the one that got further counts, unless each had strategies that the
        other had not: then those that are left in either go on against each other.
        """
        for digest, theirs in other.entries.items():
            ours = self.entries.get(digest)
            if ours is None or self.cells(digest) < other.cells(digest):
                self.entries[digest] = theirs
            elif self.cells(digest) == other.cells(digest):
                self.entries[digest] = max(ours, theirs, key=lambda entry: int(str(entry["checked"])))
            elif not other.cells(digest) <= self.cells(digest):
                self.entries[digest] = {
                    "cells": sorted(self.cells(digest) | other.cells(digest)),
                    "checked": min(self.checked(digest), other.checked(digest)),
                    "open": sorted({*_texts(ours, "open"), *_texts(theirs, "open")}),
                }

    def note(self, digest: str, raced: Sequence[Strategy], blocks: int, still_open: Sequence[Strategy]) -> None:
        """After a look at `blocks` sub-batches `still_open` are in the race; one or none means that it is decided."""
        cells = {*map(str, raced), *self.cells(digest)}
        self.entries[digest] = {"cells": sorted(cells), "checked": blocks, "open": [str(s) for s in still_open]}

    def cells(self, digest: str) -> set[str]:
        """Texts of the strategies that ever raced at this checkpoint."""
        return set(_texts(self.entries.get(digest, {}), "cells"))

    def still_open(self, digest: str) -> set[str]:
        """Texts of the strategies between which the last look could not decide."""
        found = _texts(self.entries.get(digest, {}), "open")
        return set(found) if len(found) > 1 else set()

    def checked(self, digest: str) -> int:
        """Sub-batches at the last look, 0 before the first."""
        found = self.entries.get(digest, {}).get("checked", 0)
        return found if isinstance(found, int) else 0


def _texts(entry: Mapping[str, object], name: str) -> list[str]:
    found = entry.get(name, [])
    return [str(text) for text in found] if isinstance(found, list) else []

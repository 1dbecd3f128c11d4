"""Two schedules side by side: where they run the same, and what each one's budget pays for."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from schedulers.errors import UsageError
from schedulers.schedule import Schedule, Stage

_TOLERANCE = 1e-9  # edges and weights nearer than this are one, written through different sums


@dataclass(frozen=True)
class Segment:
    """A part of the budget, [start, end) as fractions, in which neither schedule changes: `a` and `b` run there."""

    start: float
    end: float
    a: Stage
    b: Stage

    @property
    def same(self) -> bool:
        """Whether both draw the same strategies with the same weights; predictions and costs do not matter."""
        weights_a, weights_b = dict(self.a.mixture), dict(self.b.mixture)
        return all(
            abs(weights_a.get(strategy, 0.0) - weights_b.get(strategy, 0.0)) <= _TOLERANCE
            for strategy in {*weights_a, *weights_b}
        )


@dataclass(frozen=True)
class Comparison:
    """Two schedules over the union of their edges.

    `segments` cover [0, 1]. `same_share` is the share of the budget in which both run the same
    mixture. `cost_a` and `cost_b` are mean units per sample over the budget (`Schedule.cost`), in the
    units of each schedule's cost model; `samples_a` and `samples_b` what each budget pays for
    (`Schedule.total_samples`), None for a schedule without budget.
    """

    segments: tuple[Segment, ...]
    same_share: float
    cost_a: float
    cost_b: float
    samples_a: float | None
    samples_b: float | None

    @property
    def cost_difference(self) -> float:
        """Mean units per sample of b less those of a."""
        return self.cost_b - self.cost_a

    @property
    def samples_difference(self) -> float | None:
        """Samples of b less those of a; None unless both have a budget."""
        if self.samples_a is None or self.samples_b is None:
            return None
        return self.samples_b - self.samples_a


def compare_schedules(a: Schedule, b: Schedule) -> Comparison:
    """Compare two schedules by fraction of the budget; their budgets and cost models need not agree.

    Raises UsageError when their strategies have different axes.
    """
    axes_a, axes_b = a.stages[0].strategy, b.stages[0].strategy
    if set(axes_a) != set(axes_b):
        raise UsageError(
            f"these schedules cannot be compared: one has the axes {', '.join(axes_a)} and the other "
            f"{', '.join(axes_b)}; give two schedules of one grid"
        )
    segments = tuple(
        Segment(start, end, a.at((start + end) / 2), b.at((start + end) / 2))
        for start, end in itertools.pairwise(_edges(a, b))
    )
    return Comparison(
        segments=segments,
        same_share=math.fsum(segment.end - segment.start for segment in segments if segment.same),
        cost_a=a.cost,
        cost_b=b.cost,
        samples_a=None if a.budget is None else a.total_samples,
        samples_b=None if b.budget is None else b.total_samples,
    )


def _edges(a: Schedule, b: Schedule) -> list[float]:
    edges = [0.0]
    for end in sorted(stage.end for stage in (*a.stages, *b.stages)):
        if end - edges[-1] > _TOLERANCE:
            edges.append(end)
    edges[-1] = 1.0
    return edges

"""How much a profile measures, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradscope.errors import UsageError
from schedulers import Grid, RaceRule, Strategy, get_criterion

METRICS = ("euclidean", "optimizer")
ALLOCATIONS = ("racing", "fixed")
ESTIMATORS = ("auto", "subbatch", "per-sample", "per-sample-fast")
PRECISIONS = ("float32", "bf16")
ACCUMULATORS = ("auto", "device", "cpu")
FIXED_BLOCKS = 16
RACING_SAMPLES = 8192  # what benchmarks/profile found to be worth its cost


@dataclass(frozen=True)
class ProfileOptions:
    """How much to measure and how.

    `samples`: per cell, rounded up to whole sub-batches of K; with `allocation="racing"` the most a cell can
    get (default 8,192; every cell gets `minimum` sub-batches), with "fixed" what each gets (default 16 sub-batches).
    `batch_size` is K, default the task's. Racing asks for the best strategy by `criterion` in `metric` (default:
    optimizer, where it is measured) and ignores advantages below `tolerance` of the best score. `estimator`:
    the engine, "auto" takes a per-sample one where the task allows it. `precision`: of the forward and backward
    passes; statistics are float32 and float64 always. `accumulators`: where the strategies' sums are kept, one
    vector of the model's size each. With a fixed allocation `group_size` strategies are measured side by side;
    `order` is the order in which a checkpoint's strategies are taken. `checkpoints`: measure these alone,
    counted from 0 by progress, for jobs whose cubes are merged; what racing wants at the boundaries between
    checkpoints is then left to a profile of them all. `only`: measure these strategies alone, each with the same
    number of samples whatever the `allocation`; other cells, races and boundaries are left as they are.
    """

    samples: int | None = None
    batch_size: int | None = None
    seed: int = 0
    metrics: tuple[str, ...] = METRICS
    allocation: str = "racing"
    criterion: str = "descent"
    metric: str | None = None
    minimum: int = RaceRule.minimum
    tolerance: float = RaceRule.tolerance
    confidence: float = RaceRule.confidence
    estimator: str = "auto"
    precision: str = "float32"
    accumulators: str = "auto"
    group_size: int = 16
    order: Callable[[Sequence[Strategy]], Sequence[Strategy]] | None = None
    checkpoints: tuple[int, ...] | None = None
    only: tuple[Strategy, ...] | None = None

    def __post_init__(self) -> None:
        for name in self.metrics:
            _choice("metric", name, METRICS)
        if self.metric is not None:
            _choice("metric", self.metric, self.metrics)
        _choice("allocation", self.allocation, ALLOCATIONS)
        _choice("estimator", self.estimator, ESTIMATORS)
        _choice("precision", self.precision, PRECISIONS)
        _choice("accumulators", self.accumulators, ACCUMULATORS)
        get_criterion(self.criterion)
        if self.group_size < 1:
            raise UsageError(f"group_size is {self.group_size}; it must be at least 1")

    @property
    def racing(self) -> bool:
        """Whether strategies race; not when some are asked for by name."""
        return self.allocation == "racing" and self.only is None

    @property
    def race_metric(self) -> str:
        """The metric in which strategies race."""
        return self.metric or ("optimizer" if "optimizer" in self.metrics else self.metrics[0])

    def blocks(self, batch_size: int) -> int:
        """Most sub-batches of `batch_size` samples per cell. Raises UsageError when too few for standard errors."""
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; a sub-batch needs at least one sample")
        default = max(-(-RACING_SAMPLES // batch_size), self.minimum) if self.racing else FIXED_BLOCKS
        count = default if self.samples is None else -(-self.samples // batch_size)
        if count < 3:
            raise UsageError(
                f"samples={self.samples} make {count} sub-batches of {batch_size}; "
                f"standard errors need at least 3: use --samples {3 * batch_size} or more"
            )
        return count

    def chosen(self, count: int) -> list[int]:
        """Which of `count` checkpoints to measure. Raises UsageError for one that is not there."""
        if self.checkpoints is None:
            return list(range(count))
        wrong = [t for t in self.checkpoints if not 0 <= t < count]
        if wrong or not self.checkpoints:
            what = f"there is no checkpoint {wrong[0]}" if wrong else "none is chosen"
            raise UsageError(f"checkpoints={list(self.checkpoints)}: {what}; the {count} there are count from 0")
        return sorted(set(self.checkpoints))

    def check_only(self, grid: Grid) -> None:
        """Raise UsageError for a strategy of `only` that is not on the grid, or when it names none."""
        if self.only is not None and not self.only:
            raise UsageError("only=(): no strategy is chosen; name at least one, or leave it out to measure all")
        for strategy in self.only or ():
            grid.check(strategy)

    def rule(self, batch_size: int) -> RaceRule:
        """The race's rule; a cap below the minimum lowers the minimum."""
        blocks = self.blocks(batch_size)
        return RaceRule(min(self.minimum, blocks), blocks, self.tolerance, self.confidence)


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"unknown {name} {value!r}; use one of {', '.join(choices)}")

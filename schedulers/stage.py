"""One stage of a schedule: a value, its checks, and its object in JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from schedulers.errors import ScheduleError, UsageError
from schedulers.fields import Fields, describe
from schedulers.strategy import Strategy

_WEIGHT_TOLERANCE = 1e-6  # a hand-written .333, .333, .334 is exact; six digits allow for .333333 thrice


@dataclass(frozen=True)
class Stage:
    """A part of the budget, [start, end) as fractions, in which one mixture of strategies runs.

    `mixture` gives each strategy's probability per step; `cost` is the expected units per sample,
    Σ weight · C, since every step uses the same batch size. What follows is predicted, and None
    where it is not known: `score` and `score_se`, the criterion of the main strategy averaged over
    the stage, and one standard error; `progress`, training progress at its start and at its end;
    `probability`, in [0, 1], that its main strategy is the best one; `regret` >= 0, the expected
    relative shortfall of the score in the cases where it is not; `rival`, the strategy that is
    most often best instead.
    """

    start: float
    end: float
    mixture: tuple[tuple[Strategy, float], ...]
    cost: float
    score: float | None = None
    score_se: float | None = None
    progress: tuple[float, float] | None = None
    probability: float | None = None
    regret: float | None = None
    rival: Strategy | None = None

    @property
    def strategy(self) -> Strategy:
        """The strategy with the largest weight, the first of them on a tie."""
        return max(self.mixture, key=lambda entry: entry[1])[0]

    @property
    def pure(self) -> bool:
        """Whether one strategy alone runs in this stage."""
        return sum(weight > 0 for _, weight in self.mixture) == 1


def stage_to_json(stage: Stage, samples: float | None) -> dict[str, Any]:
    """The stage as JSON; `samples` is what it lasts for, and what is predicted beyond its score appears where known."""
    mixture: dict[str, Any] = {"mixture": [{"strategy": dict(s), "weight": weight} for s, weight in stage.mixture]}
    if len(stage.mixture) == 1 and stage.mixture[0][1] == 1:
        mixture = {"strategy": dict(stage.strategy)}
    predicted = {
        "progress": None if stage.progress is None else list(stage.progress),
        "probability": stage.probability,
        "regret": stage.regret,
        "rival": None if stage.rival is None else dict(stage.rival),
    }
    return {
        "start": stage.start,
        "end": stage.end,
        **mixture,
        "cost": stage.cost,
        "samples": samples,
        "score": stage.score,
        "score_se": stage.score_se,
        **{name: value for name, value in predicted.items() if value is not None},
    }


def stage_from_json(value: Any, where: str) -> Stage:
    """Read what `stage_to_json` wrote or a person edited. Raises ScheduleError that names the field after `where`."""
    fields = Fields(value, where)
    if "strategy" in fields and "mixture" in fields:
        raise ScheduleError(f"{fields.path('mixture')}: give either strategy or mixture, not both")
    mixture: list[tuple[Strategy, float]] = []
    if "mixture" in fields:
        for i, entry in enumerate(fields.items("mixture")):
            part = Fields(entry, f"{where}mixture[{i}].")
            mixture.append((_strategy_from_json(part, "strategy"), part.number("weight")))
            part.done()
    else:
        mixture.append((_strategy_from_json(fields, "strategy"), 1.0))

    def optional(name: str) -> float | None:
        return fields.number(name) if fields.given(name) else None

    stage = Stage(
        start=fields.number("start"),
        end=fields.number("end"),
        mixture=tuple(mixture),
        cost=fields.number("cost"),
        score=optional("score"),
        score_se=optional("score_se"),
        progress=_progress_from_json(fields) if fields.given("progress") else None,
        probability=optional("probability"),
        regret=optional("regret"),
        rival=_strategy_from_json(fields, "rival") if fields.given("rival") else None,
    )
    optional("samples")
    fields.done()
    return stage


def check_stage(stage: Stage, where: str) -> None:
    """Raises ScheduleError, naming the field of the stage at `where`, for values that do not make a stage."""
    for name, edge in (("start", stage.start), ("end", stage.end)):
        if not 0 <= edge <= 1:
            raise ScheduleError(f"{where}.{name}: {edge} is not a fraction of the budget in [0, 1]")
    if not stage.start < stage.end:
        raise ScheduleError(f"{where}.end: {stage.end} is not after its start {stage.start}")
    if not (math.isfinite(stage.cost) and stage.cost > 0 and math.isfinite(1 / stage.cost)):
        raise ScheduleError(f"{where}.cost: {stage.cost} must be a positive number of units per sample")
    _check_mixture(stage.mixture, where)
    _check_predictions(stage, where)


def _check_mixture(mixture: tuple[tuple[Strategy, float], ...], where: str) -> None:
    if not mixture:
        raise ScheduleError(f"{where}.mixture: at least one strategy is needed")
    seen: list[Strategy] = []
    for i, (strategy, weight) in enumerate(mixture):
        if not len(strategy):
            raise ScheduleError(f"{where}.strategy: a strategy needs a value on at least one axis")
        if strategy in seen:
            raise ScheduleError(f"{where}.mixture[{i}].strategy: {strategy} is given twice")
        if not 0 <= weight <= 1:
            raise ScheduleError(f"{where}.mixture[{i}].weight: {weight} is not a probability in [0, 1]")
        if set(strategy) != set(mixture[0][0]):
            raise ScheduleError(f"{where}.mixture[{i}].strategy: {strategy} has other axes than {mixture[0][0]}")
        seen.append(strategy)
    total = math.fsum(weight for _, weight in mixture)
    if abs(total - 1) > _WEIGHT_TOLERANCE:
        raise ScheduleError(f"{where}.mixture: the weights sum to {total:.6g}, not 1")


def _check_predictions(stage: Stage, where: str) -> None:
    if stage.score is not None and not math.isfinite(stage.score):
        raise ScheduleError(f"{where}.score: {stage.score} must be a finite number, or None where it is not known")
    for name, value in (("score_se", stage.score_se), ("regret", stage.regret)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ScheduleError(f"{where}.{name}: {value} must be a number of at least 0, or None")
    if stage.probability is not None and not 0 <= stage.probability <= 1:
        raise ScheduleError(f"{where}.probability: {stage.probability} is not a probability in [0, 1]")
    if stage.progress is not None:
        first, last = stage.progress
        if not (math.isfinite(last) and 0 <= first <= last):
            raise ScheduleError(
                f"{where}.progress: {list(stage.progress)} must be the training progress at the stage's start and "
                "end, two numbers of at least 0 that do not fall"
            )
    if stage.rival is not None and set(stage.rival) != set(stage.strategy):
        raise ScheduleError(f"{where}.rival: {stage.rival} has other axes than {stage.strategy}")


def _strategy_from_json(fields: Fields, name: str) -> Strategy:
    try:
        return Strategy(fields.mapping(name))
    except UsageError as error:
        raise ScheduleError(f"{fields.path(name)}: {error}") from None


def _progress_from_json(fields: Fields) -> tuple[float, float]:
    numbers = fields.numbers("progress")
    if len(numbers) != 2:
        raise ScheduleError(f"{fields.path('progress')}: expected two numbers, found {describe(list(numbers))}")
    return numbers[0], numbers[1]

"""Schedules: which strategy runs at which fraction of the spent budget, as a value and as JSON."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schedulers.errors import GradscopeError, ScheduleError, UsageError
from schedulers.fields import Fields, parse_json
from schedulers.strategy import Strategy

SCHEMA_VERSION = 1
PROGRESS_MODES = ("fraction",)
_STRATEGY = re.compile(r'"strategy": \{[^{}]*\}(,\s*"weight": [^\s}]+)?')  # one line each, for people
_WEIGHT_TOLERANCE = 1e-6  # a hand-written .333, .333, .334 is exact; six digits allow for .333333 thrice


def library_version() -> str:
    """Version of the installed distribution, "" when it runs from a bare source tree."""
    try:
        return importlib.metadata.version("gradscope")
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Stage:
    """A part of the budget, [start, end) as fractions, in which one mixture of strategies runs.

    `mixture` gives each strategy's probability per step; `cost` is the expected units per sample,
    Σ weight · C, since every step uses the same batch size. `score` and `score_se` are the predicted
    criterion of the main strategy, averaged over the stage, and one standard error, or None.
    """

    start: float
    end: float
    mixture: tuple[tuple[Strategy, float], ...]
    cost: float
    score: float | None = None
    score_se: float | None = None

    @property
    def strategy(self) -> Strategy:
        """The strategy with the largest weight, the first of them on a tie."""
        return max(self.mixture, key=lambda entry: entry[1])[0]

    @property
    def pure(self) -> bool:
        """Whether one strategy alone runs in this stage."""
        return sum(weight > 0 for _, weight in self.mixture) == 1


@dataclass(frozen=True)
class Schedule:
    """A piecewise-constant map from the spent fraction of the budget to a mixture of strategies.

    `stages` cover [0, 1] without gap or overlap. `budget` in units and `batch_size` in samples are
    None for a hand-made schedule, which fits any. Raises ScheduleError, naming the field, for
    values that do not make a schedule.
    """

    stages: tuple[Stage, ...]
    budget: float | None = None
    batch_size: int | None = None
    cost_model: str = "tokens"
    criterion: str | None = None
    metric: str | None = None
    progress_mode: str = "fraction"
    constraints: dict[str, Any] = field(default_factory=dict)
    cube_digest: str = ""
    library_version: str = field(default_factory=library_version)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "constraints", _plain_json(self.constraints))
        _check_schedule(self)

    def at(self, fraction: float) -> Stage:
        """The stage that runs at `fraction` of the budget; the last one from 1 on.

        Raises UsageError for a fraction that is negative or NaN.
        """
        if not fraction >= 0:
            raise UsageError(f"fraction={fraction!r} of the budget must be at least 0")
        return next((stage for stage in self.stages if fraction < stage.end), self.stages[-1])

    def draw(self, fraction: float, *, seed: int, step: int) -> Strategy:
        """The strategy of one step: drawn from the stage's mixture by a hash of seed and step alone.

        A pure function: every rank, and a run that is resumed, draws the same.
        """
        mixture = self.at(fraction).mixture
        digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
        level = int.from_bytes(digest, "big") / 2**64
        passed = 0.0
        for strategy, weight in mixture:
            passed += weight
            if level < passed:
                return strategy
        return next(strategy for strategy, weight in reversed(mixture) if weight > 0)

    def samples(self, stage: Stage) -> float:
        """Samples that the stage's share of the budget pays for: (end − start) · budget / cost.

        Raises UsageError for a schedule without a budget.
        """
        if self.budget is None:
            raise UsageError("this schedule has no budget; give one with dataclasses.replace(schedule, budget=...)")
        return (stage.end - stage.start) * self.budget / stage.cost

    @property
    def total_samples(self) -> float:
        """Samples of the whole schedule. Raises UsageError for a schedule without a budget."""
        return math.fsum(self.samples(stage) for stage in self.stages)

    @property
    def cost(self) -> float:
        """Mean units per sample over the budget: budget / samples = 1 / Σ (end − start) / cost."""
        return 1 / math.fsum((stage.end - stage.start) / stage.cost for stage in self.stages)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Every strategy with a positive weight in some stage, in the order of first appearance."""
        found = [strategy for stage in self.stages for strategy, weight in stage.mixture if weight > 0]
        return tuple(dict.fromkeys(found))

    def to_json(self) -> str:
        """The schedule as a readable JSON text (schema version 1); `samples` is null without a budget."""
        values = {
            "schema_version": SCHEMA_VERSION,
            "budget": self.budget,
            "batch_size": self.batch_size,
            "cost_model": self.cost_model,
            "criterion": self.criterion,
            "metric": self.metric,
            "progress_mode": self.progress_mode,
            "stages": [
                {
                    "start": stage.start,
                    "end": stage.end,
                    **_mixture_to_json(stage.mixture),
                    "cost": stage.cost,
                    "samples": None if self.budget is None else self.samples(stage),
                    "score": stage.score,
                    "score_se": stage.score_se,
                }
                for stage in self.stages
            ],
            "constraints": self.constraints,
            "cube_digest": self.cube_digest,
            "library_version": self.library_version,
        }
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        return _STRATEGY.sub(lambda match: re.sub(r"\n\s*", " ", match[0]), text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote or a person edited. Raises ScheduleError that names the field.

        A stage needs `start`, `end`, `cost` and either `strategy` or `mixture`; `samples` follows
        from the others and is not read back. Every other field has a default.
        """
        fields = Fields(parse_json(text))
        version = fields.whole("schema_version")
        if version > SCHEMA_VERSION:
            raise ScheduleError(
                f"schema_version: {version} is newer than {SCHEMA_VERSION}, the newest this version reads; "
                "upgrade gradscope"
            )
        if version < 1:
            raise ScheduleError(f"schema_version: {version} was never a version; this one is {SCHEMA_VERSION}")
        stages = [_stage_from_json(value, f"stages[{i}].") for i, value in enumerate(fields.items("stages"))]
        schedule = cls(
            stages=tuple(stages),
            budget=fields.number("budget") if fields.given("budget") else None,
            batch_size=fields.whole("batch_size") if fields.given("batch_size") else None,
            cost_model=fields.text("cost_model") if fields.given("cost_model") else "tokens",
            criterion=fields.text("criterion") if fields.given("criterion") else None,
            metric=fields.text("metric") if fields.given("metric") else None,
            progress_mode=fields.text("progress_mode") if fields.given("progress_mode") else "fraction",
            constraints=fields.mapping("constraints") if fields.given("constraints") else {},
            cube_digest=fields.text("cube_digest") if fields.given("cube_digest") else "",
            library_version=fields.text("library_version") if fields.given("library_version") else "",
        )
        fields.done()
        return schedule


def constant_schedule(strategy: Strategy, cost: float) -> Schedule:
    """One strategy throughout, at `cost` units per sample."""
    return Schedule(stages=(Stage(0.0, 1.0, ((strategy, 1.0),), float(cost)),))


def mixed_schedule(strategies: Sequence[Strategy], costs: Sequence[float]) -> Schedule:
    """Every step draws one of `strategies`, all with the same probability: the pilot run of design §4.

    `costs` are units per sample, one for each strategy. Raises UsageError when the lengths differ.
    """
    if not strategies or len(strategies) != len(costs):
        raise UsageError(f"{len(strategies)} strategies and {len(costs)} costs: give one cost for each of them")
    weight = 1 / len(strategies)
    cost = math.fsum(float(c) for c in costs) / len(costs)
    return Schedule(stages=(Stage(0.0, 1.0, tuple((s, weight) for s in strategies), cost),))


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read a schedule file. Raises UsageError when it cannot be read, ScheduleError when it is not valid."""
    try:
        return Schedule.from_json(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise UsageError(f"schedule file {os.fspath(path)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ScheduleError(f"{os.fspath(path)}: not a schedule: the file is not UTF-8 text") from None
    except ScheduleError as error:
        raise ScheduleError(f"{os.fspath(path)}: {error}") from None


def save_schedule(schedule: Schedule, path: str | os.PathLike[str]) -> None:
    """Write a schedule file whole or not at all: a temporary sibling, fsync, rename.

    Raises GradscopeError when the folder is missing or cannot be written.
    """
    target = Path(path)
    text = schedule.to_json()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise GradscopeError(f"{target}: cannot be written ({reason}); choose a folder you may write to") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _stage_from_json(value: Any, where: str) -> Stage:
    fields = Fields(value, where)
    if "strategy" in fields and "mixture" in fields:
        raise ScheduleError(f"{fields.path('mixture')}: give either strategy or mixture, not both")
    mixture: list[tuple[Strategy, float]] = []
    if "mixture" in fields:
        for i, entry in enumerate(fields.items("mixture")):
            part = Fields(entry, f"{where}mixture[{i}].")
            mixture.append((_strategy_from_json(part), part.number("weight")))
            part.done()
    else:
        mixture.append((_strategy_from_json(fields), 1.0))
    stage = Stage(
        start=fields.number("start"),
        end=fields.number("end"),
        mixture=tuple(mixture),
        cost=fields.number("cost"),
        score=fields.number("score") if fields.given("score") else None,
        score_se=fields.number("score_se") if fields.given("score_se") else None,
    )
    if fields.given("samples"):
        fields.number("samples")
    fields.done()
    return stage


def _strategy_from_json(fields: Fields) -> Strategy:
    try:
        return Strategy(fields.mapping("strategy"))
    except UsageError as error:
        raise ScheduleError(f"{fields.path('strategy')}: {error}") from None


def _mixture_to_json(mixture: tuple[tuple[Strategy, float], ...]) -> dict[str, Any]:
    if len(mixture) == 1 and mixture[0][1] == 1:
        return {"strategy": dict(mixture[0][0])}
    return {"mixture": [{"strategy": dict(strategy), "weight": weight} for strategy, weight in mixture]}


def _plain_json(constraints: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(constraints, allow_nan=False)))
    except (TypeError, ValueError):
        raise ScheduleError(f"constraints: {constraints!r} cannot be written as JSON without NaN") from None


def _check_schedule(schedule: Schedule) -> None:
    if not schedule.stages:
        raise ScheduleError("stages: a schedule needs at least one stage")
    if schedule.budget is not None and not (math.isfinite(schedule.budget) and schedule.budget > 0):
        raise ScheduleError(f"budget: {schedule.budget} must be a positive number of units")
    if schedule.batch_size is not None and schedule.batch_size < 1:
        raise ScheduleError(f"batch_size: {schedule.batch_size} must be at least 1")
    if schedule.progress_mode not in PROGRESS_MODES:
        raise ScheduleError(
            f"progress_mode: {schedule.progress_mode!r} is not known; it is one of {', '.join(PROGRESS_MODES)}"
        )
    for i, stage in enumerate(schedule.stages):
        _check_stage(stage, f"stages[{i}]")
        if set(stage.strategy) != set(schedule.stages[0].strategy):
            raise ScheduleError(
                f"stages[{i}]: the axes of {stage.strategy} are not those of {schedule.stages[0].strategy} in stages[0]"
            )
    _check_cover(schedule.stages)


def _check_cover(stages: tuple[Stage, ...]) -> None:
    if stages[0].start != 0:
        raise ScheduleError(f"stages[0].start: {stages[0].start} must be 0")
    for i in range(1, len(stages)):
        before, start = stages[i - 1].end, stages[i].start
        if start != before:
            kind = "leaves a gap after" if start > before else "overlaps"
            raise ScheduleError(f"stages[{i}].start: {start} {kind} stages[{i - 1}], which ends at {before}")
    if stages[-1].end != 1:
        raise ScheduleError(f"stages[{len(stages) - 1}].end: {stages[-1].end} must be 1, the end of the budget")


def _check_stage(stage: Stage, where: str) -> None:
    for name, value in (("start", stage.start), ("end", stage.end)):
        if not 0 <= value <= 1:
            raise ScheduleError(f"{where}.{name}: {value} is not a fraction of the budget in [0, 1]")
    if not stage.start < stage.end:
        raise ScheduleError(f"{where}.end: {stage.end} is not after its start {stage.start}")
    if not (math.isfinite(stage.cost) and stage.cost > 0):
        raise ScheduleError(f"{where}.cost: {stage.cost} must be a positive number of units per sample")
    if stage.score is not None and not math.isfinite(stage.score):
        raise ScheduleError(f"{where}.score: {stage.score} must be a finite number, or None where it is not known")
    if stage.score_se is not None and not (math.isfinite(stage.score_se) and stage.score_se >= 0):
        raise ScheduleError(f"{where}.score_se: {stage.score_se} must be a number of at least 0, or None")
    if not stage.mixture:
        raise ScheduleError(f"{where}.mixture: at least one strategy is needed")
    seen: list[Strategy] = []
    for i, (strategy, weight) in enumerate(stage.mixture):
        if not len(strategy):
            raise ScheduleError(f"{where}.strategy: a strategy needs a value on at least one axis")
        if strategy in seen:
            raise ScheduleError(f"{where}.mixture[{i}].strategy: {strategy} is given twice")
        if not 0 <= weight <= 1:
            raise ScheduleError(f"{where}.mixture[{i}].weight: {weight} is not a probability in [0, 1]")
        if set(strategy) != set(stage.mixture[0][0]):
            raise ScheduleError(f"{where}.mixture[{i}].strategy: {strategy} has other axes than {stage.mixture[0][0]}")
        seen.append(strategy)
    total = math.fsum(weight for _, weight in stage.mixture)
    if abs(total - 1) > _WEIGHT_TOLERANCE:
        raise ScheduleError(f"{where}.mixture: the weights sum to {total:.6g}, not 1")

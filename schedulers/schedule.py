"""Schedules: which strategy runs at which fraction of the spent budget, as a value and as JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from schedulers.counts import exact
from schedulers.errors import ScheduleError, UsageError, WriteError
from schedulers.fields import Fields, parse_json
from schedulers.mixing import draw_from
from schedulers.stage import Stage as Stage  # part of this module for those who build schedules
from schedulers.stage import check_stage, stage_from_json, stage_to_json
from schedulers.strategy import Strategy

SCHEMA_VERSION = 2
PROGRESS_MODES = ("fraction", "trajectory")
_ONE_LINE = re.compile(  # what people read as one thing: an entry of a mixture, a strategy, the ends of progress
    r'\{\s*"strategy": \{[^{}]*\},\s*"weight": [^\s}]+\s*\}|"(?:strategy|rival)": \{[^{}]*\}|"progress": \[[^][{}]*\]'
)


def library_version() -> str:
    """Version of the installed distribution, "" when it runs from a bare source tree."""
    try:
        return importlib.metadata.version("gradscope")
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Schedule:
    """A piecewise-constant map from the spent fraction of the budget to a mixture of strategies.

    `stages` cover [0, 1] without gap or overlap. `budget` in units and `batch_size` in samples are
    None for a hand-made schedule, which fits any. `progress_mode` says how training progress was
    predicted (design §6); `constraints` and `predicted` hold plain JSON: what the schedule keeps, and
    what is expected of it as a whole. Raises ScheduleError, naming the field, for values that do not
    make a schedule.
    """

    stages: tuple[Stage, ...]
    budget: float | None = None
    batch_size: int | None = None
    cost_model: str = "tokens"
    criterion: str | None = None
    metric: str | None = None
    progress_mode: str = "fraction"
    constraints: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    cube_digest: str = ""
    library_version: str = field(default_factory=library_version)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        for name in ("constraints", "predicted"):
            object.__setattr__(self, name, _plain_json(name, getattr(self, name)))
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
        return draw_from(self.at(fraction).mixture, seed=seed, step=step)

    def stage_samples(self, stage: Stage) -> float:
        """Samples that the stage's share of the budget pays for: (end − start) · budget / cost.

        Raises UsageError for a schedule without a budget.
        """
        return (stage.end - stage.start) * self._known_budget() / stage.cost

    def same_stages(self, other: Schedule) -> bool:
        """Whether both run the same mixtures in the same parts of the budget, whatever is predicted of them."""
        ours, theirs = ([(s.start, s.end, dict(s.mixture)) for s in one.stages] for one in (self, other))
        return ours == theirs

    @property
    def total_samples(self) -> float:
        """Samples of the whole schedule, Σ (end − start) · budget / cost, in fractions of a sample.

        Raises UsageError for a schedule without a budget.
        """
        return math.fsum(self.stage_samples(stage) for stage in self.stages)

    def samples(self, batch: int) -> int:
        """Samples of a run in whole steps of `batch` samples: `batch` times `steps(batch)`, and raises as it does."""
        return batch * self.steps(batch)

    def steps(self, batch: int) -> int:
        """Steps of a run that takes whole steps of `batch` samples, as the bundled trainer does.

        A step runs the stage at the fraction spent before it, for batch · cost units (the expected cost
        of a mixture); the run ends before the first step that the rest of the budget does not pay for.
        So a step that begins a stage early runs over its end, and nothing is ever spent over the budget.
        Costs and budget are those of `cost_model`; the bundled trainer counts in `tokens` and runs a
        schedule of another model `in_costs` of these. Counted in exact arithmetic: a sum of rounded costs
        that ends exactly at a stage's edge, or at the budget's, may come to one step more or less there.

        Raises UsageError for a schedule without a budget and for a batch below 1.
        """
        if batch < 1:
            raise UsageError(f"batch={batch!r} must be at least 1 sample")
        budget = exact(self._known_budget())
        spent, steps = Fraction(0), 0
        for stage in self.stages:
            step = batch * exact(stage.cost)
            to_end = max(math.ceil((exact(stage.end) * budget - spent) / step), 0)
            affordable = math.floor((budget - spent) / step)
            steps += min(to_end, affordable)
            if affordable < to_end:
                break
            spent += to_end * step
        return steps

    def _known_budget(self) -> float:
        if self.budget is None:
            raise UsageError("this schedule has no budget; give one with dataclasses.replace(schedule, budget=...)")
        return self.budget

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
        """The schedule as a readable JSON text (schema version 2); `samples` is null without a budget."""
        values = {
            "schema_version": SCHEMA_VERSION,
            "budget": self.budget,
            "batch_size": self.batch_size,
            "cost_model": self.cost_model,
            "criterion": self.criterion,
            "metric": self.metric,
            "progress_mode": self.progress_mode,
            "stages": [
                stage_to_json(stage, None if self.budget is None else self.stage_samples(stage))
                for stage in self.stages
            ],
            "constraints": self.constraints,
            "predicted": self.predicted,
            "cube_digest": self.cube_digest,
            "library_version": self.library_version,
        }
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        return _ONE_LINE.sub(lambda match: re.sub(r"\n\s*", " ", match[0]), text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote or a person edited. Raises ScheduleError that names the field.

        A stage needs `start`, `end`, `cost` and either `strategy` or `mixture`; `samples` follows
        from the others and is not read back. Every other field has a default. Version 1 is the same
        without predictions beyond the score.
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
        stages = [stage_from_json(value, f"stages[{i}].") for i, value in enumerate(fields.items("stages"))]
        schedule = cls(
            stages=tuple(stages),
            budget=fields.number("budget") if fields.given("budget") else None,
            batch_size=fields.whole("batch_size") if fields.given("batch_size") else None,
            cost_model=fields.text("cost_model") if fields.given("cost_model") else "tokens",
            criterion=fields.text("criterion") if fields.given("criterion") else None,
            metric=fields.text("metric") if fields.given("metric") else None,
            progress_mode=fields.text("progress_mode") if fields.given("progress_mode") else "fraction",
            constraints=fields.mapping("constraints") if fields.given("constraints") else {},
            predicted=fields.mapping("predicted") if fields.given("predicted") else {},
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


def in_costs(schedule: Schedule, cost: Callable[[Strategy], float], cost_model: str) -> Schedule:
    """The same run counted in other costs: every stage lasts for as many samples as before.

    `cost` gives units per sample of a strategy under `cost_model`, C' of a stage the mean by its mixture's weights.
    A stage's share of the budget becomes proportional to (end − start) · C' / C, which also moves the edges, and the
    budget, if there is one, B' = B Σ (end − start) · C' / C. What was predicted in the old units (scores, `predicted`)
    is left out. Raises ScheduleError for costs that are not positive numbers.
    """
    costs = [math.fsum(w * float(cost(s)) for s, w in stage.mixture if w > 0) for stage in schedule.stages]
    if not all(math.isfinite(value) and value > 0 for value in costs):
        raise ScheduleError(f"cost: the stages cost {costs} under {cost_model}; costs must be positive numbers")
    spent = [(stage.end - stage.start) * new / stage.cost for stage, new in zip(schedule.stages, costs, strict=True)]
    total = math.fsum(spent)
    edges = [0.0, *(math.fsum(spent[: i + 1]) / total for i in range(len(spent) - 1)), 1.0]
    return replace(
        schedule,
        stages=tuple(
            replace(stage, start=edges[i], end=edges[i + 1], cost=costs[i], score=None, score_se=None)
            for i, stage in enumerate(schedule.stages)
        ),
        budget=None if schedule.budget is None else schedule.budget * total,
        cost_model=cost_model,
        predicted={},
    )


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

    Raises WriteError when the folder is missing or cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise WriteError(f"{target}: a folder; name a file in it")
    text = schedule.to_json()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise WriteError.of(target, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _plain_json(name: str, values: dict[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(values, allow_nan=False, ensure_ascii=False)
        text.encode()
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"{name}: cannot be written as JSON without NaN ({error})") from None


def _check_schedule(schedule: Schedule) -> None:
    if not schedule.stages:
        raise ScheduleError("stages: a schedule needs at least one stage")
    for name in ("cost_model", "criterion", "metric", "cube_digest", "library_version"):
        try:
            (getattr(schedule, name) or "").encode()
        except UnicodeEncodeError:
            raise ScheduleError(f"{name}: {getattr(schedule, name)!r} is no Unicode text") from None
    if schedule.budget is not None and not (math.isfinite(schedule.budget) and schedule.budget > 0):
        raise ScheduleError(f"budget: {schedule.budget} must be a positive number of units")
    if schedule.batch_size is not None and schedule.batch_size < 1:
        raise ScheduleError(f"batch_size: {schedule.batch_size} must be at least 1")
    if schedule.progress_mode not in PROGRESS_MODES:
        raise ScheduleError(
            f"progress_mode: {schedule.progress_mode!r} is not known; it is one of {', '.join(PROGRESS_MODES)}"
        )
    for i, stage in enumerate(schedule.stages):
        check_stage(stage, f"stages[{i}]")
        if set(stage.strategy) != set(schedule.stages[0].strategy):
            raise ScheduleError(
                f"stages[{i}]: the axes of {stage.strategy} are not those of {schedule.stages[0].strategy} in stages[0]"
            )
        if schedule.budget is not None and not math.isfinite(schedule.stage_samples(stage)):
            raise ScheduleError(
                f"stages[{i}].cost: {stage.cost} is too small for a budget of {schedule.budget:g} units"
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

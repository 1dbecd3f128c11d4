import dataclasses
import itertools
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from schedulers import (
    GradscopeError,
    Schedule,
    ScheduleError,
    Stage,
    Strategy,
    UsageError,
    constant_schedule,
    load_schedule,
    mixed_schedule,
    save_schedule,
)
from schedulers.schedule import in_costs

LARGE, BASE = Strategy(patch=30, dropout=0.5), Strategy(patch=16, dropout=0)


def two_stages(**changes) -> Schedule:
    stages = (Stage(0.0, 0.4, ((LARGE, 1.0),), 2.0, 0.7, 0.01), Stage(0.4, 1.0, ((BASE, 0.75), (LARGE, 0.25)), 4.0))
    return Schedule(**{"stages": stages, "budget": 1000.0, "batch_size": 8, "criterion": "descent", **changes})


NAMES = st.text(max_size=8)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=1e-6, max_value=1e12)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | FINITE | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def schedules(draw) -> Schedule:
    axes = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    values = st.integers(-(10**6), 10**6) | FINITE | NAMES
    cuts = draw(st.lists(st.floats(0.001, 0.999), max_size=4, unique=True))
    edges = [0.0, *sorted(cuts), 1.0]
    stages = []
    for start, end in itertools.pairwise(edges):
        strategies = draw(
            st.lists(
                st.fixed_dictionaries({a: values for a in axes}).map(Strategy), min_size=1, max_size=3, unique=True
            )
        )
        shares = draw(st.lists(st.integers(1, 9), min_size=len(strategies), max_size=len(strategies)))
        mixture = tuple((s, share / sum(shares)) for s, share in zip(strategies, shares, strict=True))
        progress = draw(st.none() | st.lists(st.floats(0, 2), min_size=2, max_size=2).map(sorted).map(tuple))
        stages.append(
            Stage(
                start=start,
                end=end,
                mixture=mixture,
                cost=draw(POSITIVE),
                score=draw(st.none() | FINITE),
                score_se=draw(st.none() | POSITIVE),
                progress=progress,
                probability=draw(st.none() | st.floats(0, 1)),
                regret=draw(st.none() | POSITIVE),
                rival=draw(st.none() | st.fixed_dictionaries({a: values for a in axes}).map(Strategy)),
            )
        )
    return Schedule(
        stages=tuple(stages),
        budget=draw(st.none() | POSITIVE),
        batch_size=draw(st.none() | st.integers(1, 10**6)),
        cost_model=draw(NAMES),
        criterion=draw(st.none() | NAMES),
        metric=draw(st.none() | NAMES),
        progress_mode=draw(st.sampled_from(["fraction", "trajectory"])),
        predicted=draw(st.dictionaries(NAMES, JSON_VALUES, max_size=3)),
        constraints=draw(st.dictionaries(NAMES, JSON_VALUES, max_size=3)),
        cube_digest=draw(NAMES),
        library_version=draw(NAMES),
    )


@settings(deadline=None, max_examples=200)
@given(schedules())
def test_json_brings_a_schedule_back(schedule: Schedule) -> None:
    text = schedule.to_json()
    assert Schedule.from_json(text) == schedule
    assert json.loads(text)["schema_version"] == 2


@settings(deadline=None)
@given(st.text() | JSON_VALUES.map(json.dumps))
def test_other_texts_raise_one_kind_of_error(text: str) -> None:
    with pytest.raises(ScheduleError):
        Schedule.from_json(text)


def test_the_text_holds_what_a_person_edits() -> None:
    text = two_stages().to_json()
    assert '"strategy": { "patch": 30, "dropout": 0.5 },' in text
    assert json.loads(text)["stages"] == [
        {"start": 0.0, "end": 0.4, "strategy": {"patch": 30, "dropout": 0.5}, "cost": 2.0, "samples": 200.0}
        | {"score": 0.7, "score_se": 0.01},
        {
            "start": 0.4,
            "end": 1.0,
            "mixture": [
                {"strategy": {"patch": 16, "dropout": 0}, "weight": 0.75},
                {"strategy": {"patch": 30, "dropout": 0.5}, "weight": 0.25},
            ],
            "cost": 4.0,
            "samples": 150.0,
            "score": None,
            "score_se": None,
        },
    ]


def test_predictions_are_written_where_they_are_known() -> None:
    first, second = two_stages().stages
    first = dataclasses.replace(first, progress=(0.0, 0.25), probability=0.875, regret=0.125, rival=BASE)
    schedule = two_stages(stages=(first, second), progress_mode="trajectory", predicted={"progress": 0.5})
    text = schedule.to_json()
    assert '"rival": { "patch": 16, "dropout": 0 }' in text
    values = json.loads(text)
    stage = values["stages"][0]
    assert (stage["progress"], stage["probability"], stage["regret"]) == ([0.0, 0.25], 0.875, 0.125)
    assert not {"progress", "probability", "regret", "rival"} & set(values["stages"][1])
    assert (values["predicted"], values["progress_mode"]) == ({"progress": 0.5}, "trajectory")
    assert Schedule.from_json(text) == schedule


def test_a_file_of_version_1_is_read() -> None:
    schedule = load_schedule(Path(__file__).parent.parent / "data" / "schedule-v1.json")
    large, middle, base = (Strategy(patch=p, dropout=d) for p, d in ((7, 0.5), (4, 0), (2, 0)))
    assert schedule == Schedule(
        stages=(
            Stage(0.0, 0.35, ((large, 1.0),), 0.875, 0.71, 0.012),
            Stage(0.35, 0.8, ((middle, 0.925), (large, 0.05), (base, 0.025)), 1.24375, 0.44),
            Stage(0.8, 1.0, ((base, 1.0),), 4.0),
        ),
        budget=300_000.0,
        batch_size=64,
        criterion="descent",
        metric="optimizer",
        constraints={"allowed": None, "monotone": ["cost"], "max_switches": 2, "min_dwell": 0.0}
        | {"final_reference": 0.2, "slices": 100, "exploration": 0.075},
        cube_digest="5b0e",
        library_version="0.1.0",
    )
    assert all(stage.progress is stage.probability is stage.rival is stage.regret is None for stage in schedule.stages)
    assert (schedule.predicted, schedule.progress_mode) == ({}, "fraction")


def test_a_short_hand_written_file_is_enough() -> None:
    text = '{"schema_version": 1, "stages": [{"start": 0, "end": 1, "strategy": {"mode": "a"}, "cost": 2}]}'
    schedule = Schedule.from_json(text)
    assert schedule.stages == (Stage(0.0, 1.0, ((Strategy(mode="a"), 1.0),), 2.0),)
    assert (schedule.budget, schedule.cost_model, schedule.progress_mode) == (None, "tokens", "fraction")


STAGE = "stages.1."  # the second stage, by the path that `edited` takes


def edited(changes: dict) -> str:
    """The text of a schedule of three stages with fields replaced (or deleted, by the value `...`)."""
    stages = tuple(Stage(k / 4, (k + 1) / 4 if k < 2 else 1.0, ((LARGE, 1.0),), 2.0) for k in range(3))
    values = json.loads(two_stages(stages=stages).to_json())
    values["stages"][2] = json.loads(two_stages().to_json())["stages"][1] | {"start": 0.5}
    for path, value in changes.items():
        *parents, name = [int(part) if part.isdigit() else part for part in path.split(".")]
        place = values
        for part in parents:
            place = place[part]
        if value is ...:
            del place[name]
        else:
            place[name] = value
    return json.dumps(values)


def test_the_edited_text_is_valid_before_the_edit() -> None:
    assert len(Schedule.from_json(edited({})).stages) == 3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({STAGE + "start": 0.3}, r"^stages\[1\]\.start: 0\.3 leaves a gap after stages\[0\], which ends at 0\.25"),
        ({STAGE + "start": 0.2}, r"^stages\[1\]\.start: 0\.2 overlaps stages\[0\]"),
        ({STAGE + "end": 0.1}, r"^stages\[1\]\.end: 0\.1 is not after its start 0\.25"),
        ({STAGE + "end": 0.25}, r"^stages\[1\]\.end: 0\.25 is not after"),
        ({STAGE + "end": 1.5}, r"^stages\[1\]\.end: 1\.5 is not a fraction"),
        ({STAGE + "start": -0.5}, r"^stages\[1\]\.start: -0\.5 is not a fraction"),
        ({"stages.0.start": 0.1}, r"^stages\[0\]\.start: 0\.1 must be 0"),
        ({"stages.2.end": 0.9}, r"^stages\[2\]\.end: 0\.9 must be 1"),
        ({"stages": []}, r"^stages: a schedule needs at least one stage"),
        ({"stages": {}}, r"^stages: expected a list in brackets, found \{\}"),
        ({"stages.1": 3}, r"^stages\[1\]: expected an object in braces, found 3"),
        ({STAGE + "end": "0.5"}, r'^stages\[1\]\.end: expected a number, found "0\.5"'),
        ({STAGE + "end": True}, r"^stages\[1\]\.end: expected a number, found true"),
        ({STAGE + "end": None}, r"^stages\[1\]\.end: expected a number, found null"),
        ({STAGE + "end": ...}, r"^stages\[1\]\.end: this field is missing"),
        ({STAGE + "cost": ...}, r"^stages\[1\]\.cost: this field is missing"),
        ({STAGE + "cost": -1}, r"^stages\[1\]\.cost: -1\.0 must be a positive number"),
        ({STAGE + "cost": 0}, r"^stages\[1\]\.cost: 0\.0 must be a positive number"),
        ({STAGE + "cost": 10**400}, r"^stages\[1\]\.cost: expected a finite number"),
        ({STAGE + "score_se": -1}, r"^stages\[1\]\.score_se: -1\.0"),
        ({STAGE + "progress": 0.5}, r"^stages\[1\]\.progress: expected a list in brackets, found 0\.5"),
        ({STAGE + "progress": [0.5]}, r"^stages\[1\]\.progress: expected two numbers, found \[0\.5\]"),
        ({STAGE + "progress": [0, "1"]}, r'^stages\[1\]\.progress\[1\]: expected a number, found "1"'),
        ({STAGE + "progress": [0.5, 0.4]}, r"^stages\[1\]\.progress: \[0\.5, 0\.4\] must be .* do not fall"),
        ({STAGE + "progress": [-0.1, 0.4]}, r"^stages\[1\]\.progress: \[-0\.1, 0\.4\] must be .* at least 0"),
        ({STAGE + "probability": 1.5}, r"^stages\[1\]\.probability: 1\.5 is not a probability in \[0, 1\]"),
        ({STAGE + "probability": "high"}, r"^stages\[1\]\.probability: expected a number"),
        ({STAGE + "regret": -0.1}, r"^stages\[1\]\.regret: -0\.1 must be a number of at least 0"),
        ({STAGE + "rival": "patch=16"}, r"^stages\[1\]\.rival: expected an object in braces"),
        ({STAGE + "rival": {"patch": [16]}}, r"^stages\[1\]\.rival: axis 'patch': \[16\] is neither"),
        ({STAGE + "rival": {"patch": 16}}, r"^stages\[1\]\.rival: patch=16 has other axes than patch=30,dropout=0\.5"),
        ({"predicted": [0.5]}, r"^predicted: expected an object"),
        ({STAGE + "samples": "many"}, r"^stages\[1\]\.samples: expected a number"),
        ({STAGE + "ned": 0.5}, r"^stages\[1\]\.ned: unknown field; known here: .*start, end"),
        ({STAGE + "strategy": ...}, r"^stages\[1\]\.strategy: this field is missing"),
        ({STAGE + "strategy": {}}, r"^stages\[1\]\.strategy: .* at least one axis"),
        ({STAGE + "strategy": "patch=16"}, r"^stages\[1\]\.strategy: expected an object in braces"),
        ({STAGE + "strategy.patch": [16]}, r"^stages\[1\]\.strategy: .*'patch': \[16\] is neither"),
        ({STAGE + "strategy.pacth": 16}, r"^stages\[1\]: the axes of patch=30,dropout=0\.5,pacth=16 are not those of"),
        ({STAGE + "mixture": []}, r"^stages\[1\]\.mixture: give either strategy or mixture"),
        ({"stages.2.mixture": []}, r"^stages\[2\]\.mixture: at least one strategy"),
        ({"stages.2.mixture.0": 1}, r"^stages\[2\]\.mixture\[0\]: expected an object"),
        ({"stages.2.mixture.0.weight": 0.5}, r"^stages\[2\]\.mixture: the weights sum to 0\.75, not 1"),
        ({"stages.2.mixture.0.weight": -0.1}, r"^stages\[2\]\.mixture\[0\]\.weight: -0\.1 is not a probability"),
        ({"stages.2.mixture.1.weight": ...}, r"^stages\[2\]\.mixture\[1\]\.weight: this field is missing"),
        ({"stages.2.mixture.1.wieght": 1}, r"^stages\[2\]\.mixture\[1\]\.wieght: unknown field"),
        ({"stages.2.mixture.1.strategy": {"patch": 16, "dropout": 0}}, r"^stages\[2\]\.mixture\[1\].* is given twice"),
        ({"stages.2.mixture.1.strategy": {"patch": 16}}, r"^stages\[2\]\.mixture\[1\].*: patch=16 has other axes"),
        ({"schema_version": 3}, r"^schema_version: 3 is newer than 2, the newest this version reads; upgrade"),
        ({"schema_version": 0}, r"^schema_version: 0 was never a version"),
        ({"schema_version": "1"}, r"^schema_version: expected a whole number"),
        ({"schema_version": ...}, r"^schema_version: this field is missing"),
        ({"budget": -5}, r"^budget: -5\.0 must be a positive number of units"),
        ({"budget": "100M"}, r'^budget: expected a number, found "100M"'),
        ({"batch_size": 0}, r"^batch_size: 0 must be at least 1"),
        ({"batch_size": 2.5}, r"^batch_size: expected a whole number, found 2\.5"),
        (
            {"progress_mode": "trajectories"},
            r"^progress_mode: 'trajectories' is not known; it is one of fraction, trajectory",
        ),
        ({"constraints": []}, r"^constraints: expected an object"),
        ({"criterion": 3}, r"^criterion: expected a text in quotes, found 3"),
        (
            {"notes": "mine"},
            r"^notes: unknown field; known here: schema_version, stages, budget, batch_size, cost_model, ",
        ),
    ],
)
def test_an_edit_that_breaks_the_file_is_named_by_field(changes: dict, match: str) -> None:
    with pytest.raises(ScheduleError, match=match):
        Schedule.from_json(edited(changes))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid JSON at line 1, column 1"),
        ("patch=16", "not valid JSON"),
        ("[]", r"^schedule: expected an object in braces, found \[\]"),
        (edited({})[:-30], "the text may be cut off"),
        (edited({}).replace("0.25", "NaN", 1), "NaN is not allowed in a schedule"),
        (edited({}).replace("0.25", "-Infinity", 1), "-Infinity is not allowed"),
        (edited({}).replace("0.25", "1e999", 1), "expected a finite number, found inf"),
        (edited({}).replace('"end"', '"start"', 1), "start: this field is given twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema_version": ' + "1" * 5000 + "}", "not valid JSON: Exceeds the limit"),
    ],
)
def test_what_is_not_a_schedule_at_all_is_refused(text: str, match: str) -> None:
    with pytest.raises(ScheduleError, match=match):
        Schedule.from_json(text)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stages": (Stage(0.0, 1.0, ((BASE, 1.0),), 4.0, score=math.nan),)}, r"^stages\[0\]\.score: nan"),
        ({"stages": (Stage(0.0, 1.0, ((BASE, 1.0),), 4.0, 1.0, math.nan),)}, r"^stages\[0\]\.score_se: nan"),
        ({"stages": (Stage(0.0, 1.0, ((BASE, 1.0),), math.nan),)}, r"^stages\[0\]\.cost: nan"),
        ({"stages": (Stage(0.0, math.nan, ((BASE, 1.0),), 4.0),)}, r"^stages\[0\]\.end: nan"),
        ({"stages": (Stage(0.0, 1.0, ((BASE, math.nan),), 4.0),)}, r"^stages\[0\]\.mixture\[0\]\.weight: nan"),
        ({"budget": math.nan}, "^budget: nan"),
        ({"budget": math.inf}, "^budget: inf"),
        ({"constraints": {"min_dwell": math.nan}}, "^constraints: .* without NaN"),
        ({"constraints": {"allowed": object()}}, "^constraints: "),
        ({"predicted": {"progress": math.inf}}, "^predicted: .* without NaN"),
        ({"stages": (Stage(0.0, 1.0, ((BASE, 1.0),), 4.0, progress=(0.0, math.nan)),)}, r"^stages\[0\]\.progress: "),
        ({"stages": (Stage(0.0, 1.0, ((BASE, 1.0),), 4.0, probability=math.nan),)}, r"^stages\[0\]\.probability: nan"),
        ({"stages": (Stage(0.0, 1.0, ((BASE, 1.0),), 4.0, regret=math.nan),)}, r"^stages\[0\]\.regret: nan"),
    ],
)
def test_a_schedule_that_could_not_be_written_cannot_be_made(changes: dict, match: str) -> None:
    with pytest.raises(ScheduleError, match=match):
        two_stages(**changes)


def test_the_stage_of_a_fraction() -> None:
    schedule = two_stages()
    assert [schedule.at(f).strategy for f in (0, 0.39, 0.4, 0.99, 1, 1.5)] == [LARGE, LARGE, BASE, BASE, BASE, BASE]
    for fraction in (-0.01, math.nan):
        with pytest.raises(UsageError, match="fraction="):
            schedule.at(fraction)


def test_samples_cost_and_strategies() -> None:
    schedule = two_stages()
    assert [schedule.stage_samples(stage) for stage in schedule.stages] == pytest.approx([400 / 2, 600 / 4])
    assert schedule.total_samples == pytest.approx(350)
    assert schedule.cost == pytest.approx(1000 / 350)
    assert schedule.strategies == (LARGE, BASE)
    assert [stage.pure for stage in schedule.stages] == [True, False]
    with pytest.raises(UsageError, match="has no budget"):
        _ = two_stages(budget=None).total_samples


def run_of_whole_steps(schedule: Schedule, batch: int) -> tuple[int, float]:
    """Steps and units of the trainer's loop, written out: look at the fraction, pay for a step or stop."""
    assert schedule.budget is not None
    units, steps = 0.0, 0
    while True:
        step = batch * schedule.at(units / schedule.budget).cost
        if units + step > schedule.budget:
            return steps, units
        units += step
        steps += 1


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 999), st.integers(1, 64)), max_size=5, unique_by=lambda entry: entry[0]),
    st.integers(1, 64),
    st.integers(1, 5000),
    st.integers(1, 30),
)
def test_steps_are_those_of_the_loop(cuts: list[tuple[int, int]], last: int, budget: int, batch: int) -> None:
    """Costs are sixteenths, whose sums are exact in doubles, so that the loop takes no step by rounding."""
    cuts = sorted(cuts)
    edges = [0.0, *(end / 1000 for end, _ in cuts), 1.0]
    costs = [*(cost / 16 for _, cost in cuts), last / 16]
    stages = tuple(
        Stage(*ends, ((BASE, 1.0),), cost) for ends, cost in zip(itertools.pairwise(edges), costs, strict=True)
    )
    schedule = Schedule(stages=stages, budget=float(budget))
    steps, units = run_of_whole_steps(schedule, batch)
    assert schedule.steps(batch) == steps
    assert schedule.samples(batch) == steps * batch
    assert budget - batch * max(costs) < units <= budget


@settings(deadline=None)
@given(POSITIVE, st.integers(1, 1000), st.integers(1, 300))
def test_a_budget_of_so_many_steps_pays_for_them(cost: float, batch: int, count: int) -> None:
    """The loop's sum of rounded costs may end a step early, the exact count may not."""
    schedule = dataclasses.replace(constant_schedule(BASE, cost), budget=cost * batch * count)
    assert schedule.steps(batch) in (count - 1, count)  # the product is rounded too
    assert abs(run_of_whole_steps(schedule, batch)[0] - schedule.steps(batch)) <= 1


def test_whole_steps_never_exceed_the_budget_and_may_run_over_an_edge() -> None:
    schedule = two_stages()  # 400 units at 2 a sample, then 600 at 4
    assert (schedule.steps(8), schedule.samples(8)) == (25 + 18, 43 * 8)  # 25 · 16 = 400; 18 · 32 = 576 of 600
    assert schedule.steps(30) == 7 + 4  # 7 · 60 = 420, over the edge at 400; 4 · 120 = 480 of the 580 left
    assert schedule.steps(300) == 1  # 600; another 1,200 do not fit
    assert schedule.steps(501) == 0
    assert dataclasses.replace(schedule, budget=1e15).steps(8) == pytest.approx(1e15 * (0.4 / 16 + 0.6 / 32))
    third = Schedule(stages=(Stage(0.0, 1.0, ((BASE, 1.0),), 19 / 14),), budget=19.0)
    assert third.steps(1) == 14
    with pytest.raises(UsageError, match="batch=0 must be at least 1 sample"):
        schedule.steps(0)
    with pytest.raises(UsageError, match="has no budget"):
        two_stages(budget=None).samples(8)


def test_a_weight_of_zero_neither_counts_nor_runs() -> None:
    schedule = Schedule(stages=(Stage(0.0, 1.0, ((LARGE, 0.0), (BASE, 1.0)), 4.0),))
    assert schedule.strategies == (BASE,)
    assert schedule.stages[0].pure
    assert {schedule.draw(0.5, seed=0, step=k) for k in range(50)} == {BASE}


def test_draws_follow_the_weights() -> None:
    names = [Strategy(mode=name) for name in "abcd"]
    weights = [0.5, 0.3, 0.15, 0.05]
    schedule = Schedule(stages=(Stage(0.0, 1.0, tuple(zip(names, weights, strict=True)), 1.0),))
    for seed in range(3):
        counts = Counter(schedule.draw(0.2, seed=seed, step=step) for step in range(8000))
        assert chisquare([counts[name] for name in names], [8000 * w for w in weights]).pvalue > 0.01


def test_successive_draws_are_independent() -> None:
    schedule = mixed_schedule([LARGE, BASE], [1.0, 4.0])
    drawn = [schedule.draw(0.2, seed=1, step=step) for step in range(8001)]
    pairs = Counter(itertools.pairwise(drawn))
    assert len(pairs) == 4
    assert chisquare(list(pairs.values())).pvalue > 0.01


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    schedule = mixed_schedule([LARGE, BASE], [1.0, 4.0])
    drawn = [schedule.draw(0.2, seed=1, step=step) for step in range(100)]
    assert drawn[::-1] == [schedule.draw(0.9, seed=1, step=step) for step in reversed(range(100))]
    assert drawn != [schedule.draw(0.2, seed=2, step=step) for step in range(100)]


def test_a_schedule_in_other_costs_is_the_same_run() -> None:
    costs = {LARGE: 0.5, BASE: 6.0}
    schedule = two_stages(cost_model="measured", predicted={"progress": 0.5}, constraints={"max_switches": 1})
    other = in_costs(schedule, costs.__getitem__, "tokens")
    assert [stage.cost for stage in other.stages] == pytest.approx([0.5, 0.75 * 6 + 0.25 * 0.5])
    samples = [0.4 * 1000 / 2, 0.6 * 1000 / 4]
    assert [schedule.stage_samples(stage) for stage in schedule.stages] == pytest.approx(samples)
    assert [other.stage_samples(stage) for stage in other.stages] == pytest.approx(samples)
    assert other.budget == pytest.approx(200 * 0.5 + 150 * 4.625)
    assert other.stages[0].end == other.stages[1].start == pytest.approx(200 * 0.5 / (200 * 0.5 + 150 * 4.625))
    assert [stage.mixture for stage in other.stages] == [stage.mixture for stage in schedule.stages]
    assert (other.cost_model, other.predicted, other.constraints) == ("tokens", {}, {"max_switches": 1})
    assert other.stages[0].score is None  # it was per unit of the old costs
    back = in_costs(other, {LARGE: 2.0, BASE: 14 / 3}.__getitem__, "measured")
    assert (back.budget, back.stages[0].end) == (pytest.approx(1000), pytest.approx(0.4))


def test_a_schedule_without_a_budget_gets_other_edges_and_no_budget() -> None:
    other = in_costs(two_stages(budget=None), lambda s: 1.0, "tokens")
    assert (other.budget, other.stages[0].end) == (None, pytest.approx((0.4 / 2) / (0.4 / 2 + 0.6 / 4)))


@pytest.mark.parametrize("cost", [0.0, math.nan, math.inf])
def test_costs_that_are_no_costs_are_refused(cost: float) -> None:
    with pytest.raises(ScheduleError, match="under tokens; costs must be positive"):
        in_costs(two_stages(), lambda s: cost, "tokens")


def test_constant_and_mixed_schedules() -> None:
    (stage,) = constant_schedule(LARGE, 2).stages
    assert (stage.start, stage.end, stage.strategy, stage.cost) == (0.0, 1.0, LARGE, 2.0)
    (stage,) = mixed_schedule([LARGE, BASE, Strategy(patch=20, dropout=0)], [1.0, 4.0, 2.5]).stages
    assert stage.cost == pytest.approx(2.5)
    assert [weight for _, weight in stage.mixture] == pytest.approx([1 / 3] * 3)
    with pytest.raises(UsageError, match="2 strategies and 1 costs"):
        mixed_schedule([LARGE, BASE], [1.0])


def test_a_schedule_does_not_share_the_callers_constraints() -> None:
    constraints = {"monotone": ["patch"]}
    schedule = two_stages(constraints=constraints)
    constraints["monotone"].append("cost")
    assert schedule.constraints == {"monotone": ["patch"]}


def test_a_budget_is_added_to_a_hand_made_schedule() -> None:
    schedule = dataclasses.replace(constant_schedule(LARGE, 2.0), budget=100.0)
    assert schedule.total_samples == 50


def test_a_saved_schedule_is_loaded(tmp_path: Path) -> None:
    save_schedule(two_stages(), tmp_path / "schedule.json")
    save_schedule(two_stages(budget=7.0), tmp_path / "schedule.json")
    assert load_schedule(tmp_path / "schedule.json") == two_stages(budget=7.0)
    assert os.listdir(tmp_path) == ["schedule.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_schedule(two_stages(), tmp_path / "schedule.json")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(GradscopeError, match=r"schedule\.json: cannot be written \(No space left on device\); choose"):
        save_schedule(two_stages(budget=7.0), tmp_path / "schedule.json")
    assert os.listdir(tmp_path) == ["schedule.json"]
    assert load_schedule(tmp_path / "schedule.json") == two_stages()


def test_the_file_is_whole_and_on_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        events.append("fsync")
        fsync(handle)

    def seen_replace(source: Path, target: Path) -> None:
        events.append("replace")
        assert source.parent == target.parent
        assert load_schedule(source) == two_stages()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    save_schedule(two_stages(), tmp_path / "schedule.json")
    assert events == ["fsync", "replace"]


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json cannot be read: No such file"):
        load_schedule(tmp_path / "none.json")
    with pytest.raises(GradscopeError, match=r"schedule\.json: cannot be written \(No such file"):
        save_schedule(two_stages(), tmp_path / "none" / "schedule.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(GradscopeError, match=r"cannot be written \(Not a directory"):
        save_schedule(two_stages(), tmp_path / "file" / "schedule.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScheduleError, match=r"binary\.json: not a schedule: the file is not UTF-8"):
        load_schedule(tmp_path / "binary.json")
    (tmp_path / "edited.json").write_text(edited({STAGE + "end": 0.1}))
    with pytest.raises(ScheduleError, match=r"edited\.json: stages\[1\]\.end: 0\.1"):
        load_schedule(tmp_path / "edited.json")


def test_every_truncation_of_a_file_is_refused() -> None:
    text = two_stages().to_json().rstrip()
    for length in range(len(text)):
        with pytest.raises(ScheduleError):
            Schedule.from_json(text[:length])

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
        score = draw(st.none() | FINITE)
        stages.append(Stage(start, end, mixture, draw(POSITIVE), score, draw(st.none() | POSITIVE)))
    return Schedule(
        stages=tuple(stages),
        budget=draw(st.none() | POSITIVE),
        batch_size=draw(st.none() | st.integers(1, 10**6)),
        cost_model=draw(NAMES),
        criterion=draw(st.none() | NAMES),
        metric=draw(st.none() | NAMES),
        constraints=draw(st.dictionaries(NAMES, JSON_VALUES, max_size=3)),
        cube_digest=draw(NAMES),
        library_version=draw(NAMES),
    )


@settings(deadline=None, max_examples=200)
@given(schedules())
def test_json_brings_a_schedule_back(schedule: Schedule) -> None:
    text = schedule.to_json()
    assert Schedule.from_json(text) == schedule
    assert json.loads(text)["schema_version"] == 1


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
        ({"schema_version": 2}, r"^schema_version: 2 is newer than 1, the newest this version reads; upgrade"),
        ({"schema_version": 0}, r"^schema_version: 0 was never a version"),
        ({"schema_version": "1"}, r"^schema_version: expected a whole number"),
        ({"schema_version": ...}, r"^schema_version: this field is missing"),
        ({"budget": -5}, r"^budget: -5\.0 must be a positive number of units"),
        ({"budget": "100M"}, r'^budget: expected a number, found "100M"'),
        ({"batch_size": 0}, r"^batch_size: 0 must be at least 1"),
        ({"batch_size": 2.5}, r"^batch_size: expected a whole number, found 2\.5"),
        ({"progress_mode": "trajectories"}, r"^progress_mode: 'trajectories' is not known; it is one of fraction"),
        ({"constraints": []}, r"^constraints: expected an object"),
        ({"criterion": 3}, r"^criterion: expected a text in quotes, found 3"),
        ({"notes": "mine"}, r"^notes: unknown field; known here: schema_version"),
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
    assert [schedule.samples(stage) for stage in schedule.stages] == pytest.approx([400 / 2, 600 / 4])
    assert schedule.total_samples == pytest.approx(350)
    assert schedule.cost == pytest.approx(1000 / 350)
    assert schedule.strategies == (LARGE, BASE)
    assert [stage.pure for stage in schedule.stages] == [True, False]
    with pytest.raises(UsageError, match="has no budget"):
        _ = two_stages(budget=None).total_samples


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

"""Schedules, their texts and counts come back from what is written, or are refused when they are made."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import (
    GradscopeError,
    Schedule,
    Stage,
    Strategy,
    UsageError,
    format_count,
    load_schedule,
    parse_count,
    parse_schedule,
    save_schedule,
)

COUNTS = [80, pytest.param(4000, marks=pytest.mark.slow)]
SETTLED: dict[str, Any] = {"derandomize": True, "deadline": None, "database": None}
ODD = [
    "é",
    "e\u0301",
    "𝛁",
    "a\nb",
    '"',
    "\\",
    "",
    " ",
    "\u2028",
    "\0",
    '{"strategy": {"a": 1}, "weight": 1}',
    "\ufeff",
    "\r\n",
]
EXTREME = [5e-324, 2.2e-308, 1e-300, 1e300, sys.float_info.max, -0.0, 0.0, -1e300, 0.1, 1 / 3]
texts = st.sampled_from(ODD) | st.text(st.characters(), max_size=6)  # lone surrogates among them
floats = st.sampled_from(EXTREME) | st.floats(allow_nan=False, allow_infinity=False)
positive = st.sampled_from([x for x in EXTREME if x > 0]) | st.floats(1e-9, 1e9)


@st.composite
def schedules(draw: Any) -> Callable[[], Schedule]:
    """What makes a schedule of up to forty stages, pure ones and mixtures, or refuses to."""
    cuts = sorted(draw(st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=40, unique=True)))
    axes = draw(st.lists(texts, min_size=1, max_size=3, unique=True))
    value = st.integers(-(2**70), 2**70) | st.sampled_from([2**53 + 1, 10**300]) | floats | texts
    pool = draw(st.lists(st.tuples(*[value for _ in axes]), min_size=1, max_size=4, unique_by=repr))
    sizes = draw(st.lists(st.integers(1, len(pool)), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    costs = draw(st.lists(positive, min_size=len(sizes), max_size=len(sizes)))
    scores = draw(st.lists(st.none() | floats, min_size=len(sizes), max_size=len(sizes)))
    given_too = {"criterion": draw(st.none() | texts), "budget": draw(st.none() | positive)}
    given_too |= {"predicted": draw(st.dictionaries(texts, floats | texts, max_size=2))}

    def make() -> Schedule:
        stages = []
        for (start, end), size, cost, score in zip(
            itertools.pairwise([0.0, *cuts, 1.0]), sizes, costs, scores, strict=True
        ):
            mixture = tuple((Strategy(dict(zip(axes, values, strict=True))), 1 / size) for values in pool[:size])
            stages.append(Stage(start, end, mixture, float(cost), score))
        return Schedule(tuple(stages), **given_too)

    return make


@pytest.mark.parametrize("count", COUNTS)
def test_a_schedule_that_can_be_made_can_be_saved_and_loaded(count: int, tmp_path: Path) -> None:
    kept = 0

    @settings(max_examples=count, **SETTLED)
    @given(schedules())
    def check(make: Callable[[], Schedule]) -> None:
        nonlocal kept
        try:
            plan = make()
        except GradscopeError:
            return
        kept += 1
        save_schedule(plan, tmp_path / "schedule.json")
        again = load_schedule(tmp_path / "schedule.json")
        assert again == plan and again.to_json() == plan.to_json() and again.same_stages(plan)
        for ours, theirs in zip(plan.stages, again.stages, strict=True):
            assert [repr(strategy) for strategy, _ in ours.mixture] == [repr(s) for s, _ in theirs.mixture]
            assert repr(ours.score) == repr(theirs.score)  # also of -0.0
        assert plan.cost >= 0 and [again.draw(0.5, seed=1, step=i) for i in range(3)] == [
            plan.draw(0.5, seed=1, step=i) for i in range(3)
        ]

    with mock.patch("schedulers.schedule.os.fsync", lambda descriptor: None):
        check()
    assert kept > count // 4
    print(f"{kept} of {count} schedules could be made")


plain = st.text("abcxyz_é☃𝛁.", min_size=1, max_size=5).filter(lambda text: text.lower() not in ("inf", "nan"))
numbers = st.integers(-(10**6), 10**20) | floats.filter(lambda x: "e+" not in repr(x) and abs(x) < 1e15)


@settings(max_examples=200, **SETTLED)
@given(
    st.lists(st.lists(st.tuples(plain | numbers, numbers), min_size=1, max_size=3, unique_by=repr), max_size=6),
    st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), min_size=6, max_size=6, unique=True),
)
def test_stages_and_mixtures_as_text_are_read_as_they_were(
    pieces: list[list[tuple[Any, Any]]], cuts: list[float]
) -> None:
    reference = Strategy(mode="all", noise=0)
    mixtures = [tuple(dict.fromkeys(Strategy(mode=m, noise=n) for m, n in piece)) for piece in pieces]
    mixtures.append((reference,))
    edges = [0.0, *sorted(cuts[: len(mixtures) - 1]), 1.0]
    text = ";".join(
        "+".join(f"1/{len(mixture)}*{strategy}" for strategy in mixture) + f"@{end!r}"
        if len(mixture) > 1
        else f"{mixture[0]}@{end!r}"
        for mixture, end in zip(mixtures, edges[1:], strict=True)
    )
    plan = parse_schedule(text, cost=lambda strategy: 1.0, reference=reference)
    assert [stage.start for stage in plan.stages] == edges[:-1] and [stage.end for stage in plan.stages] == edges[1:]
    assert [stage.mixture for stage in plan.stages] == [
        tuple((strategy, 1 / len(mixture)) for strategy in mixture) for mixture in mixtures
    ]


@settings(max_examples=300, **SETTLED)
@given(st.dictionaries(texts, texts | st.integers() | st.floats(), min_size=1, max_size=3))
def test_a_strategy_reads_its_text_back_or_its_text_is_of_no_other_kind(values: dict[str, Any]) -> None:
    try:
        text = str(Strategy(values))
        again = Strategy.parse(text)
    except UsageError:
        return
    assert Strategy.parse(str(again)) == again and str(Strategy.parse(str(again))) == str(again)


@pytest.mark.parametrize("value", [10**400, -(10**400), math.inf, "\ud800", True, None])
def test_a_value_that_no_file_holds_makes_no_strategy(value: Any) -> None:
    with pytest.raises(UsageError, match="axis 'a'"):
        Strategy(a=value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"criterion": "\ud800"}, "criterion"),
        ({"predicted": {"why": "\ud800"}}, "predicted"),
        ({"constraints": {"most": 10**5000}}, "constraints"),
        ({"budget": 1e308, "cost": 1e-10}, r"stages\[0\]\.cost"),
        ({"cost": 5e-324}, r"stages\[0\]\.cost"),
    ],
)
def test_what_could_not_be_written_or_counted_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    cost = changes.pop("cost", 1.0)
    with pytest.raises(GradscopeError, match=f"^{field}"):
        Schedule((Stage(0.0, 1.0, ((Strategy(a=1), 1.0),), cost),), **changes)


@pytest.mark.parametrize("weight", ["1e-999999999", "1e999999999", "1e-400", "nan", "inf", "-1e-999999999"])
def test_a_weight_of_absurd_size_is_refused_at_once(weight: str) -> None:
    with pytest.raises(UsageError, match="weight"):
        parse_schedule(f"{weight}*a=1+1*a=2", cost=lambda strategy: 1.0, reference=Strategy(a=1))


@settings(max_examples=300, **SETTLED)
@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.sampled_from([x for x in EXTREME if x > 0]))
def test_every_positive_count_is_read_back(value: float) -> None:
    assert parse_count(format_count(value)) == pytest.approx(value, rel=1e-3, abs=1e-323)

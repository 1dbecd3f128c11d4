import contextlib
import doctest
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import Strategy, UsageError, parse_schedule, schedule_text

REFERENCE = Strategy(patch=16, dropout=0)


def read(text: str):
    schedule = parse_schedule(text, cost=lambda s: 100 / s.number("patch"), reference=REFERENCE)
    return [(stage.start, stage.end, str(stage.strategy), stage.cost) for stage in schedule.stages]


def test_stages_run_until_their_fractions_and_the_last_to_the_end() -> None:
    assert read("patch=20,dropout=0.5@0.4;dropout=.25@.7;patch=16") == [
        (0.0, 0.4, "patch=20,dropout=0.5", 5.0),
        (0.4, 0.7, "patch=16,dropout=0.25", 6.25),
        (0.7, 1.0, "patch=16,dropout=0", 6.25),
    ]


@pytest.mark.parametrize("text", ["patch=20", "patch=20@1", " patch=20 @ 1.0 "])
def test_one_strategy_runs_throughout(text: str) -> None:
    assert read(text) == [(0.0, 1.0, "patch=20,dropout=0", 5.0)]


def test_spaces_around_parts_do_not_matter() -> None:
    assert read(" patch=20 @ 0.4 ; patch=16 ") == read("patch=20@0.4;patch=16")


@settings(deadline=None)
@given(st.lists(st.integers(1, 999), min_size=0, max_size=5, unique=True))
def test_every_list_of_ends_is_read_back(thousandths: list[int]) -> None:
    ends = [k / 1000 for k in sorted(thousandths)]
    text = ";".join([*(f"patch={k + 1}@{end}" for k, end in enumerate(ends)), "patch=16"])
    assert [stage[1] for stage in read(text)] == [*ends, 1.0]


def mixtures(text: str):
    schedule = parse_schedule(text, cost=lambda s: 100 / s.number("patch"), reference=REFERENCE)
    return [
        (stage.start, stage.end, {str(s): weight for s, weight in stage.mixture}, stage.cost)
        for stage in schedule.stages
    ]


def test_a_linear_ramp_runs_equal_parts_at_exact_values() -> None:
    stages = read("dropout=0.8->0/5@0.6;patch=20")
    assert stages == [
        (0.0, 0.12, "patch=16,dropout=0.8", 6.25),
        (0.12, 0.24, "patch=16,dropout=0.6", 6.25),
        (0.24, 0.36, "patch=16,dropout=0.4", 6.25),
        (0.36, 0.48, "patch=16,dropout=0.2", 6.25),
        (0.48, 0.6, "patch=16,dropout=0", 6.25),
        (0.6, 1.0, "patch=20,dropout=0", 5.0),
    ]


def test_a_ramp_may_rise_and_may_come_later() -> None:
    assert [stage[:3] for stage in read("patch=20@0.3; patch=16 -> 48/3 ,dropout=0.1")] == [
        (0.0, 0.3, "patch=20,dropout=0"),
        (0.3, 8 / 15, "patch=16,dropout=0.1"),
        (8 / 15, 23 / 30, "patch=32,dropout=0.1"),
        (23 / 30, 1.0, "patch=48,dropout=0.1"),
    ]


def test_a_ramp_through_listed_values() -> None:
    assert [stage[:3] for stage in read("patch=48>40>30>16@0.5;dropout=0.1>0")] == [
        (0.0, 0.125, "patch=48,dropout=0"),
        (0.125, 0.25, "patch=40,dropout=0"),
        (0.25, 0.375, "patch=30,dropout=0"),
        (0.375, 0.5, "patch=16,dropout=0"),
        (0.5, 0.75, "patch=16,dropout=0.1"),
        (0.75, 1.0, "patch=16,dropout=0"),
    ]


def test_axes_of_equally_many_parts_ramp_together() -> None:
    assert [stage[2] for stage in read("patch=48>40>30,dropout=0.5->0/3")] == [
        "patch=48,dropout=0.5",
        "patch=40,dropout=0.25",
        "patch=30,dropout=0",
    ]


def test_axes_of_texts_ramp_through_a_list() -> None:
    schedule = parse_schedule(
        "mode=coarse>fine", cost=lambda s: float(len(str(s["mode"]))), reference=Strategy(mode="fine")
    )
    assert [(stage.strategy["mode"], stage.cost) for stage in schedule.stages] == [("coarse", 6.0), ("fine", 4.0)]


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(0, 100), st.integers(2, 60), st.integers(1, 1000))
def test_ramps_of_hundredths_are_the_nearest_doubles(first: int, last: int, parts: int, end: int) -> None:
    text = f"dropout={first / 100}->{last / 100}/{parts}@{end / 1000}" + (";patch=16" if end < 1000 else "")
    stages = read(text)[:parts]
    for k, (start, until, strategy, _) in enumerate(stages):
        assert (start, until) == (float(Fraction(end * k, 1000 * parts)), float(Fraction(end * (k + 1), 1000 * parts)))
        value = Fraction(first, 100) + Fraction(last - first, 100) * Fraction(k, parts - 1)
        assert strategy == str(Strategy(patch=16, dropout=float(value)))


def test_a_mixture_costs_the_weighted_mean() -> None:
    assert mixtures("0.7*patch=25+0.3*patch=20,dropout=.5@0.4;patch=16") == [
        (0.0, 0.4, {"patch=25,dropout=0": 0.7, "patch=20,dropout=0.5": 0.3}, pytest.approx(0.7 * 4 + 0.3 * 5)),
        (0.4, 1.0, {"patch=16,dropout=0": 1.0}, 6.25),
    ]


def test_weights_may_be_thirds_and_powers_of_ten() -> None:
    ((_, _, mixture, cost),) = mixtures("1/3*patch=25 + 2/3*patch=1e+2")
    assert mixture == {"patch=25,dropout=0": 1 / 3, "patch=100,dropout=0": 2 / 3}
    assert cost == pytest.approx(2)
    assert mixtures("0.5*patch=1e+2,dropout=0.5+0.5*patch=20")[0][2].keys() == {
        "patch=100,dropout=0.5",
        "patch=20,dropout=0",
    }
    assert mixtures("1e-1*patch=25+9e-1*patch=20")[0][2] == {"patch=25,dropout=0": 0.1, "patch=20,dropout=0": 0.9}


def test_a_plus_within_a_value_is_part_of_it() -> None:
    reference = Strategy(views="crop")
    schedule = parse_schedule("0.5*views=crop+flip+0.5*views=crop", cost=lambda s: 1.0, reference=reference)
    assert schedule.strategies == (Strategy(views="crop+flip"), reference)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("dropout=0.8->0@0.6;patch=16", r"dropout=0.8->0 does not say in how many parts; write dropout=0.8->0/5"),
        ("dropout=0.8->0/1", r"'1' is not a number of parts from 2 to 1000; write dropout=0.8->0/5"),
        ("dropout=0.8->0/2.5", r"'2.5' is not a number of parts"),
        ("dropout=0.8->0/1001", r"'1001' is not a number of parts"),
        ("dropout=0.8->0/" + "9" * 5000, r"is not a number of parts"),
        ("dropout=0.8->/5", r"dropout=0.8->/5 is not a ramp between two numbers; write"),
        ("dropout=0.8->inf/5", r"is not a ramp between two numbers"),
        ("dropout=0.8->0.4->0/5", r"is not a ramp between two numbers"),
        ("patch=48>>16", r"patch=48>>16 lacks a value beside a >; write patch=48>40>16"),
        ("dropout=0.8>0/5", r"dropout=0.8>0/5 mixes numbers with texts; .* or dropout=0.8->0/5 for equal steps"),
        (
            "patch=48>40>30,dropout=0.8->0/5@0.5;patch=16",
            r"patch ramps in 3 parts and dropout in 5; .* \(in 'patch=48>",
        ),
        ("0.7*patch=30+0.4*patch=16", r"the weights sum to 1.1, not 1"),
        ("0.7*patch=30@0.5;patch=16", r"the weights sum to 0.7, not 1 \(in '0.7\*patch=30@0.5'\)"),
        ("0.7*patch=30+patch=16", r"'patch=16' has no weight; a mixture is written 0.7\*patch=30\+0.3\*patch=16"),
        ("patch=30*0.7+patch=16*0.3", r"'patch=30\*0.7' has no weight"),
        ("most*patch=30+0.3*patch=16", r"'most' is not a weight; write a number in \(0, 1\]"),
        ("1/0*patch=30+0.3*patch=16", r"'1/0' is not a weight"),
        ("-0.5*patch=30+1.5*patch=16", r"the weight -0.5 is not in \(0, 1\]"),
        ("0.5*patch=30+0.5*patch=30,dropout=0", r"patch=30,dropout=0 is in the mixture twice"),
        ("0.5*pacth=30+0.5*patch=30", r"unknown axis 'pacth'; the axes are patch, dropout"),
        ("0.5*patch=48>30+0.5*patch=16@0.4;patch=16", r"a mixture cannot ramp, and 'patch=48>30' does; give each part"),
        ("0.5*+0.5*patch=16", "is not of the form axis=value"),
    ],
)
def test_ramps_and_mixtures_of_another_form_are_refused_with_the_right_one(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        read(text)


@settings(deadline=None)
@given(st.text("patch=dro1205.48>-/*+@;,_ ", max_size=30))
def test_any_text_is_a_schedule_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_schedule(text, cost=lambda s: 1.0, reference=REFERENCE)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not of the form axis=value"),
        ("patch=20@0.4;", "is not of the form axis=value"),
        ("patch=20;patch=16", "'patch=20' does not say until when; add @"),
        ("patch=20@half;patch=16", "'half' in 'patch=20@half' is not a fraction"),
        ("patch=20@0.4@0.5;patch=16", "'0.4@0.5' in .* is not a fraction"),
        ("patch=20@0.6;patch=24@0.6;patch=16", r"'patch=24@0.6' ends at 0.6, which is not in \(0.6, 1\]"),
        ("patch=20@0;patch=16", r"ends at 0, which is not in \(0, 1\]"),
        ("patch=20@1.2;patch=16", "ends at 1.2"),
        ("patch=20@nan;patch=16", "ends at nan"),
        ("patch=20@1;patch=16", r"'patch=16' ends at 1, which is not in \(1, 1\]"),
        ("patch=20@0.4", "it stops at 0.4; the last part must run until 1"),
        ("pacth=20", "unknown axis 'pacth'; the axes are patch, dropout"),
    ],
)
def test_other_texts_are_refused_by_part(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        read(text)


def test_the_examples_of_the_docstring_hold() -> None:
    assert doctest.testmod(schedule_text) == (0, 4)

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import Schedule, Strategy, UsageError, compare_schedules, constant_schedule, parse_schedule

REFERENCE = Strategy(patch=16, dropout=0)


def plan(text: str, budget: float | None = None) -> Schedule:
    schedule = parse_schedule(text, cost=lambda s: 64 / s.number("patch"), reference=REFERENCE)
    return dataclasses.replace(schedule, budget=budget)


def test_segments_lie_between_the_edges_of_both() -> None:
    found = compare_schedules(plan("patch=32@0.4;patch=16"), plan("patch=64@0.25;patch=32@0.75;patch=16"))
    assert [(s.start, s.end, s.a.strategy["patch"], s.b.strategy["patch"], s.same) for s in found.segments] == [
        (0.0, 0.25, 32, 64, False),
        (0.25, 0.4, 32, 32, True),
        (0.4, 0.75, 16, 32, False),
        (0.75, 1.0, 16, 16, True),
    ]
    assert found.same_share == pytest.approx(0.4)


def test_samples_and_costs_and_their_differences() -> None:
    found = compare_schedules(plan("patch=32@0.4;patch=16", 1000.0), plan("patch=16", 2000.0))
    assert found.samples_a == pytest.approx(400 / 2 + 600 / 4)
    assert found.samples_b == pytest.approx(500)
    assert found.samples_difference == pytest.approx(150)
    assert (found.cost_a, found.cost_b) == pytest.approx((1000 / 350, 4))
    assert found.cost_difference == pytest.approx(4 - 1000 / 350)


def test_without_a_budget_there_are_fractions_and_costs_alone() -> None:
    found = compare_schedules(plan("patch=32", 1000.0), plan("patch=16"))
    assert (found.samples_a, found.samples_b, found.samples_difference) == (500, None, None)
    assert (found.same_share, found.cost_difference) == (0, 2)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("0.7*patch=32+0.3*patch=16", "0.3*patch=16+0.7*patch=32", True),
        ("0.7*patch=32+0.3*patch=16", "0.6*patch=32+0.4*patch=16", False),
        ("0.7*patch=32+0.3*patch=16", "patch=32", False),
        ("1*patch=32", "patch=32", True),
    ],
)
def test_mixtures_are_the_same_by_strategies_and_weights(a: str, b: str, same: bool) -> None:
    for first, second in ((a, b), (b, a)):
        assert compare_schedules(plan(first), plan(second)).same_share == same


def test_predictions_costs_and_weights_of_zero_do_not_make_schedules_differ() -> None:
    one = plan("patch=32")
    (stage,) = one.stages
    mixture = (*stage.mixture, (REFERENCE, 0.0))
    other = dataclasses.replace(one, stages=(dataclasses.replace(stage, mixture=mixture, cost=9.0, score=0.3),))
    assert compare_schedules(one, other).same_share == 1


def test_edges_that_differ_by_rounding_are_one() -> None:
    found = compare_schedules(plan("patch=32@0.3;patch=16"), plan(f"patch=32@{0.1 + 0.2!r};patch=16"))
    assert [segment.same for segment in found.segments] == [True, True]
    assert found.same_share == pytest.approx(1)


def test_schedules_on_other_axes_are_refused() -> None:
    with pytest.raises(UsageError, match="one has the axes patch, dropout and the other resolution; give two"):
        compare_schedules(plan("patch=32"), constant_schedule(Strategy(resolution=14), 1.0))


PLANS = st.lists(st.integers(1, 19), max_size=4, unique=True).flatmap(
    lambda cuts: st.lists(st.sampled_from([16, 32]), min_size=len(cuts) + 1, max_size=len(cuts) + 1).map(
        lambda patches: ";".join(
            f"patch={patch}@{end / 20}" for patch, end in zip(patches, [*sorted(cuts), 20], strict=True)
        )
    )
)


@settings(deadline=None)
@given(PLANS, PLANS, st.integers(0, 10))
def test_the_segments_say_what_runs_everywhere(first: str, second: str, seed: int) -> None:
    a, b = plan(first), plan(second)
    found = compare_schedules(a, b)
    assert found.segments[0].start == 0 and found.segments[-1].end == 1
    for fraction in [random.Random(seed).random() for _ in range(20)]:
        (segment,) = (s for s in found.segments if s.start <= fraction < s.end)
        assert (segment.a, segment.b) == (a.at(fraction), b.at(fraction))
    twentieths = [(a.at((k + 0.5) / 20).strategy == b.at((k + 0.5) / 20).strategy) for k in range(20)]
    assert found.same_share == pytest.approx(sum(twentieths) / 20)
    assert compare_schedules(b, a).same_share == found.same_share

"""The benchmark of acceleration: what is run in which order, how budgets at equal accuracy are read, its rows."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.acceleration import ranking
from benchmarks.acceleration.cases import CASES
from benchmarks.acceleration.runs import Plan, read_results, run_key
from benchmarks.acceleration.tables import besides, crossing, curves_of, rows_of, savings
from benchmarks.summary import parse_row
from schedulers import parse_schedule
from schedulers.strategy import Strategy

CASE = replace(CASES["mocov3"], budgets=(10e3, 20e3, 40e3))


@pytest.mark.parametrize("arms", [tuple(CASE.arms), ("paper-again",), ("online", "patch7")])
def test_what_waits_for_something_comes_after_it(arms: tuple[str, ...]) -> None:
    keys, after = Plan(CASE, "cpu", Path("x"), quiet=True).keys(arms, math.inf)
    assert len(set(keys)) == len(keys)
    assert all(keys.index(first) < keys.index(key) for key, first in after.items())
    for arm in arms:
        least = CASE.arms[arm].least * CASE.budgets[-1]
        assert [b for b in CASE.budgets if run_key(arm, b) in keys] == [b for b in CASE.budgets if b >= least]


def test_a_small_budget_needs_its_pilots_at_the_largest_all_the_same() -> None:
    keys, after = Plan(CASE, "cpu", Path("x"), quiet=True).keys(("paper-again",), 10e3)
    assert keys == [
        "none 40K", "cube of none, ca-mse", "paper 40K", "cube of paper, ca-mse", "paper-again 10K",
    ]  # fmt: skip
    assert after == dict(zip(keys[1:], keys, strict=False))


@pytest.mark.parametrize("name", CASES)
def test_schedules_of_arms_can_be_read(name: str) -> None:
    case = CASES[name]
    for arm in case.arms.values():
        assert (arm.offline is None) == bool(arm.schedule)
        if "=" in arm.schedule:
            reference = Strategy(patch=case.model.patch, dropout=0)
            text = arm.schedule if "@" in arm.schedule else f"{arm.schedule}@1"
            schedule = parse_schedule(text, cost=lambda s: 1.0, reference=reference)
            assert {s["patch"] for s in schedule.strategies} <= set(case.model.patches)


def test_the_budget_at_equal_accuracy() -> None:
    points = [(10.0, 0.5), (100.0, 0.6), (1000.0, 0.8)]
    assert crossing(points, 0.7) == pytest.approx(math.sqrt(1e5))
    assert crossing(points, 0.4) == 10 and crossing(points, 0.8) == pytest.approx(1000)
    assert crossing(points, 0.81) == math.inf
    # a shorter run that was lucky counts as much as the longer one that was not
    assert crossing([(10.0, 0.7), (100.0, 0.5), (1000.0, 0.9)], 0.6) == 10
    assert 100 < crossing([(10.0, 0.7), (100.0, 0.5), (1000.0, 0.9)], 0.75) < 1000


def test_times_less_budget_and_the_interval_over_seeds() -> None:
    none = {100.0: [0.7, 0.7, 0.7]}
    assert savings(none, {10.0: [0.7, 0.7, 0.7], 100.0: [0.8, 0.8, 0.8]}, 100.0) == pytest.approx((10, 10, 10))
    assert savings(none, {10.0: [0.5] * 3, 100.0: [0.6] * 3}, 100.0) == (0, 0, 0)
    value, low, high = savings(none, {10.0: [0.6, 0.7, 0.72], 100.0: [0.8, 0.8, 0.8]}, 100.0)
    assert 1 < low < value < high == pytest.approx(10)


def results(**accuracies: float) -> list[dict[str, Any]]:
    """Two seeds of some arms at all budgets; accuracy grows by .01 with the budget and by .002 with the seed."""
    runs = [
        {
            run_key(arm, budget): {
                "points": [{"accuracy": accuracy + 0.01 * i + 0.002 * seed, "samples": 1}],
                "date": "2026-01-01", "device": "d",
            }
            for arm, accuracy in accuracies.items()
            for i, budget in enumerate(CASE.budgets)
        }
        for seed in (0, 1)
    ]  # fmt: skip
    cube = {"pilot": "mixed", "pilot_units": 40e3, "profile_units": 4e3, "date": "2026-01-02", "device": "d"}
    return [{"seed": i, "runs": run | {"cube of mixed, descent": cube}} for i, run in enumerate(runs)]


def test_rows_tell_accuracy_savings_and_costs() -> None:
    rows = rows_of(CASE, results(none=0.6, descent=0.62, paper=0.5))
    assert all(parse_row(dataclasses.asdict(row), "here") for row in rows)
    by = {row.claim: row for row in rows}
    title = CASE.arms["descent"].title
    about = "mocov3: times less budget for the accuracy of no acceleration at 40K"
    row = by[f"{about}, at least: it is there with its smallest budget, {title}"]
    assert (row.value, row.holds, row.runs) == (4.0, True, 2)
    paid = by[f"mocov3: the same, 44K units of pilot and profile paid by one run, {title}"]
    assert paid.value == pytest.approx(40 / (10 + 44), abs=1e-3)
    lost = by[f"{about}, {CASE.arms['paper'].title}"]
    assert (lost.value, lost.holds) == (0, False)
    assert by[f"mocov3: kNN accuracy after 20K units, {title}"].value == pytest.approx(0.631)
    assert rows_of(CASE, []) == [] and rows_of(CASE, results(descent=0.5)) == []


def test_what_came_before_a_pilot_is_paid_for_too() -> None:
    (found, _) = results(none=0.6, paper=0.7)
    cube = {"pilot_units": 40e3, "profile_units": 4e3}
    found["runs"] |= {"cube of none, ca-mse": cube, "cube of paper, ca-mse": cube}
    assert [besides(CASE, found, arm) for arm in ("none", "paper", "paper-again")] == [None, 44e3, 88e3]


def test_a_profile_may_cost_a_quarter_of_the_budget_whatever_the_method_has_besides() -> None:
    for case in CASES.values():
        sub_batches = case.model.profile_samples(240e3, 5) / case.model.batch_size
        assert sub_batches == int(sub_batches) > 8


def test_a_seed_that_lacks_a_budget_is_left_out_of_that_arm() -> None:
    found = results(none=0.6, descent=0.62)
    del found[1]["runs"]["descent 20K"]
    assert curves_of(CASE, found, "descent") == {
        b: [pytest.approx(0.62 + 0.01 * i)] for i, b in enumerate(CASE.budgets)
    }
    assert len(curves_of(CASE, found, "none")[10e3]) == 2
    assert [row.runs for row in rows_of(CASE, found) if "times less" in row.claim] == [1]


def test_committed_results_are_of_known_cases_and_keys() -> None:
    for name, case in CASES.items():
        keys, _ = Plan(case, "cpu", Path("x"), quiet=True).keys(tuple(case.arms), math.inf)
        for found in read_results(name):
            assert set(found["runs"]) <= set(keys) and found["grid"] == case.model.grid


def test_rank_correlations_are_over_the_strategies_of_a_checkpoint() -> None:
    def point(pilot: str, place: int, progress: float) -> dict[str, Any]:
        return {
            "pilot": pilot, "fraction": 0.5, "strategy": f"patch={place}",
            "scores": {"descent, optimizer": float(place), "ca-mse, euclidean": math.nan if place == 3 else -place},
            "0.08, recovered": {"loss": progress, "accuracy": 0.0},
        }  # fmt: skip

    mixed = [point("mixed", place, progress) for place, progress in ((1, 0.1), (2, 0.3), (3, 0.7), (4, 0.9))]
    none = [point("none", place, -place) for place in (1, 2, 3)]
    found = [{"seed": 0, "device": "d", "date": "2026-01-01", "points": mixed + none}]
    rows = {row.claim: row for row in ranking.rows_of(CASE, found)}
    assert all(parse_row(dataclasses.asdict(row), "here") for row in rows.values())
    text = "mocov3: rank correlation of {} with progress in the reference's loss, 0.08, recovered, checkpoints of '{}'"
    assert (rows[text.format("descent, optimizer", "mixed")].value, len(rows)) == (1, 3)  # accuracy has no order
    assert rows[text.format("ca-mse, euclidean", "mixed")].value == -1  # of the three strategies that have a score
    assert (rows[text.format("descent, optimizer", "none")].holds, ranking.rows_of(CASE, [])) == (False, [])

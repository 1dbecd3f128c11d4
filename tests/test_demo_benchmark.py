"""How the demo's benchmark reads a crossing budget and turns seeds into rows."""

from __future__ import annotations

import math

import pytest

from benchmarks.demo.run import budget_share, crossing, rows_of


def test_crossing_is_linear_in_the_logarithm_of_the_budget() -> None:
    points = [(400.0, 0.8), (100.0, 0.6), (200.0, 0.7)]
    assert crossing(points, 0.65) == pytest.approx(math.sqrt(100 * 200))
    assert crossing(points, 0.8) == pytest.approx(400)
    assert crossing(points, 0.5) == 100.0
    assert crossing(points, 0.81) is None
    lucky = [(50.0, 0.7), *points]
    assert crossing(lucky, 0.65) == pytest.approx(math.sqrt(100 * 200))


def seed(plain: float, short: float, full: float) -> dict[str, object]:
    runs = {"no acceleration": plain, "mixed pilot": 0.7, "optimized schedule": full}
    return {
        "seed": 0,
        "budget": 800.0,
        "rows": [{"run": name, "knn_accuracy": value} for name, value in runs.items()],
        "profile_units": 200.0,
        "shorter": [{"budget": 100.0, "knn_accuracy": 0.5}, {"budget": 400.0, "knn_accuracy": short}],
    }


def test_rows_say_when_an_aim_is_missed() -> None:
    good, bad = seed(0.6, 0.7, 0.8), seed(0.75, 0.7, 0.8)
    assert budget_share(good) == pytest.approx(0.25)
    assert budget_share(bad) == pytest.approx(math.sqrt(0.5))
    rows = {row.claim: row for row in rows_of([good, bad], "device", "2026-11-22")}
    half = rows["demo: kNN accuracy, optimized schedule at 0.5 of the budget"]
    assert (half.value, half.low, half.high, half.holds) == (0.7, 0.7, 0.7, False)
    ratio = rows["demo: budget of the unaccelerated run over the optimized schedule's at equal accuracy"]
    assert (ratio.low, ratio.high) == (pytest.approx(math.sqrt(2), abs=1e-4), 4.0) and ratio.holds
    uses = rows["demo: runs after which the pilot and the profile have paid for themselves"]
    assert (uses.low, uses.high) == (
        pytest.approx(1.25 / 0.75, abs=1e-4),
        pytest.approx(1.25 / (1 - math.sqrt(0.5)), abs=1e-4),
    )
    assert not rows["demo: kNN accuracy, mixed pilot"].holds
    never = rows_of([seed(0.9, 0.7, 0.8)], "device", "2026-11-22")
    assert not any("at equal accuracy" in row.claim for row in never)
    assert [(row.value, row.holds) for row in never if "seeds in which" in row.claim] == [(0, False)]

"""What the next probe measures: what that costs, whom it prefers, and when no more are tried."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import Strategy
from schedulers.probe_planning import RETRIES, ProbePlanner
from tests.schedulers.adaptive_cases import KEEP, SQUARE, TWO, keep_cost, strategy

PLENTY = 1e9


def planner_of(
    grid: Any = SQUARE, shared: Mapping[Strategy, Mapping[str, float]] | None = None, sub_batch: int = 8,
    minimum: int = 4, maximum: int = 32,
) -> ProbePlanner:  # fmt: skip
    return ProbePlanner(grid, keep_cost(grid), shared or {}, sub_batch, minimum, maximum)


def spent_by_hand(
    strategies: list[Strategy],
    costs: Mapping[Strategy, float],
    shared: Mapping[Strategy, Mapping[str, float]],
    size: int,
    sub_batches: int,
) -> float:
    """Sub-batch by sub-batch, each part with a name paid by the first that asks for it."""
    units = 0.0
    for _ in range(sub_batches):
        there: set[str] = set()
        for s in strategies:
            own = costs[s] - sum(shared.get(s, {}).values())
            units += size * own
            for key, cost in shared.get(s, {}).items():
                if key not in there:
                    units += size * cost
                    there.add(key)
    return units


def test_units_count_what_strategies_share_once() -> None:
    costs = keep_cost(SQUARE)
    keys = {s: {f"key {s['patch']}": 0.25 * min(costs[o] for o in costs if o["patch"] == s["patch"])} for s in costs}
    some = [s for s in costs if s != strategy("patch=4,dropout=0")]
    for chosen in (some, some[:2], some[::3], list(costs)):
        expected = spent_by_hand(chosen, costs, keys, 8, 5)
        assert planner_of(shared=keys).units(chosen, 5) == pytest.approx(expected, rel=1e-12)
    assert planner_of().units(some, 5) == pytest.approx(8 * 5 * math.fsum(costs[s] for s in some), rel=1e-12)


@settings(deadline=None, max_examples=150)
@given(
    cap=st.floats(0, 20_000), set_up=st.floats(0, 500), sub_batch=st.integers(1, 64), minimum=st.integers(3, 8),
    more=st.integers(0, 40), keep=st.sets(st.integers(1, 8), max_size=8), at=st.integers(0, 9),
)  # fmt: skip
def test_a_plan_is_within_its_bounds(
    cap: float, set_up: float, sub_batch: int, minimum: int, more: int, keep: set[int], at: int
) -> None:
    strategies = SQUARE.strategies()
    candidates = [s for i, s in enumerate(strategies) if i == 0 or i in keep]
    planner = planner_of(sub_batch=sub_batch, minimum=minimum, maximum=minimum + more)
    incumbent = candidates[at] if at < len(candidates) else None
    plan = planner.plan(candidates, incumbent, cap, set_up)
    if plan is None:
        cheapest = min((keep_cost(SQUARE)[s] for s in candidates[1:]), default=math.inf)
        assert (3 + cheapest) * sub_batch * minimum + set_up > cap * (1 - 1e-9)
        return
    assert plan.units <= cap * (1 + 1e-12)
    assert plan.units == pytest.approx(planner.units(plan.strategies, plan.sub_batches) + set_up)
    assert minimum <= plan.sub_batches <= minimum + more
    assert SQUARE.reference in plan.strategies and len(plan.strategies) >= 2
    assert len(set(plan.strategies)) == len(plan.strategies) and set(plan.strategies) <= set(candidates)
    assert list(plan.strategies) == sorted(plan.strategies, key=strategies.index)


def test_a_larger_cap_measures_longer_and_all_of_them() -> None:
    candidates = SQUARE.strategies()
    full = planner_of().units(candidates, 1)
    caps = [8 * full, 24 * full, 120 * full, 240 * full, 1200 * full, PLENTY]
    plans = [planner_of().plan(candidates, None, cap, 0.0) for cap in caps]
    assert all(p is not None for p in plans)
    assert [len(p.strategies) for p in plans if p][1:] == [9, 9, 9, 9, 9]
    assert [p.sub_batches for p in plans if p] == [4, 8, 12, 20, 32, 32]


def test_what_runs_now_and_its_neighbours_come_first() -> None:
    candidates, now = SQUARE.strategies(), strategy("patch=8,dropout=0.5")
    costs = keep_cost(SQUARE)
    chosen = [SQUARE.reference, now, strategy("patch=4,dropout=0.5"), strategy("patch=8,dropout=0.25")]
    cap = 3 * 8 * 4 * (math.fsum(costs[s] for s in chosen) + 1e-6)
    plan = planner_of().plan(candidates, now, cap, 0.0)
    assert plan is not None and now in plan.strategies
    far = [strategy("patch=2,dropout=0.25"), strategy("patch=4,dropout=0")]
    near = [strategy("patch=4,dropout=0.5"), strategy("patch=8,dropout=0.25")]
    assert sum(s in plan.strategies for s in near) > sum(s in plan.strategies for s in far)
    assert near[0] in plan.strategies or near[1] in plan.strategies


@pytest.mark.parametrize("now", [None, *SQUARE.strategies()])
def test_all_are_measured_in_the_end(now: Strategy | None) -> None:
    """A cap that pays for a few strategies a probe; which ones changes until each was measured, again and again."""
    planner, candidates = planner_of(), SQUARE.strategies()
    cap = 3 * 8 * 4 * 10.0
    seen = dict.fromkeys(candidates, 0)
    for _ in range(20):
        plan = planner.plan(candidates, now, cap, 0.0)
        assert plan is not None
        assert now is None or now in plan.strategies
        for s in plan.strategies:
            seen[s] += 1
        planner.note(plan.strategies, ())
    assert min(seen.values()) >= 2, seen
    assert all(planner.measured(s) for s in candidates)


def test_nothing_is_planned_without_an_alternative_or_a_cap() -> None:
    assert planner_of(TWO).plan([TWO.reference], None, PLENTY, 0.0) is None
    least = 8 * 4 * (3 + 1.5)
    assert planner_of(TWO).plan(TWO.strategies(), None, least * 0.999, 0.0) is None
    assert planner_of(TWO).plan(TWO.strategies(), None, least * 1.001, 0.0) is not None
    assert planner_of(TWO).plan(TWO.strategies(), None, least * 1.001, 1.0) is None  # its set-up is not paid for


def test_a_strategy_that_failed_is_tried_again_but_not_for_ever() -> None:
    planner, bad = planner_of(KEEP), strategy("keep=0.25")
    kept = [s for s in KEEP.strategies() if s != bad]
    for attempt in range(RETRIES):
        plan = planner.plan(kept if attempt else KEEP.strategies(), None, PLENTY, 0.0)
        assert plan is not None and bad in plan.strategies, attempt
        planner.note(kept, (bad,))
    plan = planner.plan(kept, None, PLENTY, 0.0)
    assert plan is not None and bad not in plan.strategies


def test_failures_count_in_a_row() -> None:
    planner, bad = planner_of(KEEP), strategy("keep=0.25")
    kept = [s for s in KEEP.strategies() if s != bad]
    for failed in (True, True, False, True, True):
        planner.note(kept if failed else KEEP.strategies(), (bad,) if failed else ())
    plan = planner.plan(kept, None, PLENTY, 0.0)
    assert plan is not None and bad in plan.strategies


def test_the_only_alternative_is_tried_again_when_it_failed_once() -> None:
    planner, bad = planner_of(TWO), strategy("keep=0.5")
    planner.note([TWO.reference], (bad,))
    plan = planner.plan([TWO.reference], None, PLENTY, 0.0)
    assert plan is not None and bad in plan.strategies


def test_after_blank_probes_in_a_row_no_more_are_tried() -> None:
    planner, candidates = planner_of(KEEP), KEEP.strategies()
    for _ in range(RETRIES):
        assert planner.plan(candidates, None, PLENTY, 0.0) is not None
        planner.note((), candidates)
    assert planner.plan(candidates, None, PLENTY, 0.0) is None
    again = planner_of(KEEP)
    for measured in ((), (), candidates, (), ()):
        again.note(measured, ())
    assert again.plan(candidates, None, PLENTY, 0.0) is not None


def test_a_blank_probe_says_nothing_against_a_strategy() -> None:
    planner = planner_of(KEEP)
    planner.note((), KEEP.strategies())
    assert not any(planner.measured(s) for s in KEEP.strategies())
    planner.note(KEEP.strategies(), ())
    for _ in range(RETRIES - 1):
        planner.note([KEEP.reference], [strategy("keep=0.5")])
    plan = planner.plan([KEEP.reference], None, PLENTY, 0.0)
    assert plan is not None and strategy("keep=0.5") in plan.strategies


def test_what_was_left_out_is_never_measured() -> None:
    planner, out = planner_of(KEEP), strategy("keep=0.5")
    planner.leave_out(out)
    kept = [s for s in KEEP.strategies() if s != out]
    for _ in range(5):
        plan = planner.plan(kept, None, PLENTY, 0.0)
        assert plan is not None and out not in plan.strategies
        planner.note(plan.strategies, ())


@given(st.lists(st.tuples(st.integers(0, 511), st.integers(0, 511)), max_size=8))
def test_a_state_survives_json(told: list[tuple[int, int]]) -> None:
    planner, strategies = planner_of(), SQUARE.strategies()
    for measured, failed in told:
        good = [s for i, s in enumerate(strategies) if measured >> i & 1]
        planner.note(good, [s for i, s in enumerate(strategies) if failed >> i & 1 and s not in good])
    other = planner_of()
    other.load(json.loads(json.dumps(planner.state())))
    assert other.state() == planner.state()
    for now in (None, strategies[4]):
        for cap in (500.0, 3000.0, PLENTY):
            assert other.plan(strategies, now, cap, 0.0) == planner.plan(strategies, now, cap, 0.0)


@pytest.mark.parametrize(
    "change", [{"seen": [0]}, {"failed": ["x"] * 3}, {"probes": None}, {"blank": "many"}, {"seen": 5}]
)
def test_a_damaged_state_is_refused_and_changes_nothing(change: dict[str, Any]) -> None:
    planner = planner_of(KEEP)
    planner.note(KEEP.strategies(), ())
    before = planner.state()
    with pytest.raises((ValueError, KeyError, TypeError)):
        planner.load({**planner_of(KEEP).state(), **change})
    assert planner.state() == before

"""The online policy: what it may spend, how it explores, when it switches, and that it is a pure function."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import schedulers.alignment
from schedulers import AdaptivePolicy, AdaptiveRule, GradscopeError, Grid, Measurement, ProbePlan, Strategy, UsageError
from schedulers.mixing import draw_from
from tests.schedulers.adaptive_cases import (
    KEEP,
    SQUARE,
    TWO,
    Run,
    aligned_means,
    gradients_of,
    keep_cost,
    measurement_of,
    new_policy,
    some_of,
    steady_world,
    strategy,
)

QUARTER, HALF, WHOLE = KEEP.strategies()
GOOD_HALF = aligned_means(KEEP, {"keep=0.25": 0.2, "keep=0.5": 0.97}, length=4.0)
GENEROUS: dict[str, Any] = {"overhead": 0.2, "minimum": 3, "maximum": 12}


@pytest.fixture(autouse=True)
def nothing_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions follow what is measured; what is assumed before that has its tests in test_evidence."""
    monkeypatch.setattr(schedulers.alignment, "OWN_SPREAD", 100.0)


def exact_probe(worth: dict[Strategy, float], sub_batches: int = 6, noise: float = 0.0, seed: int = 0) -> Measurement:
    """A probe that finds the squares of `worth` as scores by "descent-batch", of strategies that cost the same.

    The reference is `WHOLE`, or comes first. `noise` is the standard error of `worth`, each strategy's own.
    """
    rng = np.random.default_rng(seed)
    reference = WHOLE if WHOLE in worth else next(iter(worth))
    whole = worth[reference]
    moments = np.array([[0.1, 1e-3, 1.0, value * whole, whole**2] for value in worth.values()])
    influence = np.full((len(worth), 5, sub_batches), 1e-9)
    for row, each in enumerate(worth):
        psi = rng.standard_normal(sub_batches)
        influence[row, 3] = (each != reference) * noise * whole * psi / np.sqrt(psi @ psi) + 1e-9
    return Measurement(tuple(worth), moments, influence)


def costing_the_same(count: int = 3, budget: float = 1000.0, seed: int = 0, **rule: Any) -> AdaptivePolicy:
    """Strategies mode=0, 1, ... of one unit each; the criterion is then their cosine with the reference, mode=0."""
    grid = Grid({"mode": tuple(range(count))}, Strategy(mode=0))
    rule = {"tolerance": 0.0, "criterion": "descent-batch", "start": 0.0, "finish": 0.0, "dwell": 0.0, **rule}
    return AdaptivePolicy(
        grid, dict.fromkeys(grid.strategies(), 1.0), budget=budget, batch_size=1, rule=AdaptiveRule(**rule), seed=seed
    )


def mode(number: int) -> Strategy:
    return Strategy(mode=number)


# --- draws and exploration


def test_before_anything_is_known_all_candidates_get_the_same_share_of_the_budget() -> None:
    policy = new_policy(budget=1e9)
    spent = dict.fromkeys(KEEP.strategies(), 0.0)
    for step in range(20_000):
        now = policy.at(step)
        spent[now] += policy.costs[now]
    for s in KEEP.strategies():
        assert spent[s] / sum(spent.values()) == pytest.approx(1 / 3, rel=0.06), s
    square = new_policy(SQUARE)
    shares = [weight * square.costs[s] for s, weight in square.mixture(0)]
    np.testing.assert_allclose(shares, shares[0])
    assert len(shares) == 9


@pytest.mark.parametrize("exploration", [0.0, 0.1, 0.5])
def test_a_chosen_strategy_runs_but_for_the_share_that_explores(exploration: float) -> None:
    policy = new_policy(budget=1e9, seed=4, exploration=exploration, start=0.0, **GENEROUS)
    Run(policy, steady_world(policy, GOOD_HALF)).once()
    assert policy.incumbent == HALF and policy.decisions[-1].why == "first"
    first, count = policy.decisions[-1].step, 20_000
    drawn = Counter(policy.at(step) for step in range(first, first + count))
    units = {s: drawn[s] * policy.costs[s] for s in KEEP.strategies()}
    for s in KEEP.strategies():
        share = exploration / 3 + (1 - exploration if s == HALF else 0)
        assert units[s] / sum(units.values()) == pytest.approx(share, rel=0.09, abs=1e-12), s


def test_a_mixture_says_how_often_each_is_drawn() -> None:
    policy = new_policy(SQUARE, budget=1e9, seed=7)
    mixture = policy.mixture(0)
    drawn = Counter(draw_from(mixture, seed=7, step=step) for step in range(60_000))
    assert [policy.at(step) for step in range(100)] == [draw_from(mixture, seed=7, step=step) for step in range(100)]
    assert math.fsum(weight for _, weight in mixture) == pytest.approx(1)
    for s, weight in mixture:
        assert drawn[s] / 60_000 == pytest.approx(weight, rel=0.12), s


def test_draws_depend_on_seed_and_step_alone() -> None:
    a, b, c = (new_policy(SQUARE, seed=seed) for seed in (1, 1, 2))
    steps = list(range(300))
    shuffled = steps[:]
    random.Random(0).shuffle(shuffled)
    forwards = [a.at(step) for step in steps]
    assert {step: b.at(step) for step in shuffled} == dict(zip(steps, forwards, strict=True))
    assert [c.at(step) for step in steps] != forwards
    assert draw_from([(HALF, 0.0), (WHOLE, 1.0)], seed=0, step=0) == WHOLE


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(UsageError, match="step=-1 must be at least 0"):
        new_policy().at(-1)


@pytest.mark.parametrize("seed", range(3))
def test_past_steps_never_change(seed: int) -> None:
    """Whatever is told: the strategy of a step that was asked for when it was the next one stays."""
    means = aligned_means(SQUARE, {str(s): 1 - 0.1 * i for i, s in enumerate(SQUARE.strategies())})
    policy = new_policy(SQUARE, budget=2500, seed=seed, dwell=0.0, **{**GENEROUS, "overhead": 0.9, "maximum": 4})

    def world(step: int, fraction: float, plan: ProbePlan) -> Any:
        order = np.random.default_rng([seed, step]).permutation(len(means))
        mixed = {
            s: list(means.values())[i] for s, i in zip(means, order, strict=True)
        }  # the truth changes all the time
        failing = [s for s in plan.strategies[1:] if (step + hash(str(s)) + seed) % 5 == 0]
        found, _, units = steady_world(policy, mixed, seed=seed)(step, fraction, plan)
        kept = some_of(found, set(plan.strategies) - set(failing))
        return kept, dict.fromkeys(failing, "broken"), units

    run = Run(policy, world)
    mixtures = []
    while True:
        mixtures.append(policy.mixture(run.step))
        if not run.once():
            break
        if run.step % 250 == 0:
            assert [policy.at(step) for step in range(run.step)] == run.seen
    assert len(run.plans) > 3 and len(policy.decisions) > 3
    assert [policy.at(step) for step in range(run.step)] == run.seen
    assert [policy.mixture(step) for step in range(run.step)] == mixtures[: run.step]


# --- the cap


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_the_cap_is_never_exceeded(data: st.DataObject) -> None:
    """Random rules, grids and budgets; probes cost anything up to their plan, and find anything or nothing."""
    grid = data.draw(st.sampled_from([TWO, KEEP, SQUARE]))
    start, finish = data.draw(st.floats(0, 0.5)), data.draw(st.floats(0, 0.49))
    rule = {
        "overhead": data.draw(st.floats(0, 0.99)), "start": start, "finish": finish, "minimum": 3,
        "maximum": data.draw(st.integers(3, 12)), "sub_batch": data.draw(st.sampled_from([0, 1, 20])),
        "frozen": data.draw(st.booleans()), "dwell": data.draw(st.floats(0, 0.2)),
        "exploration": data.draw(st.floats(0, 0.9)), "mix": data.draw(st.floats(0, 0.3)),
    }  # fmt: skip
    budget = data.draw(st.one_of(st.floats(1, 200), st.floats(200, 2500)))
    policy = new_policy(grid, budget=budget, batch_size=4, seed=data.draw(st.integers(0, 99)), **rule)
    set_up = data.draw(st.sampled_from([0.0, 0.0, 3.0, 48.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))

    def world(step: int, fraction: float, plan: ProbePlan) -> Any:
        assert rule["start"] <= fraction < 1 - rule["finish"]
        units = plan.units * float(rng.choice([1.0, 1.0, rng.random(), 0.0]))
        if rng.random() < 0.2:
            return None, dict.fromkeys(plan.strategies, "all failed"), units
        failed = {s: "failed" for s in plan.strategies if s != grid.reference and rng.random() < 0.2}
        kept = {s: rng.normal(size=4) for s in plan.strategies if s not in failed}
        found = measurement_of(gradients_of(kept, rng, plan.sub_batches), grid.reference, policy.batch_size)
        return found, failed, units

    run = Run(policy, world, set_up=set_up)
    while run.once():
        assert policy.probe_units <= policy.rule.overhead * policy.budget * (1 + 1e-12)
        assert run.spent <= policy.budget * (1 + 1e-12)
    assert run.spent == pytest.approx(run.training_units + policy.probe_units)
    assert all(p.units >= set_up for p in run.plans)


def test_a_run_makes_use_of_its_cap_from_start_to_finish() -> None:
    policy = new_policy(budget=50_000, overhead=0.05, start=0.1, finish=0.2, minimum=3, maximum=6)
    at: list[float] = []
    told = steady_world(policy, GOOD_HALF)

    def world(step: int, fraction: float, plan: ProbePlan) -> Any:
        at.append(fraction)
        return told(step, fraction, plan)

    Run(policy, world).all()
    assert 0.8 * 0.05 <= policy.probe_units / policy.budget <= 0.05
    assert 0.1 <= at[0] < 0.105 and 0.6 < at[-1] < 0.8 and len(at) >= 8
    assert sum(f < 0.35 for f in at) > sum(f >= 0.55 for f in at)  # more of them early


@pytest.mark.parametrize("rule", [{"overhead": 0.0}, {"overhead": 1e-6}])
def test_without_means_there_are_no_probes_and_all_stay_mixed(rule: dict[str, float]) -> None:
    policy = new_policy(**rule)
    run = Run(policy, lambda *_: pytest.fail("a probe")).all()
    assert [d.why for d in policy.decisions] == ["start", "finish"]
    assert len(set(run.seen[: policy.decisions[1].step])) == 3


def test_a_probe_that_would_not_fit_the_rest_of_the_budget_gets_fewer_sub_batches() -> None:
    policy = new_policy(budget=1000, overhead=0.9, finish=0.0)
    plan = policy.plan(200)
    assert plan is not None
    one = plan.units / plan.sub_batches
    shorter = policy.plan(1000 - plan.units + 1)
    assert shorter is not None and shorter.strategies == plan.strategies
    assert shorter.sub_batches == plan.sub_batches - 1 and shorter.units == pytest.approx(plan.units - one)
    assert policy.plan(1000 - policy.rule.minimum * one + 1) is None


def test_the_last_probe_takes_what_is_left_of_the_cap() -> None:
    """Something was spent before: three probes are made all the same, the last one shorter."""
    policy = new_policy(budget=4000, overhead=0.2, finish=0.0, minimum=3)
    policy.probe_units = 100.0
    run = Run(policy, steady_world(policy, GOOD_HALF)).all()
    assert [plan.sub_batches for plan in run.plans][:2] == [run.plans[0].sub_batches] * 2
    assert policy.rule.minimum <= run.plans[-1].sub_batches < run.plans[0].sub_batches
    assert policy.probe_units <= 800


def test_measuring_what_the_model_refuses_counts_towards_the_cap() -> None:
    policy = new_policy(budget=1000, overhead=0.3)
    policy.probe_units = 300.0
    assert policy.plan(200) is None


# --- decisions


def test_the_better_strategy_is_found_and_kept() -> None:
    policy = new_policy(budget=30_000, mix=0.0)
    run = Run(policy, steady_world(policy, GOOD_HALF)).all()
    assert policy.switches == 0 and [d.why for d in policy.decisions] == ["start", "first", "finish"]
    assert policy.decisions[1].strategy == HALF and policy.decisions[1].fraction < 0.3
    first, finish = policy.decisions[1].step, policy.decisions[2].step
    assert run.seen[finish:] == [WHOLE] * (run.step - finish)
    assert 0.9 <= run.fractions[finish] < 0.91
    assert Counter(run.seen[first:finish])[HALF] / (finish - first) > 0.75


@pytest.mark.parametrize("criterion", ["descent", "ca-mse", "descent-batch"])
def test_every_criterion_decides_in_its_own_direction(criterion: str) -> None:
    """Nearly unbiased at half the price against nothing but the price; the third points elsewhere."""
    means = aligned_means(KEEP, {"keep=0.25": 0.05, "keep=0.5": 0.999}, length=3.0)
    policy = new_policy(budget=30_000, criterion=criterion, overhead=0.1)
    Run(policy, steady_world(policy, means)).all()
    assert policy.decisions[1].strategy == HALF
    worse = aligned_means(KEEP, {"keep=0.25": 0.05, "keep=0.5": 0.1}, length=3.0)
    policy = new_policy(budget=30_000, criterion=criterion, overhead=0.1)
    Run(policy, steady_world(policy, worse)).all()
    assert policy.decisions[1].strategy == WHOLE


def test_no_choice_before_all_candidates_were_measured() -> None:
    policy = costing_the_same(3)
    verdict = policy.tell(0, 10, 0, exact_probe({mode(0): 0.5, mode(1): 0.9}))
    assert verdict.best == mode(1) and not verdict.switched and policy.incumbent is None
    verdict = policy.tell(5, 20, 0, exact_probe({mode(0): 0.5, mode(2): 0.1}))
    assert policy.incumbent is None or policy.incumbent != mode(2)
    policy.tell(9, 30, 0, exact_probe({mode(0): 0.5, mode(1): 0.9, mode(2): 0.1}))
    assert policy.incumbent == mode(1)


@pytest.mark.parametrize("confidence", [0.5, 1.0, 2.0])
def test_an_advantage_within_its_error_is_no_reason_to_switch(confidence: float) -> None:
    """From mode 1 to mode 2, whose worth is ahead by a little less, and a little more, than so many errors."""
    for errors, switches in ((0.7 * confidence, 0), (1.4 * confidence, 1)):
        policy = costing_the_same(3, confidence=confidence, exploration=0.0, half_life=1e-3)
        policy.tell(0, 0.0, 0.0, exact_probe({mode(0): 0.2, mode(1): 0.8, mode(2): 0.5}))
        assert policy.incumbent == mode(1)
        noise = 0.05  # of inner, each its own; the worth is its square
        error = 2 * math.sqrt(2) * 0.8 * noise
        ahead = math.sqrt(0.64 + errors * error)
        verdict = policy.tell(9, 500.0, 0.0, exact_probe({mode(0): 0.2, mode(1): 0.8, mode(2): ahead}, noise=noise))
        assert verdict.best == mode(2) and verdict.advantage is not None and verdict.standard_error is not None
        assert verdict.advantage == pytest.approx(ahead**2 - 0.64, rel=0.05)
        assert verdict.standard_error == pytest.approx(error, rel=0.25)
        assert verdict.switched == bool(switches) and policy.switches == switches


def test_the_first_choice_needs_no_certainty() -> None:
    """Of three that look alike the best is taken, beyond the tolerance, whatever its error."""
    for tolerance, chosen in ((0.0, mode(1)), (0.5, None)):
        policy = costing_the_same(3, confidence=100.0, tolerance=tolerance)
        probe = exact_probe({mode(0): 0.5, mode(1): 0.55, mode(2): 0.45}, noise=0.5)
        verdict = policy.tell(0, 0.0, 0.0, probe)
        assert verdict.advantage is not None and verdict.standard_error is not None
        assert 0 < verdict.advantage < verdict.standard_error and policy.incumbent == chosen


def test_of_those_about_as_good_the_cheapest_is_chosen_first() -> None:
    """Within a twentieth of the best score; a switch later needs an advantage, whatever it costs."""
    for worth, chosen in ((0.96, QUARTER), (0.94, HALF)):
        policy = new_policy(tolerance=0.0, start=0.0, criterion="descent-batch", overhead=0.2)
        cost = {s: policy.costs[s] / policy.costs[WHOLE] for s in KEEP.strategies()}  # undone by the worth below
        told = {QUARTER: math.sqrt(worth * cost[QUARTER]), HALF: math.sqrt(cost[HALF]), WHOLE: math.sqrt(0.5)}
        policy.tell(0, 0.0, 0.0, exact_probe(told))
        assert policy.incumbent == chosen


def test_an_advantage_below_the_tolerance_is_not_worth_a_switch() -> None:
    for ahead, switched in ((1.08, False), (1.12, True)):
        policy = costing_the_same(2, tolerance=0.1)
        policy.tell(0, 0.0, 0.0, exact_probe({mode(0): 0.9, mode(1): 0.1}))
        assert policy.incumbent == mode(0)
        verdict = policy.tell(9, 900.0, 0.0, exact_probe({mode(0): 0.5, mode(1): 0.5 * math.sqrt(ahead)}, 4000))
        assert verdict.best == mode(1) and verdict.switched == switched


def test_the_tolerance_holds_for_scores_below_zero() -> None:
    """ca-mse is an error: its worth is negative, and an advantage is still a share of its size."""
    for ahead, switched in ((0.92, False), (0.88, True)):
        policy = costing_the_same(2, tolerance=0.1, criterion="ca-mse", half_life=1e-3)

        def told(bias: dict[Strategy, float]) -> Measurement:
            moments = np.array([[value, 1e-6, 1.0, 1.0, 1.0] for value in bias.values()])
            return Measurement(tuple(bias), moments, np.full((len(bias), 5, 6), 1e-9))

        policy.tell(0, 0.0, 0.0, told({mode(0): 0.2, mode(1): 0.9}))
        assert policy.incumbent == mode(0)
        verdict = policy.tell(9, 900.0, 0.0, told({mode(0): 0.5, mode(1): 0.5 * ahead}))
        assert verdict.best == mode(1) and verdict.switched == switched
        assert verdict.scores[mode(1)] == pytest.approx(0.5 * ahead, rel=1e-3)  # as the criterion has it: an error


@pytest.mark.parametrize("confidence", [1.0, 2.0])
def test_no_change_is_made_on_an_advantage_within_its_error(confidence: float) -> None:
    """What the user is told and what is done agree, also where few sub-batches make scores skewed."""
    changes = 0
    for seed in range(14):
        good = aligned_means(KEEP, {"keep=0.25": 0.2, "keep=0.5": 0.97}, length=1.5)
        bad = aligned_means(KEEP, {"keep=0.25": 0.9, "keep=0.5": 0.1}, length=1.5)
        policy = new_policy(budget=9000, seed=seed, minimum=3, maximum=6, overhead=0.2, confidence=confidence)
        worlds = [steady_world(policy, means, seed=seed) for means in (good, bad)]
        run = Run(policy, lambda step, at, plan, w=worlds: w[at > 0.4](step, at, plan)).all()  # type: ignore[misc]
        later = [verdict for verdict in run.verdicts if verdict.switched][1:]  # than the first choice
        for verdict in later:
            changes += 1
            assert verdict.advantage > confidence * verdict.standard_error, verdict
    assert changes > 3


@pytest.mark.parametrize("dwell", [0.0, 0.1, 0.3])
def test_switches_keep_their_distance(dwell: float) -> None:
    """The best one changes with every probe, beyond all doubt."""
    policy = costing_the_same(2, dwell=dwell)
    for i in range(50):
        good = i % 2
        policy.tell(i, 20.0 * i, 0.0, exact_probe({mode(0): 0.9 - 0.8 * good, mode(1): 0.1 + 0.8 * good}))
    changes = [d.fraction for d in policy.decisions if d.why in ("first", "switch")]
    assert min(np.diff(changes)) >= max(dwell, 0.02) - 1e-12
    assert len(changes) == policy.switches + 1 >= 3
    if dwell:
        assert policy.switches <= 1 / dwell


def test_noise_alone_does_not_make_it_oscillate() -> None:
    """Two strategies as good as each other: few switches in a whole run, over seeds."""
    means = aligned_means(KEEP, {"keep=0.25": 0.3, "keep=0.5": math.sqrt(0.72)}, length=1.5)
    switches = []
    for seed in range(8):
        policy = new_policy(budget=8000, seed=seed, minimum=3, maximum=8)
        Run(policy, steady_world(policy, means, seed=seed, own=0.6)).all()
        switches.append(policy.switches)
    assert max(switches) <= 3 and np.mean(switches) <= 1


def test_monotone_never_goes_to_a_cheaper_one() -> None:
    truth = [{HALF: 0.99, WHOLE: 0.2, QUARTER: 0.1}, {QUARTER: 0.99, HALF: 0.3, WHOLE: 0.1}, {WHOLE: 0.99, HALF: 0.1}]
    for monotone, expected in ((False, [HALF, QUARTER, WHOLE]), (True, [HALF, HALF, WHOLE])):
        policy = new_policy(monotone=monotone, dwell=0.0, start=0.0, finish=0.0, tolerance=0.0)
        found = []
        for i, worth in enumerate(truth):
            for j in range(4):
                probe = exact_probe({QUARTER: 0.05, **worth})
                policy.tell(4 * i + j, 20_000 * (0.3 * i + 0.05 * j), 0.0, probe)
            found.append(policy.incumbent)
        assert found == expected
        costs = [policy.costs[d.strategy] for d in policy.decisions if d.strategy is not None]
        assert not monotone or costs == sorted(costs)


def test_the_last_part_runs_on_the_reference_without_exploring() -> None:
    policy = new_policy(budget=5000, finish=0.25, exploration=0.5)
    run = Run(policy, steady_world(policy, GOOD_HALF)).all()
    assert policy.finishing and policy.decisions[-1].why == "finish" and policy.incumbent == WHOLE
    last = [s for s, f in zip(run.seen, run.fractions, strict=True) if f >= 0.75]
    assert len(last) > 30 and set(last) == {WHOLE}
    assert policy.mixture(run.step) == ((WHOLE, 1.0),)
    assert sum(d.why == "finish" for d in policy.decisions) == 1


def test_no_finish_where_none_is_wanted() -> None:
    policy = new_policy(budget=20_000, finish=0.0, exploration=0.3, mix=0.0)
    run = Run(policy, steady_world(policy, GOOD_HALF)).all()
    assert [d.why for d in policy.decisions] == ["start", "first"] and not policy.finishing
    assert len(set(run.seen[-60:])) == 3 and Counter(run.seen[-60:]).most_common(1)[0][0] == HALF
    assert max(v is not None for v in run.verdicts) and run.plans


# --- all mixed before a probe


def test_before_a_probe_all_candidates_are_mixed_for_a_moment() -> None:
    policy = new_policy(budget=400_000, overhead=0.05, mix=0.004, exploration=0.0)
    at, steady = [], steady_world(policy, GOOD_HALF)

    def world(step: int, fraction: float, plan: ProbePlan) -> Any:
        at.append(step)
        return steady(step, fraction, plan)

    run = Run(policy, world).all()
    whys = [d.why for d in policy.decisions]
    assert whys[:2] == ["start", "first"] and whys[-1] == "finish" and len(run.plans) >= 8
    assert whys[2:-1] == ["mix", "resume"] * (len(run.plans) - 1)
    pairs = list(zip(policy.decisions[2:-1:2], policy.decisions[3:-1:2], strict=True))
    for mixed, resumed in pairs:
        assert mixed.strategy == resumed.strategy == HALF and mixed.exploration == 1 and resumed.exploration == 0
        own = run.plans[at.index(resumed.step - 1)].units / policy.budget  # of the probe itself
        assert 0.0038 < resumed.fraction - mixed.fraction - own < 0.0044
        assert resumed.step - 1 in at
        seen = run.seen[mixed.step : resumed.step]
        assert set(seen) == {QUARTER, HALF, WHOLE}
    between = [run.seen[a[1].step : b[0].step] for a, b in itertools.pairwise(pairs)]
    assert all(set(seen) == {HALF} for seen in between) and policy.switches == 0


@pytest.mark.parametrize("spent", [1.0, 0.2])
def test_it_is_mixed_for_a_tenth_of_the_way_to_the_next_probe_at_most(spent: float) -> None:
    """Also where probes end early, because their race is decided: there are many more of them then."""
    policy = new_policy(budget=400_000, overhead=0.05, mix=0.9, exploration=0.0)
    steady = steady_world(policy, GOOD_HALF)

    def world(step: int, fraction: float, plan: ProbePlan) -> Any:
        found, failed, units = steady(step, fraction, plan)
        return found, failed, spent * units

    Run(policy, world).all()
    edges = [d for d in policy.decisions if d.why in ("mix", "resume")]
    mixed = sum(b.fraction - a.fraction for a, b in itertools.pairwise(edges) if a.why == "mix")
    chosen = sum(b.fraction - a.fraction for a, b in itertools.pairwise(edges) if a.why == "resume")
    assert len(edges) > 8 and 0.05 < mixed / (mixed + chosen) < 0.2  # with the probes' own units


@pytest.mark.parametrize("set_up", [0.0, 700.0])
def test_where_no_probe_comes_nothing_is_mixed_for_long(set_up: float) -> None:
    """The cap pays for one probe only, or the probe turns out to cost too much when it is due."""
    policy = new_policy(budget=10_000, overhead=0.09, mix=0.05, exploration=0.0, minimum=3, maximum=4, finish=0.0)
    run = Run(policy, steady_world(policy, GOOD_HALF))
    while policy.incumbent is None:
        assert run.once()
    if not set_up:
        policy.probe_units = policy.rule.overhead * policy.budget - 1
    run.set_up = set_up
    run.all()
    assert len(run.plans) == 1
    lasted = [
        b.fraction - a.fraction
        for a, b in itertools.pairwise([*policy.decisions, dataclasses.replace(policy.decisions[-1], fraction=1.0)])
        if a.why == "mix"
    ]
    assert not policy.mixing and (not lasted if not set_up else 0.02 < sum(lasted) < 0.12)


@pytest.mark.parametrize("rule", [{"mix": 0.0}, {"frozen": True}])
def test_without_it_the_chosen_strategy_runs_up_to_the_probe(rule: dict[str, Any]) -> None:
    policy = new_policy(budget=50_000, **rule)
    Run(policy, steady_world(policy, GOOD_HALF)).all()
    assert not any(d.why in ("mix", "resume") for d in policy.decisions)


def test_frozen_measures_but_never_decides() -> None:
    policy = new_policy(budget=20_000, frozen=True, overhead=0.12)
    run = Run(policy, steady_world(policy, GOOD_HALF)).all()
    assert len(run.plans) >= 4 and policy.probe_units > 0
    assert [d.why for d in policy.decisions] == ["start"] and policy.incumbent is None
    assert all(v.scores and not v.switched for v in run.verdicts)
    other = new_policy(budget=20_000)
    assert run.seen == [other.at(step) for step in range(run.step)]  # as if nothing had been told


def test_a_grid_of_one_is_a_plain_run() -> None:
    grid = Grid({"keep": (1,)}, Strategy(keep=1))
    policy = new_policy(grid, budget=2000)
    run = Run(policy, lambda *_: pytest.fail("a probe")).all()
    assert set(run.seen) == {WHOLE} and run.step == 2000 // 24 and policy.probe_units == 0
    assert policy.schedule(run.spent).strategies == (WHOLE,) or list(policy.schedule(run.spent).strategies) == [WHOLE]


# --- failures


def without(found: Measurement, *gone: Strategy) -> Measurement:
    return some_of(found, set(found.strategies) - set(gone))


def failing_world(policy: AdaptivePolicy, means: Any, fails: Any) -> Any:
    """`steady_world`, but `fails(number)` says which strategies fail in that probe."""
    told, count = steady_world(policy, means), iter(range(10_000))

    def world(step: int, fraction: float, plan: ProbePlan) -> Any:
        gone = [s for s in fails(next(count)) if s in plan.strategies]
        found, _, units = told(step, fraction, plan)
        return without(found, *gone), dict.fromkeys(gone, "out of memory"), units

    return world


def test_a_candidate_that_fails_is_neither_chosen_nor_explored_until_it_is_back() -> None:
    policy = new_policy(budget=30_000, overhead=0.1, exploration=0.6, minimum=3, maximum=4)
    run = Run(policy, failing_world(policy, GOOD_HALF, lambda n: [QUARTER] if n in (1, 2) else []))
    run.all()
    whys = [d.why for d in policy.decisions]
    assert whys.count("failed: keep=0.25") == 1 and whys.count("back: keep=0.25") == 1
    gone = next(d.step for d in policy.decisions if d.why.startswith("failed"))
    back = next(d.step for d in policy.decisions if d.why.startswith("back"))
    finish = next(d.step for d in policy.decisions if d.why == "finish")
    assert gone < back < finish
    assert QUARTER in run.seen[:gone] and QUARTER not in run.seen[gone:back] and QUARTER in run.seen[back:finish]
    shares = {s: w * policy.costs[s] for s, w in policy.mixture(gone)}
    assert set(shares) == {HALF, WHOLE} and shares[WHOLE] / sum(shares.values()) == pytest.approx(0.3)


def test_a_candidate_that_keeps_failing_is_given_up() -> None:
    policy = new_policy(budget=30_000, overhead=0.1, minimum=3, maximum=4)
    run = Run(policy, failing_world(policy, GOOD_HALF, lambda n: [QUARTER])).all()
    assert sum(QUARTER in p.strategies for p in run.plans) == 3 and len(run.plans) > 5
    assert policy.candidates == (HALF, WHOLE) and policy.decisions[-2].strategy == HALF


def test_the_only_alternative_comes_back_after_one_failure() -> None:
    """ "No candidates until a later probe measures them": a later probe has to try."""
    policy = new_policy(TWO, budget=30_000, overhead=0.1, minimum=3, maximum=4)
    means = aligned_means(TWO, {"keep=0.5": 0.99})
    Run(policy, failing_world(policy, means, lambda n: [HALF] if n == 0 else [])).all()
    assert "back: keep=0.5" in [d.why for d in policy.decisions]
    assert policy.decisions[-2].strategy == HALF


def test_what_runs_stays_when_it_fails_in_a_probe() -> None:
    policy = new_policy(budget=30_000, overhead=0.1, minimum=3, maximum=4, mix=0.0)
    run = Run(policy, failing_world(policy, GOOD_HALF, lambda n: [HALF] if n == 4 else [])).all()
    assert len(run.plans) > 6 and [d.strategy for d in policy.decisions] == [None, HALF, WHOLE]


def test_what_runs_is_left_when_it_fails_for_good_and_another_is_better_than_it_ever_was() -> None:
    """The truth turns round, and the present strategy cannot be measured any more: the rest of the run goes on."""
    policy = costing_the_same(3, half_life=0.1)
    policy.tell(0, 0.0, 0.0, exact_probe({mode(0): 0.2, mode(1): 0.9, mode(2): 0.1}))
    assert policy.incumbent == mode(1)
    for i in range(1, 9):
        probe = exact_probe({mode(0): 0.3, mode(2): 0.99})
        policy.tell(i, 100.0 * i, 0.0, probe, {mode(1): "out of memory"})
    assert policy.incumbent == mode(2)


def test_what_runs_is_left_when_nothing_is_known_of_it_any_more() -> None:
    """It fails for longer than anything is remembered: the best of those known goes on."""
    policy = costing_the_same(3, half_life=0.01)
    policy.tell(0, 0.0, 0.0, exact_probe({mode(0): 0.8, mode(1): 0.9, mode(2): 0.1}))
    assert policy.incumbent == mode(1)
    verdict = policy.tell(5, 100.0, 0.0, exact_probe({mode(0): 0.3, mode(2): 0.99}), {mode(1): "out of memory"})
    assert mode(1) not in verdict.scores and verdict.advantage is None
    assert verdict.switched and policy.incumbent == mode(2)


@pytest.mark.parametrize("kind", ["nothing", "no reference"])
def test_a_probe_without_the_reference_changes_nothing(kind: str) -> None:
    policy = new_policy(budget=30_000, overhead=0.1)
    run = Run(policy, steady_world(policy, GOOD_HALF))
    while len(run.plans) < 2:
        assert run.once()
    before = policy.state_dict()
    plan = next(plan for spent in range(int(run.spent), 27_000, 24) if (plan := policy.plan(spent)) is not None)
    found = None if kind == "nothing" else without(steady_world(policy, GOOD_HALF)(5, 0.2, plan)[0], WHOLE)
    verdict = policy.tell(run.step, run.spent, 10.0, found, dict.fromkeys(plan.strategies, "the loss is nan"))
    assert verdict.best is None and not verdict.switched and not verdict.scores
    after = policy.state_dict()
    assert after["decisions"] == before["decisions"] and after["evidence"] == before["evidence"]
    assert after["probe_units"] == before["probe_units"] + 10.0


def test_after_three_blank_probes_no_more_are_made() -> None:
    policy = new_policy(budget=30_000, overhead=0.2, minimum=3, maximum=4)
    run = Run(policy, lambda step, fraction, plan: (None, dict.fromkeys(plan.strategies, "nan"), plan.units)).all()
    assert len(run.plans) == 3 and [d.why for d in policy.decisions] == ["start", "finish"]
    assert set(run.seen[: policy.decisions[1].step]) == set(KEEP.strategies())


def test_what_is_left_out_never_runs() -> None:
    policy = new_policy(budget=20_000)
    policy.leave_out(QUARTER, "the model refuses it")
    run = Run(policy, steady_world(policy, GOOD_HALF)).all()
    assert QUARTER not in run.seen and all(QUARTER not in p.strategies for p in run.plans)
    assert policy.decisions[1].strategy == HALF
    with pytest.raises(UsageError, match="only before training begins"):
        policy.leave_out(HALF, "late")
    with pytest.raises(UsageError, match="the reference keep=1 cannot be left out"):
        new_policy().leave_out(WHOLE, "no")


# --- drift


def test_one_precise_probe_outweighs_many_before_it() -> None:
    """What was found before counts as far as it may still hold, however often it was found."""
    policy = costing_the_same(2)
    for i in range(20):
        policy.tell(i, 10.0 * i, 0.0, exact_probe({mode(0): 0.5, mode(1): 0.9}, noise=0.01, seed=i))
    assert policy.incumbent == mode(1)
    verdict = policy.tell(20, 300.0, 0.0, exact_probe({mode(0): 0.8, mode(1): 0.3}, noise=0.01))
    assert verdict.switched and policy.incumbent == mode(0)


def test_a_doubtful_contradiction_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedulers.alignment, "OWN_SPREAD", 0.5)
    policy = costing_the_same(2)
    for i in range(10):
        policy.tell(i, 10.0 * i, 0.0, exact_probe({mode(0): 0.5, mode(1): 0.9}, noise=0.01, seed=i))
    verdict = policy.tell(20, 100.0, 0.0, exact_probe({mode(0): 0.5, mode(1): 0.45}, noise=0.5))
    assert verdict.best == mode(1) and not verdict.switched and policy.incumbent == mode(1)


def test_a_slow_drift_is_followed() -> None:
    policy = new_policy(budget=30_000, finish=0.0, overhead=0.2)

    def world(step: int, fraction: float, plan: ProbePlan) -> Any:
        means = aligned_means(KEEP, {"keep=0.25": 0.0, "keep=0.5": 0.97 * (1 - fraction) ** 0.4}, length=2.0)
        return steady_world(policy, means)(step, fraction, plan)

    Run(policy, world).all()
    chosen = [d for d in policy.decisions if d.why in ("first", "switch")]
    assert [d.strategy for d in chosen] == [HALF, WHOLE]
    assert 0.4 < chosen[-1].fraction < 0.9  # the score of half the sequence falls below at 0.41


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_the_length_of_all_gradients_changes_no_decision(factor: float) -> None:
    runs = []
    for scale in (1.0, factor):
        policy = new_policy(SQUARE, budget=2500, dwell=0.0, **{**GENEROUS, "overhead": 0.5})
        quality = {str(s): 1 - 0.09 * i for i, s in enumerate(SQUARE.strategies())}
        told = steady_world(policy, aligned_means(SQUARE, quality))

        def world(step: int, fraction: float, plan: ProbePlan, told: Any = told, scale: float = scale) -> Any:
            found, failed, units = told(step, fraction, plan)
            square = (scale * math.exp(-3 * fraction)) ** 2 if scale != 1 else math.exp(-3 * fraction) ** 2
            return some_of(found, found.strategies, square), failed, units

        runs.append(Run(policy, world).all())
    assert runs[0].policy.decisions == runs[1].policy.decisions and len(runs[0].plans) > 2
    assert runs[0].seen == runs[1].seen


# --- state


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return type(value) in (str, int, float, bool, type(None))


FOUR = Grid({"patch": (2, 4), "dropout": (0, 0.5)}, Strategy(patch=2, dropout=0))
EVENTFUL: dict[str, Any] = {
    "budget": 4000, "dwell": 0.02, "overhead": 0.6, "minimum": 3, "maximum": 4, "exploration": 0.3
}  # fmt: skip


def eventful(seed: int) -> tuple[AdaptivePolicy, Any]:
    """A run with drift and failures; its world is a function of step and plan alone."""
    policy = new_policy(FOUR, seed=seed, **EVENTFUL)
    if seed % 2:
        policy.leave_out(strategy("patch=4,dropout=0.5"), "refused")
    return policy, eventful_world


def eventful_world(step: int, fraction: float, plan: ProbePlan) -> Any:
    rng = np.random.default_rng(step)
    turn = int(4 * fraction)
    quality = {str(s): 1 - 0.25 * ((i + turn) % 4) for i, s in enumerate(FOUR.strategies())}
    means = aligned_means(FOUR, quality)
    failed = [s for s in plan.strategies if s != FOUR.reference and rng.random() < 0.15]
    found = measurement_of(
        gradients_of({s: means[s] for s in plan.strategies if s not in failed}, rng, plan.sub_batches),
        FOUR.reference,
    )
    if rng.random() < 0.1:
        return None, dict.fromkeys(plan.strategies, "nan"), 0.5 * plan.units
    return found, dict.fromkeys(failed, "out of memory"), plan.units * (0.5 + 0.5 * rng.random())


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_taken_up_at_any_step_decides_as_it_would_have(seed: int) -> None:
    """From every step around a probe or a decision as far as the next ones, and from some to the end."""
    policy, world = eventful(seed)
    whole = Run(policy, world)
    states = []
    while True:
        states.append((whole.spent, json.dumps(policy.state_dict(), allow_nan=False)))
        if not whole.once():
            break
    assert len(policy.decisions) >= 5 and len(whole.plans) > 4, (policy.decisions, len(whole.plans))
    told_at = [i for i in range(1, len(states)) if states[i][1] != states[i - 1][1]]
    points = sorted({0, len(states) - 1, *told_at, *(i - 1 for i in told_at), *range(0, len(states), 97)})
    for number, step in enumerate(points):
        spent, text = states[step]
        other = new_policy(FOUR, seed=seed, **EVENTFUL)
        other.load_state_dict(json.loads(text))
        assert json.dumps(other.state_dict()) == text
        assert [other.at(k) for k in range(step)] == whole.seen[:step]
        rest, next_told = Run(other, world, spent=spent, step=step), [i for i in told_at if i > step][:2]
        until = whole.step if number % 7 == 0 else max(next_told, default=whole.step)
        while rest.step < until:
            assert rest.once()
        assert rest.seen == whole.seen[step:until]
        assert (rest.spent, json.dumps(other.state_dict())) == states[until]


def test_a_state_is_made_of_plain_types_and_a_copy() -> None:
    policy, world = eventful(1)
    run = Run(policy, world)
    while len(run.plans) < 3:
        assert run.once()
    state = policy.state_dict()
    assert plain(state), state
    before = copy.deepcopy(state)
    run.all()
    assert state == before  # what was given away does not change


@pytest.fixture
def half_way() -> tuple[AdaptivePolicy, dict[str, Any]]:
    policy, world = eventful(0)
    run = Run(policy, world)
    while len(run.plans) < 3:
        assert run.once()
    return policy, policy.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 9001}, "other budget"),
        ({"seed": 3}, "other seed"),
        ({"batch_size": 16}, "other batch_size"),
        ({"exploration": 0.2}, "other rule"),
        ({"grid": KEEP}, "other axes"),
    ],
)
def test_a_state_of_other_settings_is_refused(
    changes: dict[str, Any], message: str, half_way: tuple[AdaptivePolicy, dict[str, Any]]
) -> None:
    given = {"grid": FOUR, "seed": 0, **EVENTFUL, **changes}
    other = new_policy(**given)
    before = other.state_dict()
    with pytest.raises(UsageError, match=f"the state is of another run: {message}") as error:
        other.load_state_dict(half_way[1])
    assert other.state_dict() == before
    if "grid" in changes:
        assert "strict=False" not in str(error.value)
        with pytest.raises(UsageError, match="axes"):
            other.load_state_dict(half_way[1], strict=False)
    else:
        assert "strict=False" in str(error.value)
        other.load_state_dict(half_way[1], strict=False)
        assert other.decisions == half_way[0].decisions and other.probe_units == half_way[0].probe_units


def test_a_newer_state_is_refused(half_way: tuple[AdaptivePolicy, dict[str, Any]]) -> None:
    policy, state = half_way
    with pytest.raises(GradscopeError, match="version 99, newer than 2: go on with the gradscope"):
        policy.load_state_dict({**state, "version": 99})


@pytest.mark.parametrize(
    "damage",
    [
        {"version": None}, {"settings": "no JSON"}, {"settings": "[]"}, {"decisions": []}, {"decisions": [{}]},
        {"decisions": 3}, {"probe_units": "many"}, {"probe_units": None}, {"planner": {}}, {"planner": None},
        {"left_out": ["nonsense"]},
        {"evidence": [{}]}, {"evidence": None},
        {"evidence": [{"fraction": 0.1, "strategies": [77], "moments": [[1.0] * 5], "influence": [[[1.0]] * 5]}]},
        {"evidence": [{"fraction": 0.1, "strategies": [0], "moments": [[1.0] * 4], "influence": [[[1.0]] * 5]}]},
        {"evidence": [{"fraction": "x", "strategies": [0], "moments": [[1.0] * 5], "influence": [[[1.0]] * 5]}]},
        {"evidence": [{"fraction": 0.1, "strategies": [0], "moments": [[None] * 5], "influence": [[[1.0]] * 5]}]},
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_leaves_the_policy_as_it_was(
    damage: dict[str, Any], half_way: tuple[AdaptivePolicy, dict[str, Any]]
) -> None:
    state, fresh = half_way[1], eventful(0)[0]
    before = fresh.state_dict()
    with pytest.raises(GradscopeError):
        fresh.load_state_dict({**state, **damage})
    assert fresh.state_dict() == before
    for missing in damage:
        with pytest.raises(GradscopeError, match="damaged"):
            fresh.load_state_dict({name: value for name, value in state.items() if name != missing})
    assert fresh.state_dict() == before


def test_a_damaged_state_says_that_it_is(half_way: tuple[AdaptivePolicy, dict[str, Any]]) -> None:
    with pytest.raises(GradscopeError, match="the state of the online policy is damaged"):
        half_way[0].load_state_dict({**half_way[1], "decisions": [{"step": 0}]})


# --- what is refused at once, and the schedule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.0}, "budget=0.0"),
        ({"budget": math.nan}, "budget=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"costs": {HALF: 1.0, WHOLE: 2.0}}, "costs: keep=0.25 has none"),
        ({"costs": {QUARTER: 0.0, HALF: 1.0, WHOLE: 2.0}}, "costs: keep=0.25 has none that is a positive"),
        ({"costs": {QUARTER: math.inf, HALF: 1.0, WHOLE: 2.0}}, "costs: keep=0.25"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdaptivePolicy(KEEP, **{"costs": keep_cost(KEEP), "budget": 100.0, "batch_size": 4, **changes})


@pytest.mark.parametrize("seed", range(2))
def test_a_schedule_of_what_ran_runs_the_same_mixtures(seed: int) -> None:
    policy, world = eventful(seed)
    run = Run(policy, world).all()
    schedule = policy.schedule(run.spent)
    assert schedule.budget == 4000 and schedule.batch_size == 8 and schedule.criterion == "descent"
    assert type(schedule).from_json(schedule.to_json()) == schedule
    assert schedule.constraints["probe_units"] == policy.probe_units
    for step in range(0, run.step, 7):
        decided = next(d for d in reversed(policy.decisions) if d.step <= step)
        ahead = next((d.fraction for d in policy.decisions if d.step > step), 2.0)
        if run.fractions[step] >= ahead or run.fractions[step] < decided.fraction:
            continue  # a probe stands between the step and the decision that it led to
        assert dict(schedule.at(run.fractions[step]).mixture) == pytest.approx(dict(policy.mixture(step)))


def test_a_schedule_before_the_first_step_is_the_mixture() -> None:
    policy = new_policy()
    (stage,) = policy.schedule(0.0).stages
    assert (stage.start, stage.end) == (0, 1) and stage.mixture == policy.mixture(0)

"""What holds of every optimized schedule, on random profiles and constraints, and how fine its slices must be."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import (
    Constraints,
    Grid,
    InfeasibleError,
    Profile,
    Schedule,
    Strategy,
    UsageError,
    optimize,
    predict,
    smallest_budget,
)

GRIDS = (
    Grid({"mode": ("a", "b", "c")}, Strategy(mode="c")),
    Grid({"patch": (4, 7, 14), "dropout": (0, 0.5)}, Strategy(patch=4, dropout=0)),
)
MODES, CRITERIA = ("fraction", "trajectory"), ("descent", "ca-mse", "descent-batch")
seeds, modes, criteria = st.integers(0, 2**32), st.sampled_from(MODES), st.sampled_from(CRITERIA)
checked = settings(deadline=None, derandomize=True, max_examples=30)


def random_constraints(rng: np.random.Generator, profile: Profile) -> Constraints:
    names = profile.grid.strategies()
    picked = {name for name in names if rng.random() < 0.7} | {profile.grid.reference}
    return Constraints(
        allowed=tuple(name for name in names if name in picked) if rng.random() < 0.4 else None,
        monotone=[(), (), ("cost",), tuple(profile.grid.axes)][rng.integers(4)],
        max_switches=int(rng.integers(0, 4)) if rng.random() < 0.4 else None,
        min_dwell=float(rng.choice([0, 0, 0.1, 0.25])),
        final_reference=float(rng.choice([0, 0, 0.1, 0.3])),
        max_seconds=float(rng.uniform(500, 5000)) if rng.random() < 0.4 else None,
        max_memory=float(rng.uniform(4e8, 1e9)) if rng.random() < 0.3 else None,
    )


def uncertain(rng: np.random.Generator, profile: Profile) -> Profile:
    """The profile with errors of any size, of cells alone or of what they share."""
    shape = (*profile.moments.shape, 5)
    root = 10 ** rng.uniform(-2, 0) * rng.normal(size=(*shape, 6)) / 3
    covariance = root @ root.swapaxes(-1, -2)
    return dataclasses.replace(profile, covariance=covariance, influence=root if rng.random() < 0.5 else None)


def solved(profile: Profile, budget: float, **arguments) -> Schedule | None:
    """The schedule; None where there is none, or the pilot's own gain is lost, or no strategy can be explored."""
    try:
        return optimize(profile, budget, **arguments)
    except InfeasibleError:
        return None
    except UsageError as error:
        assert "lost in noise" in str(error) or "nothing to explore" in str(error)
        return None


def worth_of(schedule: Schedule | None) -> float:
    """What the schedule maximizes; -inf where there is none."""
    if schedule is None:
        return -math.inf
    if schedule.progress_mode == "trajectory":
        return schedule.predicted["progress"]
    return (-1 if schedule.criterion == "ca-mse" else 1) * schedule.predicted["score"]


@given(
    seed=seeds, mode=modes, criterion=criteria, exploration=st.sampled_from([0.0, 0.1, 0.5, 1.0]), doubts=st.booleans()
)
@checked
def test_a_schedule_survives_its_file(
    seed: int, mode: str, criterion: str, exploration: float, doubts: bool, random_profile
) -> None:
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, GRIDS[seed % 2], holes=0.2 * rng.random())
    if doubts:
        profile = uncertain(rng, profile)
    arguments = {"criterion": criterion, "progress": mode, "exploration": exploration, "slices": 20}
    arguments |= {"constraints": random_constraints(rng, profile), "draws": 50 * doubts, "seed": seed}
    schedule = solved(profile, 10 ** rng.uniform(4, 6.5), **arguments)
    if schedule is not None:
        assert Schedule.from_json(schedule.to_json()) == schedule
        assert all(stage.mixture and abs(sum(w for _, w in stage.mixture) - 1) < 1e-12 for stage in schedule.stages)
        assert {stage.probability is not None for stage in schedule.stages} <= {doubts, False}


@given(seed=seeds, mode=modes, criterion=criteria, exploration=st.sampled_from([0.0, 0.3]))
@checked
def test_a_run_never_costs_more_than_the_budget(
    seed: int, mode: str, criterion: str, exploration: float, random_profile
) -> None:
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, GRIDS[seed % 2])
    step = profile.batch_size * float(np.nanmax(profile.cost))
    budget = step * float(rng.uniform(1, 150))
    constraints = dataclasses.replace(random_constraints(rng, profile), max_seconds=None)
    arguments = {"criterion": criterion, "progress": mode, "exploration": exploration, "slices": 20}
    schedule = solved(profile, budget, constraints=constraints, **arguments)
    if schedule is None:
        return
    spent, steps = Fraction(0), 0
    while True:
        stage = schedule.at(float(spent / Fraction(budget)))
        cost = profile.batch_size * Fraction(stage.cost)
        if spent + cost > Fraction(budget):
            break
        spent, steps = spent + cost, steps + 1
    assert steps >= 1
    assert abs(schedule.steps(profile.batch_size) - steps) <= 1  # a step that ends on the budget to the last digit
    assert schedule.samples(profile.batch_size) * min(s.cost for s in schedule.stages) <= budget * (1 + 1e-9)
    for stage in schedule.stages:
        cost = sum(w * profile.cost[profile.grid.strategies().index(s)] for s, w in stage.mixture)
        assert stage.cost == pytest.approx(cost)


@given(seed=seeds, criterion=criteria, budget=st.floats(1e4, 2e6), more=st.floats(1.0, 3.0))
@checked
def test_more_budget_reaches_at_least_as_far(
    seed: int, criterion: str, budget: float, more: float, random_profile
) -> None:
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, GRIDS[0], holes=0.1 * (seed % 2))
    constraints = dataclasses.replace(random_constraints(rng, profile), max_seconds=None)
    arguments = {"criterion": criterion, "constraints": constraints, "slices": 20, "exploration": 0.1 * (seed % 3)}
    less, greater = (worth_of(solved(profile, b, progress="trajectory", **arguments)) for b in (budget, more * budget))
    assert less <= greater * (1 + 1e-12) or less == greater


@given(seed=seeds, mode=modes, criterion=criteria)
@checked
def test_no_further_constraint_improves_the_objective(seed: int, mode: str, criterion: str, random_profile) -> None:
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, GRIDS[0])
    full = random_constraints(rng, profile)
    arguments = {"criterion": criterion, "progress": mode, "slices": 20}
    bound = solved(profile, 1e6, constraints=full, **arguments)
    for name in full.active():
        free = solved(profile, 1e6, constraints=full.without((name,)), **arguments)
        # with a limit of seconds a trajectory that is not exact may miss a little
        slack = 0 if free is None or free.predicted["exact"] else 1e-3
        assert worth_of(bound) <= worth_of(free) + slack + 1e-12


@given(seed=seeds, mode=modes, criterion=criteria, exploration=st.sampled_from([0.0, 0.3, 1.0]))
@checked
def test_the_reference_runs_alone_where_nothing_else_is_allowed(
    seed: int, mode: str, criterion: str, exploration: float, random_profile
) -> None:
    rng = np.random.default_rng(seed)
    profile = dataclasses.replace(random_profile(rng, GRIDS[seed % 2], holes=0.2), pilot=None)
    only = dataclasses.replace(
        random_constraints(rng, profile), allowed=(profile.grid.reference,), max_seconds=None, max_memory=None
    )
    schedule = optimize(profile, 7e5, criterion=criterion, progress=mode, constraints=only, exploration=exploration)
    assert {stage.mixture for stage in schedule.stages} == {((profile.grid.reference, 1.0),)}
    if mode == "trajectory":
        assert schedule.predicted["progress"] == pytest.approx(0.7, abs=1e-9)
        assert schedule.predicted["speed_up"] == pytest.approx(1.0)


@given(seed=seeds, criterion=criteria, exploration=st.sampled_from([0.0, 0.2]))
@checked
def test_the_stated_progress_is_that_of_predict(seed: int, criterion: str, exploration: float, random_profile) -> None:
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, GRIDS[seed % 2], holes=0.3 * (seed % 3 == 0))
    budget = float(rng.uniform(1e5, 2e6))
    arguments = {"criterion": criterion, "constraints": random_constraints(rng, profile), "exploration": exploration}
    schedule = solved(profile, budget, slices=20, progress="trajectory", **arguments)
    if schedule is None:
        return
    stated = [schedule.stages[0].progress[0], *(stage.progress[1] for stage in schedule.stages)]
    assert stated == pytest.approx(predict(profile, schedule, budget, criterion=criterion), rel=1e-9, abs=1e-9)
    assert stated[-1] == schedule.predicted["progress"]


def smooth_profile(seed: int, worth_profile) -> Profile:
    """Eight strategies whose worth falls with progress, the faster the cheaper they are, with waves."""
    rng = np.random.default_rng(seed)
    p, cheap = np.linspace(0, 1, 9)[:, None], np.linspace(0, 1, 8)
    waves = 0.2 * np.sin(2 * np.pi * (p * rng.uniform(0.5, 2, 8) + rng.random(8)))
    log_worth = (1 + rng.uniform(0, 1)) * cheap * (1 - rng.uniform(1.5, 3) * p) + waves
    return worth_profile(np.exp(log_worth), np.linspace(4, 0.5, 8))


@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_slices_are_fine_enough(seed: int, worth, worth_profile) -> None:
    profile = smooth_profile(seed, worth_profile)
    budget = 1000 * 0.2 * 1.2**seed / 2
    default, fine = (optimize(profile, budget, criterion=worth, slices=n).predicted["progress"] for n in (100, 1000))
    assert default <= fine * (1 + 1e-9)  # every 100th part is ten of the 1000
    assert default == pytest.approx(fine, rel=0.005)


def test_finer_slices_never_lose_and_converge(worth, worth_profile) -> None:
    profile = smooth_profile(3, worth_profile)
    reached = [
        optimize(profile, 800, criterion=worth, slices=n).predicted["progress"] for n in (1, 5, 10, 50, 100, 500, 2000)
    ]
    assert reached == sorted(reached)
    assert reached[-1] - reached[-2] < 0.1 * (reached[-2] - reached[2])


def test_the_schedule_of_the_smallest_budget_reaches_what_it_was_asked_for(worth, worth_profile) -> None:
    """The inverse of `optimize`: there and back again."""
    profile = smooth_profile(5, worth_profile)
    for budget in (150.0, 600.0, 1200.0):
        reached = optimize(profile, budget, criterion=worth).predicted["progress"]
        back = smallest_budget(profile, reached, criterion=worth)
        assert back.budget == pytest.approx(budget, rel=2e-4)
        assert back.predicted["progress"] >= reached

import itertools
import math

import numpy as np
import pytest

from schedulers import (
    Constraints,
    Grid,
    InfeasibleError,
    Moments,
    Profile,
    Schedule,
    Strategy,
    UsageError,
    optimize,
)

GRIDS = [
    (Grid({"mode": ("a", "b", "c")}, Strategy(mode="c")), [1.0, 2.5, 4.0]),
    (Grid({"layers": (12, 8, 4, 2)}, Strategy(layers=8)), [4.0, 3.0, 2.0, 1.0]),
    (
        Grid({"precision": ("fp8", "bf16"), "layers": (12, 6)}, Strategy(precision="bf16", layers=12)),
        [2.0, 1.0, 4.0, 3],
    ),
]
BUDGET = 1e6


class Rules:
    """Whether a path of strategy numbers keeps the constraints, told from their definition alone."""

    def __init__(self, profile: Profile, constraints: Constraints, loss: np.ndarray) -> None:
        self.names = profile.grid.strategies()
        self.slices = len(loss)
        self.constraints = constraints
        self.usable = np.isfinite(loss) & [
            constraints.allowed is None or name in constraints.allowed for name in self.names
        ]
        for k in range(self.slices):
            if k + 1 > self.slices - constraints.final_reference * self.slices + 1e-9:
                self.usable[k] &= [name == profile.grid.reference for name in self.names]
        self.may = [
            [self._may_follow(a, b, profile, constraints.monotone) for b in range(len(self.names))]
            for a in range(len(self.names))
        ]

    def _may_follow(self, a: int, b: int, profile: Profile, monotone: tuple[str, ...]) -> bool:
        for name in monotone:
            if name == "cost":
                if profile.cost[b] < profile.cost[a]:
                    return False
            else:
                values = profile.grid.axes[name]
                goal = values.index(profile.grid.reference[name])
                before, after = (abs(values.index(self.names[c][name]) - goal) for c in (a, b))
                if after > before:
                    return False
        return True

    def keeps(self, path: list[int]) -> bool:
        stages = [len(list(group)) for _, group in itertools.groupby(path)]
        limit = self.constraints.max_switches
        return (
            (limit is None or len(stages) - 1 <= limit)
            and min(stages) >= self.constraints.min_dwell * self.slices - 1e-9
            and all(self.may[a][b] for a, b in itertools.pairwise(path))
            and all(self.usable[k, c] for k, c in enumerate(path))
        )

    def path_of(self, schedule: Schedule) -> list[int]:
        return [self.names.index(schedule.at((k + 0.5) / self.slices).strategy) for k in range(self.slices)]


def brute(rules: Rules, loss: np.ndarray) -> float:
    """The smallest mean loss over every path, inf when none keeps the constraints."""
    slices, strategies = loss.shape
    paths = np.indices((strategies,) * slices).reshape(slices, -1).T
    means = loss[np.arange(slices), paths].mean(axis=1)
    for i in np.argsort(means):
        if np.isfinite(means[i]) and rules.keeps(paths[i].tolist()):
            return float(means[i])
    return math.inf


def every_combination(grid: Grid, rng: np.random.Generator, slices: int):
    names, axes = grid.strategies(), tuple(grid.axes)
    for subset, monotone, switches, dwell, final in itertools.product(
        (False, True), ((), axes, ("cost",), (*axes, "cost")), (None, 0, 1, 2, 3), (0, 1.5, 3), (0, 1, 2.5)
    ):
        picked = tuple(s for s in names if rng.random() < 0.7 or s == grid.reference) if subset else None
        yield Constraints(picked, monotone, switches, dwell / slices, final / slices)


@pytest.mark.parametrize(("grid", "cost"), GRIDS, ids=["one axis of texts", "reference inside", "two axes"])
@pytest.mark.parametrize("missing", [False, True])
def test_the_schedule_is_the_best_of_all(grid: Grid, cost: list[float], missing: bool, raw, raw_profile) -> None:
    # all 360 combinations of constraints for each grid, with and without missing cells
    rng = np.random.default_rng([len(grid), missing])
    solved = infeasible = 0
    for constraints in every_combination(grid, rng, slices := 7 if len(grid) == 3 else 5):
        loss = rng.normal(size=(slices, len(grid)))
        if missing:
            gaps = rng.random(loss.shape) < 0.3
            gaps[np.arange(slices), rng.integers(0, len(grid), slices)] = False
            loss[gaps] = np.nan
        profile = raw_profile(loss, grid, cost)
        rules = Rules(profile, constraints, loss)
        best = brute(rules, loss)
        if best == math.inf:
            infeasible += 1
            with pytest.raises(InfeasibleError, match="relax") as error:
                optimize(profile, BUDGET, criterion=raw, constraints=constraints, slices=slices)
            assert error.value.smallest is None
            continue
        solved += 1
        schedule = optimize(profile, BUDGET, criterion=raw, constraints=constraints, slices=slices)
        assert rules.keeps(rules.path_of(schedule))
        mean = sum((stage.end - stage.start) * stage.score for stage in schedule.stages)
        assert mean == pytest.approx(best, abs=1e-9)
    assert solved + infeasible == 360
    assert solved > 100
    assert infeasible > 50 or not missing


def test_a_further_constraint_never_improves_the_objective(raw, raw_profile) -> None:
    grid, cost = GRIDS[2]
    full = Constraints((grid.reference, grid.strategies()[0]), ("layers", "cost"), 2, 0.25, 0.25)
    for seed in range(10):
        profile = raw_profile(np.random.default_rng(seed).normal(size=(12, 4)), grid, cost)
        means = {}
        for size in range(len(full.active()) + 1):
            for dropped in itertools.combinations(full.active(), size):
                schedule = optimize(profile, BUDGET, criterion=raw, constraints=full.without(dropped), slices=12)
                means[frozenset(full.active()) - set(dropped)] = sum(
                    (stage.end - stage.start) * stage.score for stage in schedule.stages
                )
        assert all(means[a] <= means[b] + 1e-12 for a, b in itertools.product(means, means) if a < b)
        assert means[frozenset()] < means[frozenset(full.active())]


def crossing(**changes) -> Profile:
    """The cheap strategy descends better in the first half, the reference in the second."""
    grid = Grid({"patch": (16, 30)}, Strategy(patch=16))
    progress = np.array([0.0, 1.0])
    inner = np.array([[1.0, 1.25], [1.0, 0.79]])
    ones = np.ones((2, 2))
    moments = Moments(ones - 1, ones - 1, ones * [[1.0, 1.0]], inner, ones * 2)
    fields = {"covariance": None, "batch_size": 8, "beta": 32.0, "metric": "optimizer", "cost_model": "tokens"}
    return Profile(grid, progress, np.array([4.0, 1.0]), moments, **{**fields, "digest": "d1", **changes})


def test_the_switch_comes_where_the_criterion_crosses() -> None:
    # log inner is linear in p: (1 - p) log 1.25 + p log .79 falls to 0 at p = .486
    schedule = optimize(crossing(), BUDGET, slices=100)
    assert [(s.start, s.end, str(s.strategy)) for s in schedule.stages] == [
        (0.0, 0.49, "patch=30"),
        (0.49, 1.0, "patch=16"),
    ]


def test_the_schedule_tells_where_it_comes_from() -> None:
    constraints = Constraints(allowed=(Strategy(patch=30),), monotone=("patch",), max_switches=3)
    schedule = optimize(crossing(), 1e6, criterion="ca-mse", constraints=constraints, slices=20)
    assert (schedule.budget, schedule.batch_size, schedule.cost_model) == (1e6, 8, "tokens")
    assert (schedule.criterion, schedule.metric, schedule.cube_digest) == ("ca-mse", "optimizer", "d1")
    assert schedule.constraints == {
        "allowed": ["patch=30"],
        "monotone": ["patch"],
        "max_switches": 3,
        "min_dwell": 0.0,
        "final_reference": 0.0,
        "max_seconds": None,
        "max_memory": None,
        "slices": 20,
        "exploration": 0.0,
    }
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_lower_is_better_for_ca_mse_and_higher_for_descent() -> None:
    grid = Grid({"patch": (16, 30)}, Strategy(patch=16))
    ones = np.ones((1, 2))
    moments = Moments(ones * [[0, 0.3]], ones, ones, ones * [[1, 0.4]], ones)
    profile = Profile(grid, np.array([0.3]), np.array([4.0, 3.9]), moments, None, 8, 32.0, "euclidean", "tokens", "d")
    for criterion in ("ca-mse", "descent", "descent-batch"):
        (stage,) = optimize(profile, BUDGET, criterion=criterion).stages
        assert stage.strategy == Strategy(patch=16)


def test_stages_carry_mean_score_mean_error_and_cost() -> None:
    covariance = np.zeros((2, 2, 5, 5))
    covariance[..., 3, 3] = [[0.01, 0.01], [0.04, 0.04]]
    profile = crossing(covariance=covariance)
    schedule = optimize(profile, BUDGET, slices=10)
    score, se = profile.scores("descent", np.arange(10) / 10)
    first, last = schedule.stages
    assert (first.cost, last.cost) == (1.0, 4.0)
    assert first.score == pytest.approx(score[:5, 1].mean())
    assert last.score == pytest.approx(score[5:, 0].mean())
    assert first.score_se == pytest.approx(se[:5, 1].mean())
    assert last.score_se == pytest.approx(se[5:, 0].mean())


def test_without_a_covariance_there_is_no_standard_error() -> None:
    assert {stage.score_se for stage in optimize(crossing(), BUDGET).stages} == {None}


def test_the_reference_alone_allowed_is_the_reference(raw, raw_profile) -> None:
    profile = raw_profile(np.random.default_rng(0).normal(size=(10, 4)))
    only = Constraints(allowed=(profile.grid.reference,))
    (stage,) = optimize(profile, BUDGET, criterion=raw, constraints=only, slices=10).stages
    assert (stage.start, stage.end, stage.strategy) == (0.0, 1.0, profile.grid.reference)


def test_a_single_progress_point_gives_one_stage(raw, raw_profile) -> None:
    (stage,) = optimize(raw_profile([[3.0, 2.0, 1.0, 2.0]]), BUDGET, criterion=raw).stages
    assert stage.strategy == Strategy(patch=30, dropout=0)
    assert stage.score == 1.0


def test_a_strategy_that_was_never_measured_is_never_chosen_nor_explored(raw, raw_profile) -> None:
    loss = np.random.default_rng(0).normal(size=(10, 4))
    loss[:, 2] = np.nan
    schedule = optimize(raw_profile(loss), BUDGET, criterion=raw, slices=10, exploration=0.2)
    assert len(schedule.strategies) == 3
    assert Strategy(patch=30, dropout=0) not in schedule.strategies


def test_a_strategy_of_unknown_cost_is_never_chosen(raw, raw_profile) -> None:
    profile = raw_profile(np.tile([[3.0, 2.0, 1.0, 2.5]], (4, 1)), cost=[4, 3, np.nan, 1])
    (stage,) = optimize(profile, BUDGET, criterion=raw, slices=4).stages
    assert stage.strategy == Strategy(patch=16, dropout=0.5)


def test_a_profile_without_measurements_says_so(raw, raw_profile) -> None:
    with pytest.raises(UsageError, match=r"no raw .* the profiled progress 0, 0\.25, 0\.5, 0\.75 .* profile more"):
        optimize(raw_profile(np.full((4, 4), np.nan)), BUDGET, criterion=raw, slices=4)
    loss = np.zeros((4, 4))
    loss[2] = np.nan
    with pytest.raises(
        UsageError, match=r"any strategy at the profiled progress 0.5 \(metric euclidean, costs tokens\)"
    ):
        optimize(raw_profile(loss), BUDGET, criterion=raw, slices=4)


@pytest.mark.parametrize(
    ("constraints", "smallest", "strategy"),
    [
        (Constraints(), 8 * 1.0, "patch=30,dropout=0.5"),
        (Constraints(allowed=(Strategy(patch=16, dropout=0.5), Strategy(patch=16, dropout=0))), 8 * 3.0, "dropout=0.5"),
        (Constraints(final_reference=0.1), 8 * 4.0, "patch=16,dropout=0"),
    ],
)
def test_a_budget_below_one_step_is_refused_with_the_smallest(
    constraints, smallest, strategy, raw, raw_profile
) -> None:
    profile = raw_profile(np.zeros((10, 4)))
    with pytest.raises(
        InfeasibleError, match=f"does not pay for one step of .*{strategy}.* smallest feasible"
    ) as error:
        optimize(profile, smallest * 0.999, criterion=raw, constraints=constraints, slices=10)
    assert (error.value.smallest, error.value.exit_code) == (smallest, 3)
    assert optimize(profile, smallest, criterion=raw, constraints=constraints, slices=10).budget == smallest


def test_an_unmeasured_strategy_does_not_lower_the_smallest_budget(raw, raw_profile) -> None:
    loss = np.zeros((10, 4))
    loss[:, 3] = np.nan
    with pytest.raises(InfeasibleError) as error:
        optimize(raw_profile(loss), 1.0, criterion=raw, slices=10)
    assert error.value.smallest == 8 * 2.0


REFERENCE, CHEAPEST = Strategy(patch=16, dropout=0), Strategy(patch=30, dropout=0.5)


@pytest.mark.parametrize(
    ("constraints", "relax"),
    [
        (Constraints(monotone=("patch",), max_switches=3), "monotone=patch"),
        (Constraints(monotone=("cost",), min_dwell=0.1), "monotone=cost"),
        (Constraints(monotone=("patch", "dropout")), "monotone=patch and monotone=dropout"),
        (Constraints(monotone=("patch",), max_switches=0), "monotone=patch and max_switches"),
        (Constraints(min_dwell=0.6, allowed=(REFERENCE, CHEAPEST)), "min_dwell to 0.5"),
        (Constraints(min_dwell=0.6, max_switches=0), "max_switches and min_dwell"),
        (Constraints(final_reference=0.1), "final_reference to 0"),
        (Constraints(allowed=(CHEAPEST,)), "allowed by patch=16,dropout=0"),
        (Constraints(max_switches=0), "max_switches to 1"),
        (Constraints(max_switches=0, min_dwell=0.5, monotone=("dropout",)), "monotone=dropout and max_switches"),
    ],
)
def test_the_constraints_to_relax_are_named(constraints: Constraints, relax: str, raw, raw_profile) -> None:
    # only the reference was measured in the first half, only the cheapest strategy in the second
    loss = np.full((10, 4), np.nan)
    loss[:5, 0] = loss[5:, 3] = 0.0
    with pytest.raises(InfeasibleError, match=f"relax {relax}$"):
        optimize(raw_profile(loss), BUDGET, criterion=raw, constraints=constraints, slices=10)


def test_either_of_two_constraints_may_be_relaxed(raw, raw_profile) -> None:
    constraints = Constraints(allowed=(CHEAPEST,), final_reference=0.1, max_switches=5)
    with pytest.raises(InfeasibleError, match=r"relax allowed by patch=16,dropout=0 or final_reference to 0$"):
        optimize(raw_profile(np.zeros((10, 4))), BUDGET, criterion=raw, constraints=constraints, slices=10)


def test_exploration_spreads_over_the_allowed_and_leaves_the_last_fraction_pure(raw, raw_profile) -> None:
    loss = np.tile([[0.0, 1.0, 2.0, 3.0]], (10, 1))
    loss[:4] = [2.0, 1.0, 2.0, 0.0]
    allowed = (REFERENCE, Strategy(patch=16, dropout=0.5), CHEAPEST)
    constraints = Constraints(allowed=allowed, final_reference=0.2)
    profile = raw_profile(loss)
    schedule = optimize(profile, BUDGET, criterion=raw, constraints=constraints, slices=10, exploration=0.3)
    assert [(s.start, s.end, s.strategy, s.pure) for s in schedule.stages] == [
        (0.0, 0.4, CHEAPEST, False),
        (0.4, 0.8, REFERENCE, False),
        (0.8, 1.0, REFERENCE, True),
    ]
    assert dict(schedule.stages[0].mixture) == pytest.approx({allowed[0]: 0.1, allowed[1]: 0.1, CHEAPEST: 0.8})
    assert schedule.stages[0].cost == pytest.approx(0.1 * 4 + 0.1 * 3 + 0.8 * 1)
    assert schedule.stages[2].cost == 4.0
    # scores by shares of the budget: weights .1, .1, .8 times costs 4, 3, 1, and then .8, .1, .1
    early, late = (0.4 * 2.0 + 0.3 * 1.0 + 0.8 * 0.0) / 1.5, (3.2 * 0.0 + 0.3 * 1.0 + 0.1 * 3.0) / 3.6
    assert [s.score for s in schedule.stages] == pytest.approx([early, late, 0.0])
    assert schedule.constraints["exploration"] == 0.3


def test_full_exploration_is_a_uniform_mixture(raw, raw_profile) -> None:
    (stage,) = optimize(raw_profile(np.zeros((5, 4))), BUDGET, criterion=raw, slices=5, exploration=1.0).stages
    assert [weight for _, weight in stage.mixture] == pytest.approx([0.25] * 4)


def test_fractions_are_turned_into_slices_exactly(raw, raw_profile) -> None:
    assert math.ceil(0.07 * 100) == 8  # what doubles make of it
    loss = np.tile([[0.0, 9.0, 9.0, 9.0]], (100, 1))
    loss[20:27] = [1.0, 9.0, 9.0, 0.0]
    dwell = optimize(raw_profile(loss), BUDGET, criterion=raw, constraints=Constraints(min_dwell=0.07))
    assert [(s.start, s.end) for s in dwell.stages] == [(0.0, 0.2), (0.2, 0.27), (0.27, 1.0)]
    assert math.ceil(100 * (1 - 0.57)) == 44
    loss = np.tile([[1.0, 9.0, 9.0, 0.0]], (100, 1))
    final = optimize(raw_profile(loss), BUDGET, criterion=raw, constraints=Constraints(final_reference=0.57))
    assert [(s.start, s.end) for s in final.stages] == [(0.0, 0.43), (0.43, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": math.nan}, "budget=nan"),
        ({"slices": 0}, "slices=0"),
        ({"exploration": 1.5}, "exploration=1.5"),
        ({"criterion": "mse"}, "unknown criterion 'mse'"),
        ({"constraints": Constraints(monotone=("size",))}, "monotone='size' is neither cost nor one of the axes patch"),
        ({"constraints": Constraints(allowed=(Strategy(patch=5),))}, "patch=5 is not on the grid"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        optimize(crossing(), **{"budget": BUDGET, **arguments})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"allowed": ()}, "allowed is empty"),
        ({"monotone": "patch"}, r"must be a tuple of names, as in \('patch',\)"),
        ({"max_switches": -1}, "max_switches=-1"),
        ({"min_dwell": 1.1}, "min_dwell=1.1"),
        ({"final_reference": -0.1}, "final_reference=-0.1"),
    ],
)
def test_constraints_out_of_range_are_refused(arguments: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Constraints(**arguments)

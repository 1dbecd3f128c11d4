"""Schedules of both modes against all paths there are, an integer program, and profiles with holes.

What a path is worth and whether it keeps the constraints is told here from the definitions: scores from the design's
formulas, mixtures by shares of the budget, the motion by `Speeds.advance` (which test_trajectory.py proves).
"""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from schedulers import (
    Constraints,
    Grid,
    InfeasibleError,
    Moments,
    Profile,
    Schedule,
    Stage,
    Strategy,
    UsageError,
    optimize,
    predict,
    smallest_budget,
)
from schedulers.trajectory import Speeds

GRIDS = [
    Grid({"mode": ("a", "b")}, Strategy(mode="b")),
    Grid({"layers": (12, 8, 4)}, Strategy(layers=8)),
    Grid({"precision": ("fp8", "bf16"), "layers": (12, 6)}, Strategy(precision="bf16", layers=12)),
]
PILOT_BUDGET = 1e6


def score_at_points(profile: Profile, criterion: str) -> np.ndarray:
    """(T, C), from the formulas of the design."""
    m, share = profile.moments, profile.cost / profile.beta
    with np.errstate(divide="ignore", invalid="ignore"):
        if criterion == "ca-mse":
            return (np.maximum(m.bias_sq, 0) + share * m.variance) / m.norm_sq_ref
        spread = np.maximum(m.norm_sq, 0) + share * m.variance
        return np.sign(m.inner) * m.inner**2 / (spread * m.norm_sq_ref)


def between(progress: np.ndarray, values: np.ndarray, p: float) -> np.ndarray:
    """Values (T, C) at p: linear in the logarithm between two positive ones, else linear; constant beyond the ends."""
    p = min(max(p, progress[0]), progress[-1])
    t = int(np.flatnonzero(progress <= p)[-1])
    if progress[t] == p:
        return values[t]
    share = (p - progress[t]) / (progress[t + 1] - progress[t])
    return np.array(
        [
            a ** (1 - share) * b**share if a > 0 and b > 0 else (1 - share) * a + share * b
            for a, b in zip(values[t], values[t + 1], strict=True)
        ]
    )


def weighted(share: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means (..., A) of values (..., C) by shares (A, C); NaN where one that has a share is."""
    return np.stack([(values[..., s > 0] * s[s > 0]).sum(axis=-1) for s in share], axis=-1)


class Oracle:
    """All paths of `slices` slices: which keep the constraints, and what each is worth with a budget."""

    def __init__(
        self,
        profile: Profile,
        criterion: str,
        mode: str,
        slices: int,
        constraints: Constraints,
        exploration: float,
    ) -> None:
        self.profile, self.criterion, self.mode = profile, criterion, mode
        self.slices, self.constraints = slices, constraints
        self.names = profile.grid.strategies()
        self.reference = self.names.index(profile.grid.reference)
        self.paths = np.indices((len(self.names),) * slices).reshape(slices, -1).T
        self.final = math.floor(slices * (1 - Fraction(str(constraints.final_reference))))
        allowed = self._allowed()
        score = score_at_points(profile, criterion)
        progress, found = (profile.progress, score) if mode == "fraction" else self._speeds(score)
        self.explored = allowed & np.isfinite(found).all(axis=0)
        self.pure = np.eye(len(self.names))
        self.mixture = self.pure
        if exploration and self.explored.any():
            self.mixture = (1 - exploration) * self.pure + exploration * self.explored / self.explored.sum()
        spent = np.where(self.mixture > 0, self.mixture * np.nan_to_num(profile.cost, nan=1.0), 0.0)
        self.share = spent / spent.sum(axis=1, keepdims=True)
        usable = np.tile(allowed, (slices, 1))
        if mode == "fraction":
            at = np.array([between(progress, score, k / slices) for k in range(slices)])
            early = np.arange(slices)[:, None] < self.final
            self.score = np.where(early, weighted(self.share, at), at)
            usable &= np.isfinite(at) & np.isfinite(self.score)
        else:
            usable &= np.isfinite(found).any(axis=0)
            self.motion = Speeds(progress, np.hstack([weighted(self.share, found), found]), PILOT_BUDGET)
        usable[self.final :] &= np.arange(len(self.names)) == self.reference
        self.kept = self._keeps(usable)

    def _allowed(self) -> np.ndarray:
        profile, constraints = self.profile, self.constraints
        allowed = np.isfinite(profile.cost)
        if constraints.allowed is not None:
            allowed &= [name in constraints.allowed for name in self.names]
        if constraints.max_memory is not None:
            allowed &= np.array([m <= constraints.max_memory for m in profile.memory])
        if constraints.max_seconds is not None:
            allowed &= np.isfinite(profile.seconds)
        return allowed

    def _speeds(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        profile, gain = self.profile, score.copy()
        if self.criterion == "ca-mse":  # all variances here are positive, so all scores are
            gain = 1 / score
        weights = np.eye(len(self.names))[self.reference]
        if profile.pilot is not None:
            weights = np.array([weight for _, weight in profile.pilot[0].mixture])
        spent = np.where(np.isfinite(profile.cost), weights * profile.cost, 0.0)
        pilot = []
        for row in gain:
            here = np.isfinite(row) & (spent > 0)
            pilot.append((row[here] @ spent[here]) / spent[here].sum() if here.any() else np.nan)
        there = np.array(pilot) > 0
        return profile.progress[there], gain[there] / np.array(pilot)[there, None]

    def _keeps(self, usable: np.ndarray) -> np.ndarray:
        constraints, paths = self.constraints, self.paths
        kept = usable[np.arange(self.slices), paths].all(axis=1)
        changes = paths[:, 1:] != paths[:, :-1]
        if constraints.max_switches is not None:
            kept &= changes.sum(axis=1) <= constraints.max_switches
        may = np.array([[self._may_follow(a, b) for b in range(len(self.names))] for a in range(len(self.names))])
        kept &= may[paths[:, :-1], paths[:, 1:]].all(axis=1)
        for i in np.flatnonzero(kept) if constraints.min_dwell else []:
            runs = [len(list(group)) for _, group in itertools.groupby(paths[i])]
            kept[i] = min(runs) >= constraints.min_dwell * self.slices - 1e-9
        return kept

    def _may_follow(self, a: int, b: int) -> bool:
        for name in self.constraints.monotone:
            if name == "cost":
                if self.profile.cost[b] < self.profile.cost[a]:
                    return False
                continue
            values = self.profile.grid.axes[name]
            goal = values.index(self.profile.grid.reference[name])
            before, after = (abs(values.index(self.names[c][name]) - goal) for c in (a, b))
            if after > before:
                return False
        return True

    def seconds(self, budget: float) -> np.ndarray:
        """(paths,) seconds: of every slice the steps that its share of the budget pays for, times those of a step."""
        step = np.where(np.isfinite(self.profile.seconds), self.profile.seconds, np.nan)
        per_unit = [
            [(w[w > 0] @ step[w > 0]) / (w[w > 0] @ self.profile.cost[w > 0]) for w in weights]
            for weights in (self.mixture, self.pure)
        ]
        late = (np.arange(self.slices) >= self.final).astype(int)
        return np.array(per_unit)[late, self.paths].sum(axis=1) * budget / self.slices

    def values(self, budget: float) -> np.ndarray:
        """(paths,) the progress reached, or the mean score; larger is better."""
        if self.mode == "fraction":
            return self.sign * self.score[np.arange(self.slices), self.paths].mean(axis=1)
        strategies = len(self.names)
        positions = np.zeros(1)
        for k in range(self.slices):
            c = np.tile(np.arange(strategies), positions.size)
            late = strategies * (k >= self.final)
            positions = self.motion.advance(np.repeat(positions, strategies), budget / self.slices, c + late)
        return positions

    @property
    def sign(self) -> float:
        return -1.0 if self.criterion == "ca-mse" and self.mode == "fraction" else 1.0

    def best(self, budget: float) -> float:
        """What the best path is worth that keeps everything; -inf where none does."""
        kept = self.kept
        if self.constraints.max_seconds is not None:
            kept = kept & (self.seconds(budget) <= self.constraints.max_seconds * (1 + 1e-9))
        return float(self.values(budget)[kept].max()) if kept.any() else -math.inf

    def row(self, schedule: Schedule) -> int:
        """Which of the paths a schedule's main strategies are."""
        path = [self.names.index(schedule.at((k + 0.5) / self.slices).strategy) for k in range(self.slices)]
        return int(np.ravel_multi_index(path, (len(self.names),) * self.slices))


def random_constraints(rng: np.random.Generator, profile: Profile, slices: int) -> Constraints:
    """Any of them, each with a chance of about a third."""
    names, axes = profile.grid.strategies(), tuple(profile.grid.axes)
    monotones = [(), (), (), axes, ("cost",), (*axes, "cost")]
    picked = tuple(name for name in names if rng.random() < 0.6) or (names[0],)
    return Constraints(
        allowed=picked if rng.random() < 0.35 else None,
        monotone=monotones[rng.integers(len(monotones))],
        max_switches=int(rng.integers(0, 4)) if rng.random() < 0.5 else None,
        min_dwell=float(rng.choice([0, 0, 1.5, 2, 3])) / slices,
        final_reference=float(rng.choice([0, 0, 0.5, 1, 2])) / slices,
        max_memory=float(rng.uniform(1e8, 1e9)) if rng.random() < 0.3 else None,
    )


def with_seconds(rng: np.random.Generator, oracle: Oracle, budget: float) -> Constraints:
    """The oracle's constraints with a limit of seconds that rules some of its paths out, or all."""
    seconds = oracle.seconds(budget)[oracle.kept]
    seconds = seconds[np.isfinite(seconds)]
    if not seconds.size:
        return dataclasses.replace(oracle.constraints, max_seconds=float(rng.uniform(100, 5000)))
    low, high = float(seconds.min()), float(seconds.max())
    return dataclasses.replace(
        oracle.constraints, max_seconds=max(low + (high - low) * float(rng.uniform(-0.1, 1)), 1.0)
    )


@pytest.mark.parametrize("exploration", [0.0, 0.3])
@pytest.mark.parametrize("criterion", ["descent", "ca-mse"])
@pytest.mark.parametrize("mode", ["fraction", "trajectory"])
def test_the_schedule_is_the_best_of_all_paths(mode: str, criterion: str, exploration: float, random_profile) -> None:
    rng = np.random.default_rng([mode == "fraction", criterion == "descent", exploration > 0])
    solved, limited, refused = 0, 0, 0
    for trial in range(48):
        grid = GRIDS[trial % 3]
        slices = int(rng.integers(4, 8 if len(grid) < 4 else 6))
        profile, budget = random_profile(rng, grid, holes=0.15 * (trial % 2)), float(rng.uniform(0.1, 2) * PILOT_BUDGET)
        oracle = Oracle(profile, criterion, mode, slices, random_constraints(rng, profile, slices), exploration)
        if rng.random() < 0.5:
            constraints = with_seconds(rng, oracle, budget)
            oracle = Oracle(profile, criterion, mode, slices, constraints, exploration)
        arguments = {"criterion": criterion, "slices": slices, "exploration": exploration, "progress": mode}
        if exploration and not oracle.explored.any():
            with pytest.raises(UsageError, match="nothing to explore"):
                optimize(profile, budget, constraints=oracle.constraints, **arguments)
            continue
        best = oracle.best(budget)
        if best == -math.inf:
            refused += 1
            with pytest.raises(InfeasibleError) as error:
                optimize(profile, budget, constraints=oracle.constraints, **arguments)
            assert error.value.smallest is None
            check_relaxations(error.value, profile, budget, oracle.constraints, arguments)
            continue
        solved += 1
        limited += oracle.constraints.max_seconds is not None
        schedule = optimize(profile, budget, constraints=oracle.constraints, **arguments)
        row = oracle.row(schedule)
        assert oracle.kept[row]
        assert oracle.values(budget)[row] == pytest.approx(best, rel=1e-9, abs=1e-12)
        told = schedule.predicted["progress" if mode == "trajectory" else "score"]
        assert told == pytest.approx(oracle.sign * best, rel=1e-9, abs=1e-12)
        assert schedule.predicted["exact"]
        seconds = oracle.seconds(budget)[row]
        assert schedule.predicted.get("seconds", math.nan) == pytest.approx(seconds, nan_ok=True)
        if oracle.constraints.max_seconds is not None:
            assert seconds <= oracle.constraints.max_seconds * (1 + 1e-8)
    assert solved > 12
    assert limited > 2
    assert refused > 3


@pytest.mark.parametrize("mode", ["fraction", "trajectory"])
def test_the_smallest_feasible_budget_pays_for_a_step_of_all_that_is_needed(mode: str, random_profile) -> None:
    rng = np.random.default_rng(mode == "fraction")
    refused = 0
    for trial in range(40):
        grid, exploration, slices = GRIDS[trial % 3], 0.3 * (trial % 2), int(rng.integers(3, 6))
        profile, budget = random_profile(rng, grid, holes=0.1 * (trial % 4 == 0)), float(rng.uniform(3, 40))
        constraints = random_constraints(rng, profile, slices)
        oracle = Oracle(profile, "descent", mode, slices, constraints, exploration)
        if not oracle.kept.any() or (exploration and not oracle.explored.any()):
            continue
        dearest = [np.where(weights > 0, np.nan_to_num(profile.cost), 0) for weights in (oracle.mixture, oracle.pure)]
        late = (np.arange(slices) >= oracle.final).astype(int)
        needed = 8 * np.array(dearest).max(axis=2)[late, oracle.paths].max(axis=1)
        oracle.kept &= needed <= budget
        arguments = {"slices": slices, "exploration": exploration, "progress": mode, "constraints": constraints}
        if oracle.kept.any():
            schedule = optimize(profile, budget, **arguments)
            assert oracle.values(budget)[oracle.row(schedule)] == pytest.approx(oracle.best(budget), rel=1e-9)
            continue
        with pytest.raises(InfeasibleError, match="smallest feasible budget") as error:
            optimize(profile, budget, **arguments)
        smallest = Oracle(profile, "descent", mode, slices, constraints, exploration)
        assert error.value.smallest == pytest.approx(needed[smallest.kept].min())
        assert optimize(profile, error.value.smallest, **arguments).budget == error.value.smallest
        refused += 1
    assert refused > 8


def suggestions(error: InfeasibleError) -> list[str]:
    texts = str(error).rsplit("; relax ", 1)[1].split(" or ")
    assert [str(change) for change in error.changes] == [text for text in texts if " and " not in text]
    return texts


def applied(constraints: Constraints, text: str) -> Constraints:
    """The constraints after what a suggestion of an error message asks for."""
    for part in text.split(" and "):
        name, _, value = part.partition(" to ")
        if value:
            number = float(value.split(" (")[0].replace(",", ""))
            constraints = dataclasses.replace(constraints, **{name: int(number) if name == "max_switches" else number})
        elif part.startswith("allowed by "):
            more = Strategy.parse(part.removeprefix("allowed by "))
            constraints = dataclasses.replace(constraints, allowed=(*constraints.allowed, more))
        else:
            assert part in constraints.active()
            constraints = constraints.without((part,))
    return constraints


def check_relaxations(
    error: InfeasibleError, profile: Profile, budget: float, constraints: Constraints, arguments: dict
) -> None:
    """Every suggestion helps, and of those with a number none smaller does."""

    def feasible(changed: Constraints, budget: float = budget) -> bool:
        try:
            optimize(profile, budget, constraints=changed, **arguments)
        except InfeasibleError:
            return False
        return True

    for text in suggestions(error):
        changed = applied(constraints, text)
        assert feasible(changed), text
        name = text.split(" ")[0] if " to " in text or " by " in text else ""
        slices = arguments["slices"]
        if name == "max_switches":
            assert not feasible(dataclasses.replace(constraints, max_switches=changed.max_switches - 1))
        elif name in ("min_dwell", "final_reference"):
            more = (math.ceil(getattr(changed, name) * slices - 0.01) + 1) / slices
            if more <= 1:
                assert not feasible(dataclasses.replace(constraints, **{name: more}))
        elif name == "max_seconds":
            assert not feasible(dataclasses.replace(constraints, max_seconds=changed.max_seconds * (1 - 2e-5)))
            lower = float(text.split("budget to ")[1].rstrip(")").replace(",", ""))
            assert feasible(constraints, lower)
            assert not feasible(constraints, lower * (1 + 2e-5))
        elif name == "max_memory":
            assert changed.max_memory - 1 < profile.memory[profile.memory <= changed.max_memory].max()
            less = profile.memory[profile.memory < changed.max_memory - 1]
            if less.size and less.max() > constraints.max_memory:
                assert not feasible(dataclasses.replace(constraints, max_memory=less.max()))
        elif name == "allowed":
            cost = profile.cost[profile.grid.strategies().index(changed.allowed[-1])]
            for cheaper in np.flatnonzero(profile.cost < cost):
                more = (*constraints.allowed, profile.grid.strategies()[cheaper])
                assert not feasible(dataclasses.replace(constraints, allowed=more))


def needed_budgets(oracle: Oracle, target: float) -> np.ndarray:
    """(paths,) the budget with which each kept path reaches the target, by bisection of each; inf where none does."""
    paths, strategies = oracle.paths[oracle.kept], len(oracle.names)
    rows, doubled = np.arange(len(paths)), oracle.motion.speed.shape[1]

    def reach(budgets: np.ndarray) -> np.ndarray:
        # a path's budget scales its speeds, so that all paths can be moved by one call
        speed = (oracle.motion.speed[:, None, :] * budgets[:, None]).reshape(len(oracle.motion.progress), -1)
        motion, p = Speeds(oracle.motion.progress, speed, PILOT_BUDGET), np.zeros(len(paths))
        for k in range(oracle.slices):
            c = paths[:, k] + strategies * (k >= oracle.final)
            p = motion.advance(p, 1 / oracle.slices, rows * doubled + c)
        return p

    low, high = np.full(len(paths), 1e-6), np.full(len(paths), 64 * PILOT_BUDGET)
    never = reach(high) < target
    for _ in range(60):
        middle = np.sqrt(low * high)
        enough = reach(middle) >= target
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    found = np.full(len(oracle.paths), math.inf)
    found[oracle.kept] = np.where(never, math.inf, high)
    return found


@pytest.mark.parametrize("criterion", ["descent", "ca-mse"])
def test_the_smallest_budget_is_the_least_that_any_path_needs(criterion: str, random_profile) -> None:
    rng = np.random.default_rng([5, criterion == "descent"])
    solved = 0
    for trial in range(16):
        grid, exploration = GRIDS[trial % 2], 0.3 * (trial % 3 == 0)
        profile, slices = random_profile(rng, grid, holes=0.1 * (trial % 4 == 0)), int(rng.integers(3, 6))
        oracle = Oracle(profile, criterion, "trajectory", slices, random_constraints(rng, profile, slices), exploration)
        target = float(rng.uniform(0.2, 1.4))
        needed = needed_budgets(oracle, target)
        if not np.isfinite(needed).any():
            continue
        arguments = {"criterion": criterion, "slices": slices, "exploration": exploration}
        schedule = smallest_budget(profile, target, constraints=oracle.constraints, **arguments)
        assert schedule.budget == pytest.approx(needed.min(), rel=2e-4)
        assert schedule.predicted["progress"] >= target
        assert schedule == optimize(profile, schedule.budget, constraints=oracle.constraints, **arguments)
        assert oracle.kept[oracle.row(schedule)]
        solved += 1
    assert solved > 6


@pytest.mark.parametrize("criterion", ["descent", "ca-mse"])
def test_the_smallest_budget_keeps_the_limit_of_seconds(criterion: str, random_profile) -> None:
    rng = np.random.default_rng([6, criterion == "descent"])
    limited = 0
    for trial in range(16):
        profile = random_profile(rng, GRIDS[1])
        free = Oracle(profile, criterion, "trajectory", 4, Constraints(), 0.0)
        target = float(rng.uniform(0.4, 1.2))
        needed = needed_budgets(free, target)
        spent = free.seconds(1.0) * needed
        limit = float(np.nanmin(spent) * (1.02 if trial % 2 else 1.2))
        if not spent[needed.argmin()] > limit:
            continue
        constraints = Constraints(max_seconds=limit)
        found = smallest_budget(profile, target, criterion=criterion, slices=4, constraints=constraints)
        assert found.predicted["progress"] >= target
        assert found.predicted["seconds"] <= limit * (1 + 1e-8)
        # no less than any path needs, and at most a step more than one that stays feasible for the length of a step
        assert found.budget >= needed[spent <= limit * (1 + 1e-9)].min() * (1 - 1e-9)
        assert found.budget <= needed[spent * 1.0101 <= limit].min() * 1.0101
        limited += 1
    assert limited > 2


def test_no_schedule_reaches_the_target_within_too_few_seconds(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 2.0]], seconds=[0.1, 0.3])
    assert smallest_budget(profile, 1.0, criterion=worth, slices=10).predicted["seconds"] == pytest.approx(
        150, rel=2e-4
    )
    within = smallest_budget(profile, 1.0, criterion=worth, slices=10, constraints=Constraints(max_seconds=101.0))
    assert within.budget == pytest.approx(1000, rel=0.01)
    with pytest.raises(InfeasibleError, match=r"progress 1 within max_seconds=99"):
        smallest_budget(profile, 1.0, criterion=worth, slices=10, constraints=Constraints(max_seconds=99.0))


def test_no_budget_reaches_what_lies_beyond_the_last_progress(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 2.0], [1.0, -1.0]])
    only = Constraints(allowed=(Strategy(mode=1),))
    with pytest.raises(InfeasibleError, match=r"no budget reaches progress 0.9: .* stop making progress at 0.667"):
        smallest_budget(profile, 0.9, criterion=worth, constraints=only)
    assert smallest_budget(profile, 0.6, criterion=worth, constraints=only).predicted["progress"] >= 0.6


def test_a_target_that_one_step_reaches_costs_one_step(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 3.0]], cost=[4, 2])
    schedule = smallest_budget(profile, 1e-6, criterion=worth)
    assert schedule.budget == 8 * 2  # a step of the cheapest strategy
    assert schedule.predicted["progress"] == pytest.approx(3 * 16 / 1000)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_that_is_no_progress_is_refused(target: float, worth, worth_profile) -> None:
    with pytest.raises(UsageError, match="target="):
        smallest_budget(worth_profile([[1.0, 2.0]]), target, criterion=worth)


class IntegerProgram:
    """The largest sum of scores (N, C) of a path of strategies in the order of their costs, for HiGHS.

    x[k, c] says that slice k runs c, y[k, c] that a stage of c begins there, and z[k, c] that slice k runs c or
    what costs more, which never ends. Strategies cost more the later they come.
    """

    def __init__(self, score: np.ndarray, switches: int, dwell: int) -> None:
        self.score, (slices, strategies) = score, score.shape
        x, y, z = np.arange(3 * score.size).reshape(3, slices, strategies)
        self.x, self.variables, self.rows, self.low, self.high = x, 3 * score.size, [], [], []
        for k, c in itertools.product(range(slices), range(strategies)):
            dearer = [z[k, c + 1]] if c + 1 < strategies else []
            self.add([x[k, c], z[k, c], *dearer], [1, -1, 1][: 2 + len(dearer)], 0, 0)
            before = [x[k - 1, c]] if k else []
            self.add([y[k, c], x[k, c], *before], [1, -1, 1][: 2 + len(before)], 0, np.inf)
            begun = y[max(0, k - dwell + 1) : k + 1, c]
            self.add([*begun, x[k, c]], [*np.ones(len(begun)), -1], -np.inf, 0)
            if k:
                self.add([z[k, c], z[k - 1, c]], [1, -1], 0, np.inf)
        self.add(z[:, 0], np.ones(slices), slices, slices)
        self.add(y.ravel(), np.ones(y.size), 0, switches + 1)
        late = y[slices - dwell + 1 :].ravel()
        self.add(late, np.ones(late.size), 0, 0)

    def add(self, variables, factors, least: float, most: float) -> None:
        self.rows.append((np.asarray(variables), np.asarray(factors, dtype=float)))
        self.low.append(least)
        self.high.append(most)

    def best(self) -> float:
        row = np.repeat(np.arange(len(self.rows)), [len(v) for v, _ in self.rows])
        column, factor = (np.concatenate(part) for part in zip(*self.rows, strict=True))
        matrix = coo_array((factor, (row, column)), shape=(len(self.rows), self.variables)).tocsr()
        result = milp(
            np.concatenate([-self.score.ravel(), np.zeros(2 * self.score.size)]),
            constraints=LinearConstraint(matrix, self.low, self.high),
            integrality=np.ones(self.variables),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        assert result.status == 0
        return -float(result.fun)


def wide_profile(rng: np.random.Generator, slices: int, strategies: int, raw_profile, **changes) -> Profile:
    """Losses that drift from cheap to dear strategies, with noise."""
    at, place = np.arange(slices)[:, None] / slices, np.arange(strategies) / strategies
    loss = (at - place) ** 2 + 0.1 * rng.normal(size=(slices, strategies))
    grid = Grid({"mode": tuple(range(strategies))}, Strategy(mode=strategies - 1))
    return raw_profile(loss, grid, np.linspace(0.2, 4, strategies), **changes)


def test_a_hundred_slices_of_thirty_strategies_are_those_of_an_integer_program(raw, raw_profile) -> None:
    profile = wide_profile(np.random.default_rng(3), 100, 30, raw_profile)
    constraints = Constraints(monotone=("cost",), max_switches=12, min_dwell=0.03)
    schedule = optimize(profile, 1e6, criterion=raw, constraints=constraints)
    program = IntegerProgram(-profile.moments.bias_sq, 12, 3)
    assert len(schedule.stages) == 13
    assert -100 * schedule.predicted["score"] == pytest.approx(program.best(), rel=1e-7)


def test_the_limit_of_seconds_is_that_of_an_integer_program(raw, raw_profile) -> None:
    rng = np.random.default_rng(4)
    seconds = np.linspace(0.2, 4, 12) * rng.uniform(0.5, 2, 12)
    profile = wide_profile(rng, 40, 12, raw_profile, seconds=seconds)
    free = optimize(profile, 1e6, criterion=raw, slices=40)
    limit = 0.9 * free.predicted["seconds"]
    constraints = Constraints(monotone=("cost",), max_switches=4, min_dwell=0.05, max_seconds=limit)
    schedule = optimize(profile, 1e6, criterion=raw, constraints=constraints, slices=40)
    program = IntegerProgram(-profile.moments.bias_sq, 4, 2)
    per_slice = np.tile(seconds / profile.cost * 1e6 / 40, 40)
    program.add(program.x.ravel(), per_slice / limit, 0, 1)
    assert schedule.predicted["seconds"] <= limit * (1 + 1e-8)
    assert schedule.predicted["exact"]
    assert -40 * schedule.predicted["score"] == pytest.approx(program.best(), rel=1e-7)
    assert schedule.predicted["score"] > free.predicted["score"]


MODES = ("fraction", "trajectory")


def check_sound(schedule: Schedule) -> None:
    """No number of the schedule is NaN (JSON refuses it), and the file reads back as it was."""
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert all(stage.score is None or math.isfinite(stage.score) for stage in schedule.stages)


def stages_of(schedule: Schedule) -> list[tuple[float, float, int]]:
    return [(stage.start, stage.end, int(stage.strategy["mode"])) for stage in schedule.stages]


def test_by_fraction_a_strategy_cannot_run_next_to_a_point_where_it_is_missing(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 5.0], [1.0, math.nan], [1.0, 5.0], [1.0, 5.0]], progress=np.array([0, 0.2, 0.6, 1]))
    schedule = optimize(profile, 1000, criterion=worth, slices=10, progress="fraction")
    # the first slice stands on a point at which it is known, the one at .6 on the next
    assert stages_of(schedule) == [(0.0, 0.1, 1), (0.1, 0.6, 0), (0.6, 1.0, 1)]
    check_sound(schedule)


def test_by_trajectory_a_strategy_stands_still_next_to_a_point_where_it_is_missing(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 5.0], [1.0, math.nan], [1.0, 5.0], [1.0, 5.0]], progress=np.array([0, 0.2, 0.6, 1]))
    schedule = optimize(profile, 1200, criterion=worth, slices=12)
    # .6 after 600 units of the reference, then five times as fast
    assert stages_of(schedule) == [(0.0, 0.5, 0), (0.5, 1.0, 1)]
    assert schedule.predicted["progress"] == pytest.approx(0.6 + 5 * 0.6)
    check_sound(schedule)
    only = Constraints(allowed=(Strategy(mode=1),))
    stuck = optimize(profile, 1200, criterion=worth, slices=12, constraints=only)
    assert stages_of(stuck) == [(0.0, 1.0, 1)]
    assert stuck.predicted["progress"] == 0.0
    assert stuck.predicted["stuck"]
    check_sound(stuck)


def test_exploration_does_not_move_over_a_hole_either(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 4.0, 1.0], [1.0, 4.0, 1.0], [1.0, math.nan, 1.0]])
    schedule = optimize(
        profile, 400, criterion=worth, slices=4, exploration=0.3, constraints=Constraints(max_switches=0)
    )
    assert schedule.stages[0].progress == (0.0, 0.5)
    assert predict(profile, schedule, 400, criterion=worth) == [0.0, 0.5]


def test_a_checkpoint_without_any_cell_is_refused_by_fraction_and_passed_over_by_trajectory(
    worth, worth_profile
) -> None:
    values = np.array([[1.0, 5.0], [math.nan, math.nan], [1.0, 0.5], [1.0, 3.0]])
    profile = worth_profile(values)
    with pytest.raises(UsageError, match=r"no worth score for any strategy at the profiled progress 0.333333"):
        optimize(profile, 1000, criterion=worth, slices=10, progress="fraction")
    left = worth_profile(values[[0, 2, 3]], progress=profile.progress[[0, 2, 3]])
    found, expected = (optimize(p, 1000, criterion=worth, slices=10) for p in (profile, left))
    assert stages_of(found) == stages_of(expected)
    assert found.predicted == expected.predicted
    check_sound(found)


def test_one_checkpoint_gives_one_stage_in_both_modes(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 1.5, 0.2]], cost=[4, 2, 1])
    for mode in MODES:
        schedule = optimize(profile, 800, criterion=worth, progress=mode)
        assert stages_of(schedule) == [(0.0, 1.0, 1)]
        check_sound(schedule)
    assert schedule.predicted["progress"] == pytest.approx(1.2)
    assert schedule.predicted["progress_reference"] == pytest.approx(0.8)
    assert schedule.predicted["speed_up"] == pytest.approx(1.5)


@pytest.mark.parametrize("mode", MODES)
def test_a_grid_of_one_strategy_runs_it(mode: str, worth, worth_profile) -> None:
    profile = worth_profile([[1.0], [0.5], [2.0]], seconds=[0.1], memory=[100.0])
    constraints = Constraints(profile.grid.strategies(), ("mode", "cost"), 0, 1.0, 0.5, 1000.0, 100.0)
    schedule = optimize(
        profile, 1000, criterion=worth, slices=10, exploration=0.5, progress=mode, constraints=constraints
    )
    assert {stage.mixture for stage in schedule.stages} == {((Strategy(mode=0), 1.0),)}
    assert schedule.predicted["seconds"] == pytest.approx(100)
    check_sound(schedule)


@pytest.mark.parametrize("criterion", ["descent", "ca-mse"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("errors", [False, True])
@pytest.mark.parametrize("moment", ["bias_sq", "variance", "norm_sq", "inner"])
def test_negative_estimates_are_no_trouble(moment: str, errors: bool, mode: str, criterion: str, worth_profile) -> None:
    rng = np.random.default_rng(1)
    values = {name: rng.uniform(0.5, 1, size=(3, 3)) for name in ("bias_sq", "variance", "norm_sq", "inner")}
    values[moment][1] = [0.4, -0.3, -0.05]
    covariance = np.broadcast_to(0.2 * np.eye(5), (3, 3, 5, 5)) if errors else None
    moments = Moments(**values, norm_sq_ref=np.ones((3, 3)))
    profile = worth_profile(np.ones((3, 3)), [4, 2, 1], moments=moments, covariance=covariance)
    for exploration in (0.0, 0.2):
        schedule = optimize(
            profile,
            1000,
            criterion=criterion,
            slices=10,
            progress=mode,
            exploration=exploration,
            draws=50 if errors else 0,
        )
        check_sound(schedule)


@pytest.mark.parametrize(("moment", "criterion"), [("bias_sq", "ca-mse"), ("norm_sq", "descent")])
@pytest.mark.parametrize("mode", MODES)
def test_a_negative_square_counts_as_zero(moment: str, criterion: str, mode: str, worth_profile) -> None:
    ones = np.ones((3, 3))
    negative, zero = ones * [0.5, 0.3, -0.2], ones * [0.5, 0.3, 0.0]
    found = []
    for values in (negative, zero):
        moments = dataclasses.replace(Moments(ones, ones, ones, 0.5 * ones, ones), **{moment: values})
        found.append(
            optimize(worth_profile(ones, [4, 2, 1], moments=moments), 1000, criterion=criterion, progress=mode)
        )
    assert found[0] == found[1]
    assert stages_of(found[0]) == [(0.0, 1.0, 2)]


@pytest.mark.parametrize("mode", MODES)
def test_a_strategy_that_goes_uphill_is_not_chosen(mode: str, worth_profile) -> None:
    ones = np.ones((3, 2))
    profile = worth_profile(ones, [4, 1], moments=Moments(ones, ones, ones, ones * [0.2, -0.9], ones))
    assert stages_of(optimize(profile, 1000, progress=mode)) == [(0.0, 1.0, 0)]
    only = Constraints(allowed=(Strategy(mode=1),))
    forced = optimize(profile, 1000, progress=mode, constraints=only)
    assert forced.predicted["progress" if mode == "trajectory" else "score"] <= 0
    check_sound(forced)


@pytest.mark.parametrize("criterion", ["descent", "ca-mse"])
def test_a_checkpoint_without_a_gradient_is_refused_by_fraction_and_passed_over_by_trajectory(
    criterion: str, worth_profile
) -> None:
    rng = np.random.default_rng(2)
    values = [rng.uniform(0.5, 1, size=(4, 2)) for _ in range(4)]
    norm_ref = np.ones((4, 2))
    for value in (*values, norm_ref):
        value[2] = 0.0
    profile = worth_profile(norm_ref, [4, 1], moments=Moments(*values, norm_ref))
    with pytest.raises(UsageError, match=f"no {criterion} score for any strategy at the profiled progress 0.66"):
        optimize(profile, 1000, criterion=criterion, slices=10, progress="fraction")
    kept = [0, 1, 3]
    left = worth_profile(
        norm_ref[kept],
        [4, 1],
        progress=profile.progress[kept],
        moments=Moments(*(value[kept] for value in values), norm_ref[kept]),
    )
    found, expected = (optimize(p, 1000, criterion=criterion, slices=10) for p in (profile, left))
    assert found.predicted == expected.predicted
    assert stages_of(found) == stages_of(expected)
    check_sound(found)


@pytest.mark.parametrize("criterion", ["descent", "ca-mse"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_ref", [0.0, -0.5])
def test_a_profile_without_any_gradient_is_refused(norm_ref: float, mode: str, criterion: str, worth_profile) -> None:
    zeros = np.zeros((3, 2))
    profile = worth_profile(zeros, [4, 1], moments=Moments(zeros, zeros, zeros, zeros, zeros + norm_ref))
    with pytest.raises(UsageError, match=f"the profile gives no {criterion} score"):
        optimize(profile, 1000, criterion=criterion, progress=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_strategy_of_which_the_budget_pays_no_step_does_not_run(mode: str, worth, worth_profile) -> None:
    profile = worth_profile([[9.0, 2.0, 1.0]], cost=[4, 2, 1])
    arguments = {"criterion": worth, "progress": mode, "slices": 4}
    for budget, expected in ((8.0, 2), (15.0, 2), (16.0, 1), (31.9, 1), (32.0, 0)):
        assert stages_of(optimize(profile, budget, **arguments)) == [(0.0, 1.0, expected)]
    with pytest.raises(InfeasibleError, match="smallest feasible budget is 8 units") as error:
        optimize(profile, 7.9, **arguments)
    assert error.value.smallest == 8
    with pytest.raises(InfeasibleError, match="smallest feasible budget is 32 units") as error:
        optimize(profile, 20.0, constraints=Constraints(final_reference=0.25), **arguments)
    assert error.value.smallest == 32
    # a mixture needs a step of the dearest that it draws
    explored = optimize(profile, 32.0, exploration=0.3, **arguments)
    assert len(explored.strategies) == 3
    with pytest.raises(InfeasibleError) as error:
        optimize(profile, 31.9, exploration=0.3, **arguments)
    assert error.value.smallest == 32


@pytest.mark.parametrize("mode", MODES)
def test_what_was_not_measured_everywhere_is_not_explored_and_named(mode: str, worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 2.0, 1.0], [1.0, math.nan, 1.5]])
    schedule = optimize(profile, 1000, criterion=worth, progress=mode, exploration=0.2, slices=10)
    assert schedule.predicted["not_explored"] == [{"mode": 1}]
    assert "not_explored" not in optimize(profile, 1000, criterion=worth, progress=mode, slices=10).predicted
    only = Constraints(allowed=(Strategy(mode=1),))
    with pytest.raises(UsageError, match=r"exploration=0.2 has nothing to explore"):
        optimize(profile, 1000, criterion=worth, progress=mode, exploration=0.2, constraints=only)


def test_a_reference_with_holes_says_nothing_of_the_speed_up(worth, worth_profile) -> None:
    pilot = (Stage(0, 1, ((Strategy(mode=1), 1.0),), 1.0),)
    profile = worth_profile([[1.0, 2.0], [math.nan, 2.0]], pilot=pilot)
    predicted = optimize(profile, 1000, criterion=worth).predicted
    assert predicted["progress"] == pytest.approx(1.0)
    assert (predicted["progress_reference"], predicted["speed_up"]) == (None, None)


def test_a_steep_fall_to_zero_is_followed_without_a_warning(worth, worth_profile) -> None:
    profile = worth_profile([[0.001, 1.0], [0.001, -1.0], [1.0, 0.5]])
    schedule = optimize(profile, 1000, criterion=worth)
    check_sound(schedule)
    # the fast one is next to .25, where its speed is 0, after a slice, and the pilot moves on
    assert stages_of(schedule) == [(0.0, 0.01, 1), (0.01, 1.0, 0)]
    assert schedule.predicted["progress"] == pytest.approx(0.25 + 0.99)


def test_trajectory_without_a_known_budget_is_refused(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 2.0]], reference_budget=None)
    with pytest.raises(UsageError, match="does not know the budget of the profiled run"):
        optimize(profile, 1000, criterion=worth, progress="trajectory")
    assert optimize(profile, 1000, criterion=worth).progress_mode == "fraction"
    with pytest.raises(UsageError, match="progress='time' is not one of fraction, trajectory"):
        optimize(profile, 1000, criterion=worth, progress="time")


def test_more_strategies_than_are_moved_one_by_one(worth, worth_profile) -> None:
    values = np.ones((2, 4100))
    values[:, 4000] = 2.0
    schedule = optimize(worth_profile(values), 1000, criterion=worth, slices=3)
    assert stages_of(schedule) == [(0.0, 1.0, 4000)]


def test_many_labels_lose_next_to_nothing(worth, worth_profile) -> None:
    # 120 strategies and 60 switches are looked up in tables: as good as the same without counting switches
    values = np.exp(np.random.default_rng(0).normal(0, 0.5, size=(5, 120)))
    profile = worth_profile(values, np.linspace(0.5, 4, 120))
    free = optimize(profile, 1000, criterion=worth, slices=70)
    assert len(free.stages) <= 61
    counted = optimize(profile, 1000, criterion=worth, slices=70, constraints=Constraints(max_switches=60))
    assert counted.predicted["progress"] <= free.predicted["progress"] * (1 + 1e-12)
    assert counted.predicted["progress"] == pytest.approx(free.predicted["progress"], rel=1e-5)


def test_an_approximate_limit_of_seconds_is_kept_and_costs_little(worth, worth_profile) -> None:
    """60 slices of 8 strategies have too many sums of seconds to tell them all apart."""
    rng = np.random.default_rng(8)
    values = np.exp(rng.normal(0, 0.5, size=(4, 8)))
    profile = worth_profile(values, seconds=values.mean(axis=0) * rng.uniform(0.5, 1.5, 8))
    free = optimize(profile, 1000, criterion=worth, slices=60)
    for share in (0.5, 0.8, 0.95):
        limit = share * free.predicted["seconds"]
        schedule = optimize(profile, 1000, criterion=worth, slices=60, constraints=Constraints(max_seconds=limit))
        assert schedule.predicted["seconds"] <= limit * (1 + 1e-8)
        assert not schedule.predicted["exact"]
        # at least as good as the best of the schedules that switch once and keep the limit
        once = best_of_one_switch(profile, values, limit)
        assert once * (1 - 1e-3) <= schedule.predicted["progress"] <= free.predicted["progress"]


def best_of_one_switch(profile: Profile, values: np.ndarray, limit: float) -> float:
    motion, best = Speeds(profile.progress, values / values[:, :1], 1000.0), 0.0
    strategies = np.arange(values.shape[1])
    for first, k in itertools.product(strategies, range(0, 61, 2)):
        seconds = (k * profile.seconds[first] + (60 - k) * profile.seconds) * 1000 / 60
        middle = motion.advance(np.zeros(1), k * 1000 / 60, np.array([first]))
        end = motion.advance(middle.repeat(strategies.size), (60 - k) * 1000 / 60, strategies)
        best = max(best, float(end[seconds <= limit].max(initial=0.0)))
    return best


def test_the_default_is_by_fraction_where_speeds_are_lost_in_noise(worth, worth_profile) -> None:
    lost = worth_profile([[-1.0, 2.0], [-2.0, 1.0]])
    assert optimize(lost, 1e3, criterion=worth).progress_mode == "fraction"
    assert optimize(worth_profile([[1.0, 2.0], [2.0, 1.0]]), 1e3, criterion=worth).progress_mode == "trajectory"
    with pytest.raises(UsageError, match="not above 0 at any progress"):
        optimize(lost, 1e3, criterion=worth, progress="trajectory")

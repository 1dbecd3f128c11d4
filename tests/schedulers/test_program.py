"""The dynamic program against brute force over all paths and against an integer program."""

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from schedulers import InfeasibleError, UsageError, solve


def runs(path: list[int]) -> list[int]:
    return [len(list(group)) for _, group in itertools.groupby(path)]


def keeps(path, loss, follows=None, max_switches=None, min_dwell=1, final=None) -> bool:
    """Whether a path keeps the constraints, told from its definition alone."""
    path = [int(c) for c in path]
    changes = [(a, b) for a, b in itertools.pairwise(path) if a != b]
    return (
        all(np.isfinite(loss[k][c]) for k, c in enumerate(path))
        and (follows is None or all(follows[a][b] for a, b in changes))
        and (max_switches is None or len(changes) <= max_switches)
        and min(runs(path)) >= min_dwell
        and (final is None or all(c == final[1] for c in path[final[0] :]))
    )


def brute(loss: np.ndarray, **constraints) -> tuple[float, list[tuple[int, ...]]]:
    """The smallest loss over every path that keeps the constraints, and the paths that have it."""
    slices, strategies = loss.shape
    kept = [p for p in itertools.product(range(strategies), repeat=slices) if keeps(p, loss, **constraints)]
    if not kept:
        return np.inf, []
    totals = np.array([sum(loss[k][c] for k, c in enumerate(p)) for p in kept])
    best = totals.min()
    return best, [p for p, total in zip(kept, totals, strict=True) if total <= best + 1e-12]


@pytest.mark.parametrize("max_switches", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("min_dwell", [1, 2, 3])
def test_the_optimum_is_the_optimum(max_switches: int | None, min_dwell: int) -> None:
    rng = np.random.default_rng([min_dwell, 9 if max_switches is None else max_switches])
    infeasible = 0
    for trial in range(16):
        strategies, slices = (3, int(rng.integers(5, 8))) if trial % 2 else (4, 5)
        loss = rng.normal(size=(slices, strategies))
        if trial % 4 >= 2:
            loss[rng.random(loss.shape) < 0.25] = rng.choice([np.nan, np.inf])
        constraints = {
            "follows": None if trial % 3 == 0 else rng.random((strategies, strategies)) < 0.5,
            "max_switches": max_switches,
            "min_dwell": min_dwell,
            "final": None if trial % 5 < 2 else (int(rng.integers(0, slices)), int(rng.integers(strategies))),
        }
        best, paths = brute(loss, **constraints)
        if not paths:
            infeasible += 1
            with pytest.raises(InfeasibleError):
                solve(loss, **constraints)
            continue
        path = solve(loss, **constraints)
        assert keeps(path, loss, **constraints)
        assert loss[np.arange(slices), path].sum() == pytest.approx(best, abs=1e-12)
    assert infeasible < 16


@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_is_that_of_an_integer_program(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slices, strategies, switches, dwell = 14, 5, 3, 2 + seed % 3
    loss = rng.normal(size=(slices, strategies)) + 0.3 * rng.normal(size=strategies)
    follows = rng.random((strategies, strategies)) < 0.7
    path = solve(loss, follows=follows, max_switches=switches, min_dwell=dwell, final=(12, 1))
    assert keeps(path, loss, follows, switches, dwell, (12, 1))
    best = integer_program(loss, follows, switches, dwell, (12, 1))
    assert loss[np.arange(slices), path].sum() == pytest.approx(best, abs=1e-7)


def integer_program(loss, follows, switches: int, dwell: int, final: tuple[int, int]) -> float:
    """The same problem for HiGHS: x[k, c] picks a strategy, z[k] >= x[k, c] - x[k - 1, c] marks a switch."""
    slices, strategies = loss.shape
    x = np.arange(slices * strategies).reshape(slices, strategies)
    z = slices * strategies + np.arange(slices)
    rows, low, high = [], [], []

    def add(terms: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(z[-1] + 1)
        for variable, factor in terms.items():
            row[variable] += factor
        rows.append(row), low.append(least), high.append(most)

    for k in range(slices):
        add({x[k, c]: 1 for c in range(strategies)}, 1, 1)
        if k >= final[0]:
            add({x[k, final[1]]: 1}, 1, 1)
    for k, a in itertools.product(range(1, slices), range(strategies)):
        add({z[k]: 1, x[k, a]: -1, x[k - 1, a]: 1}, 0, np.inf)
        for later in range(k + 1, min(k + dwell, slices)):
            add({x[later, a]: 1, x[k, a]: -1, x[k - 1, a]: 1}, 0, np.inf)
        if k + dwell > slices:
            add({x[k - 1, a]: 1, x[k, a]: -1}, 0, np.inf)
        for b in range(strategies):
            if a != b and not follows[a, b]:
                add({x[k - 1, a]: 1, x[k, b]: 1}, -np.inf, 1)
    for a, later in itertools.product(range(strategies), range(1, dwell)):
        add({x[later, a]: 1, x[0, a]: -1}, 0, np.inf)
    add({z[k]: 1 for k in range(1, slices)}, -np.inf, switches)
    result = milp(
        np.concatenate([loss.ravel(), np.zeros(slices)]),
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(z[-1] + 1),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert result.status == 0
    return float(result.fun)


def test_equal_losses_stay_with_the_first_strategy() -> None:
    assert solve(np.zeros((6, 3))).tolist() == [0] * 6
    assert solve(np.zeros((6, 3)), max_switches=1, min_dwell=2).tolist() == [0] * 6


@pytest.mark.parametrize("seed", range(12))
def test_ties_switch_least_then_stay_then_take_the_first(seed: int) -> None:
    # whole numbers, so that equal sums are equal; the first optimal path in the documented order, read from its end
    rng = np.random.default_rng(seed)
    loss = rng.integers(0, 3, size=(6, 3)).astype(float)
    constraints = {"max_switches": [None, 2][seed % 2], "min_dwell": 1 + seed % 3 // 2}
    _, paths = brute(loss, **constraints)

    def order(path: tuple[int, ...]) -> list[int]:
        switches = 0 if constraints["max_switches"] is None else len(runs(path)) - 1
        back = path[::-1]
        return [switches, back[0], *(-1 if b == a else b for a, b in itertools.pairwise(back))]

    assert solve(loss, **constraints).tolist() == list(min(paths, key=order))


def test_twin_strategies_are_not_swapped() -> None:
    column = np.random.default_rng(0).normal(size=(50, 1))
    path = solve(np.concatenate([column, column, column], axis=1), max_switches=20, min_dwell=2)
    assert path.tolist() == [0] * 50


def test_the_last_stage_dwells_too() -> None:
    loss = np.array([[0, 9], [0, 9], [0, 9], [5, 0]], dtype=float)
    assert solve(loss, min_dwell=1).tolist() == [0, 0, 0, 1]
    assert solve(loss, min_dwell=2).tolist() == [0, 0, 0, 0]


def test_a_single_slice() -> None:
    assert solve([[3.0, 1.0, 2.0]]).tolist() == [1]
    with pytest.raises(InfeasibleError):
        solve([[3.0, 1.0, 2.0]], min_dwell=2)


def test_more_switches_than_fit_change_nothing() -> None:
    loss = np.random.default_rng(1).normal(size=(30, 4))
    assert solve(loss, max_switches=10**9, min_dwell=3).tolist() == solve(loss, min_dwell=3).tolist()


def test_the_callers_arrays_are_left_alone() -> None:
    loss = np.array([[0.0, np.nan], [1.0, 0.0]])
    follows = np.ones((2, 2), dtype=bool)
    solve(loss, follows=follows, final=(1, 0))
    assert np.isnan(loss[0, 1])
    assert loss[1].tolist() == [1.0, 0.0]
    assert follows.all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": np.zeros(3)},
        {"loss": np.zeros((0, 3))},
        {"loss": np.zeros((3, 2)), "min_dwell": 0},
        {"loss": np.zeros((3, 2)), "max_switches": -1},
        {"loss": np.zeros((3, 2)), "final": (1, 2)},
        {"loss": np.zeros((3, 2)), "follows": np.ones((3, 3))},
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(UsageError):
        solve(arguments.pop("loss"), **arguments)

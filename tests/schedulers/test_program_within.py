"""The dynamic program of values that are no sums, and under a limit of seconds, against brute force over all paths."""

import itertools

import numpy as np
import pytest

from schedulers.errors import InfeasibleError
from schedulers.program import Advance, Rules, additive, best_path
from schedulers.program_sum_within import best_sum_within
from schedulers.program_within import best_path_within, least_seconds_path, path_seconds, with_fewer_switches


def random_rules(rng: np.random.Generator, slices: int, strategies: int) -> Rules:
    """Any relation of followers, transitive or not, and any of the other rules."""
    usable = rng.random((slices, strategies)) < 0.9
    usable[:, rng.integers(strategies)] = True
    return Rules(
        usable,
        follows=rng.random((strategies, strategies)) < 0.6 if rng.random() < 0.6 else None,
        max_switches=int(rng.integers(0, 4)) if rng.random() < 0.5 else None,
        min_dwell=int(rng.integers(1, 4)),
    )


def keeps(path: np.ndarray, rules: Rules) -> bool:
    changes = [(a, b) for a, b in itertools.pairwise(path) if a != b]
    lengths = [len(list(group)) for _, group in itertools.groupby(path)]
    return (
        all(rules.usable[k, c] for k, c in enumerate(path))
        and (rules.follows is None or all(rules.follows[change] for change in changes))
        and (rules.max_switches is None or len(changes) <= rules.max_switches)
        and min(lengths) >= rules.min_dwell
    )


def every_path(rules: Rules) -> np.ndarray:
    """(paths, N) of those that keep the rules."""
    paths = np.indices((rules.strategies,) * rules.slices).reshape(rules.slices, -1).T
    return paths[[keeps(path, rules) for path in paths]]


def random_seconds(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Whole or any seconds, of which some are 0, the same in all slices or not."""
    seconds = rng.integers(0, 5, shape).astype(float) if rng.random() < 0.5 else rng.uniform(0, 5, shape)
    return np.repeat(seconds[:1], shape[0], axis=0) if rng.random() < 0.5 else seconds


def motion(gain: np.ndarray) -> Advance:
    """Progress with slower and slower gains: v + gain / (1 + v) keeps order from 0 on for gains below 1."""

    def advance(first: int, count: int, values: np.ndarray, strategies: np.ndarray) -> np.ndarray:
        for k in range(first, first + count):
            values = values + gain[k, strategies] / (1 + values)
        return values

    return advance


def reached(advance: Advance, paths: np.ndarray) -> np.ndarray:
    values = np.zeros(len(paths))
    for k in range(paths.shape[1]):
        values = advance(k, 1, values, paths[:, k])
    return values


@pytest.mark.parametrize("kind", ["sum", "motion"])
def test_the_best_path_of_any_value_that_keeps_order(kind: str) -> None:
    rng = np.random.default_rng(kind == "sum")
    solved = 0
    for _ in range(80):
        slices, strategies = int(rng.integers(3, 7)), int(rng.integers(2, 4))
        rules, gain = random_rules(rng, slices, strategies), rng.uniform(0, 1, (slices, strategies))
        advance = additive(gain) if kind == "sum" else motion(gain)
        paths = every_path(rules)
        if not len(paths):
            with pytest.raises(InfeasibleError):
                best_path(rules, advance)
            continue
        path = best_path(rules, advance)
        assert keeps(path, rules)
        assert reached(advance, path[None])[0] == pytest.approx(reached(advance, paths).max(), rel=1e-10)
        solved += 1
    assert solved > 50


@pytest.mark.parametrize("kind", ["sum", "labels of a sum", "labels of a motion"])
def test_the_best_path_within_a_limit(kind: str) -> None:
    rng = np.random.default_rng(["sum", "labels of a sum", "labels of a motion"].index(kind))
    solved, refused, binding = 0, 0, 0
    for trial in range(150):
        slices, strategies = int(rng.integers(3, 7)), int(rng.integers(2, 4))
        rules = random_rules(rng, slices, strategies)
        gain, seconds = rng.uniform(0, 1, (slices, strategies)), random_seconds(rng, (slices, strategies))
        if kind == "sum" and trial % 2:
            gain = rng.integers(-2, 3, gain.shape).astype(float)  # many equal sums, of any sign
        advance = motion(gain) if kind == "labels of a motion" else additive(gain)
        paths = every_path(rules)
        taken = seconds[np.arange(slices), paths].sum(axis=1)
        # between the least and the most, and often what one of the paths takes to the last digit
        limit = float(rng.choice(taken)) if taken.size else 1.0
        if trial % 3 == 0:
            limit *= float(rng.uniform(0.5, 1.1))
        fits = taken <= limit * (1 + 1e-9)
        if not fits.any():
            refused += 1
            with pytest.raises(InfeasibleError):
                _solved(kind, rules, advance, gain, seconds, limit)
            continue
        path = _solved(kind, rules, advance, gain, seconds, limit)
        values = reached(advance, paths)
        assert keeps(path, rules)
        assert path_seconds(seconds, path) <= limit * (1 + 2e-9)
        assert reached(advance, path[None])[0] == pytest.approx(values[fits].max(), rel=1e-9, abs=1e-9)
        solved += 1
        binding += values.max() > values[fits].max() + 1e-9
    assert solved > 80
    assert refused > 10
    assert binding > 30


def _solved(
    kind: str, rules: Rules, advance: Advance, gain: np.ndarray, seconds: np.ndarray, limit: float
) -> np.ndarray:
    if kind == "sum":
        path, bound = best_sum_within(rules, gain, seconds, limit)
        assert bound == pytest.approx(gain[np.arange(len(path)), path].sum())
    else:
        path, exact = best_path_within(rules, advance, seconds, limit)
        assert exact
    return path


@pytest.mark.parametrize("seed", range(8))
def test_where_sums_of_seconds_are_too_many_little_is_lost(seed: int) -> None:
    """60 slices of 6 strategies whose seconds differ in every slice: the exact search for sums tells how much."""
    rng = np.random.default_rng(seed)
    gain, seconds = rng.uniform(0, 1, (60, 6)), rng.uniform(0, 1, (60, 6))
    rules = Rules(np.ones((60, 6), dtype=bool), min_dwell=1 + seed % 3, max_switches=[None, 12][seed % 2])
    free = path_seconds(seconds, best_path(rules, additive(gain)))
    limit = 0.5 * (free + path_seconds(seconds, least_seconds_path(rules, seconds)))
    exact, bound = best_sum_within(rules, gain, seconds, limit)
    near, is_exact = best_path_within(rules, additive(gain), seconds, limit)
    rows = np.arange(60)
    best = gain[rows, exact].sum()
    assert bound == pytest.approx(best)
    assert not is_exact
    for path in (exact, near):
        assert keeps(path, rules)
        assert path_seconds(seconds, path) <= limit * (1 + 2e-9)
    assert 0.99 * best <= gain[rows, near].sum() <= best * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_more_intervals_lose_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gain, seconds = rng.uniform(0, 1, (60, 6)), rng.uniform(0, 1, (60, 6))
    rules, rows = Rules(np.ones((60, 6), dtype=bool)), np.arange(60)
    limit = 0.7 * path_seconds(seconds, best_path(rules, additive(gain)))
    best = gain[rows, best_sum_within(rules, gain, seconds, limit)[0]].sum()
    lost = [
        best - gain[rows, best_path_within(rules, additive(gain), seconds, limit, intervals=n)[0]].sum()
        for n in (5, 50, 500)
    ]
    assert lost[0] > lost[2] >= -1e-9
    assert lost[2] < 0.005 * best


def test_running_to_and_fro_is_put_in_order() -> None:
    rules = Rules(np.ones((9, 2), dtype=bool))
    seconds = np.tile([1.0, 2.0], (9, 1))
    fro = np.array([0, 1, 0, 0, 1, 1, 0, 1, 0])
    flat = with_fewer_switches(fro, rules, seconds, 13.0, lambda path: float(path.sum()))
    assert np.count_nonzero(np.diff(flat)) == 1
    assert np.sort(flat).tolist() == np.sort(fro).tolist()
    # not where something is lost by it, nor where a rule is broken
    place = np.arange(9.0)
    kept = with_fewer_switches(fro, rules, seconds, 13.0, lambda path: float(path @ place**2))
    assert float(kept @ place**2) >= float(fro @ place**2) * (1 - 1e-9)
    down = Rules(np.ones((9, 2), dtype=bool), follows=np.array([[True, False], [True, True]]))
    one = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0])
    assert with_fewer_switches(one, down, seconds, 13.0, lambda path: float(path.sum())).tolist() == one.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_put_in_order_keeps_rules_limit_and_worth(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slices, strategies = 8, 3
    usable = rng.random((slices, strategies)) < 0.9
    rules = Rules(usable, follows=rng.random((3, 3)) < 0.8, min_dwell=1)
    paths = every_path(rules)
    path = paths[rng.integers(len(paths))]
    gain, seconds = rng.integers(0, 2, (slices, strategies)), rng.integers(1, 3, (slices, strategies)).astype(float)

    def value(path: np.ndarray) -> float:
        return float(gain[np.arange(slices), path].sum())

    limit = path_seconds(seconds, path)
    found = with_fewer_switches(path, rules, seconds, limit, value)
    assert keeps(found, rules)
    assert path_seconds(seconds, found) <= limit
    assert value(found) >= value(path)
    assert np.count_nonzero(np.diff(found)) <= np.count_nonzero(np.diff(path))

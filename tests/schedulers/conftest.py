"""Profiles built by hand for the tests of the optimizer and of interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from schedulers import Criterion, Grid, Moments, Profile, Stage, Strategy

TWO_AXES = Grid({"patch": (16, 30), "dropout": (0, 0.5)}, Strategy(patch=16, dropout=0))


@pytest.fixture
def raw() -> Criterion:
    """A criterion that is the moment bias_sq itself: lower is better, any number may be planted."""
    return Criterion("raw", "raw", True, lambda moments, cost, *, beta, batch_size, reference_cost: moments.bias_sq)


@pytest.fixture
def raw_profile() -> Callable[..., Profile]:
    """`raw_profile(loss (N, C), grid, cost)`: a profile with a point on every slice whose raw score is `loss`."""

    def build(loss: Any, grid: Grid = TWO_AXES, cost: Any = None, **changes: Any) -> Profile:
        values = np.asarray(loss, dtype=float)
        ones = np.ones_like(values)
        fields: dict[str, Any] = {
            "grid": grid,
            "progress": np.arange(len(values)) / len(values),
            "cost": np.arange(len(grid), 0, -1.0) if cost is None else np.asarray(cost, dtype=float),
            "moments": Moments(values, ones, ones, ones, ones),
            "covariance": None,
            "batch_size": 8,
            "beta": 32.0,
            "metric": "euclidean",
            "cost_model": "tokens",
            "digest": "d1",
        }
        return Profile(**{**fields, **changes})

    return build


@pytest.fixture
def worth() -> Criterion:
    """A criterion that is the moment inner itself: higher is better, any number may be planted."""
    return Criterion("worth", "worth", False, lambda moments, cost, *, beta, batch_size, reference_cost: moments.inner)


@pytest.fixture
def worth_profile() -> Callable[..., Profile]:
    """`worth_profile(worth (T, C), cost)`: a profile of a run of 1000 units whose `worth` scores are given.

    Points are equally spaced from 0 to 1, strategies are mode=0, 1, ..., of which the first is the reference; all
    cost 1 unit per sample unless told otherwise.
    """

    def build(worth: Any, cost: Any = None, **changes: Any) -> Profile:
        values = np.asarray(worth, dtype=float)
        points, strategies = values.shape
        ones = np.ones_like(values)
        fields: dict[str, Any] = {
            "grid": Grid({"mode": tuple(range(strategies))}, Strategy(mode=0)),
            "progress": np.linspace(0, 1, points) if points > 1 else np.array([0.5]),
            "cost": np.ones(strategies) if cost is None else np.asarray(cost, dtype=float),
            "moments": Moments(ones, ones, ones, values, ones),
            "covariance": None,
            "batch_size": 8,
            "beta": 32.0,
            "metric": "euclidean",
            "cost_model": "tokens",
            "digest": "d1",
            "reference_budget": 1000.0,
        }
        return Profile(**{**fields, **changes})

    return build


@pytest.fixture(scope="session")
def random_profile() -> Callable[..., Profile]:
    """`random_profile(rng, grid, holes)`: moments of any sign, costs, seconds and memory of a run of a million units.

    With `holes` above 0 every strategy but the reference may lack some of them.
    """

    def build(rng: np.random.Generator, grid: Grid, holes: float = 0.0) -> Profile:
        points, strategies = int(rng.integers(1, 5)), len(grid)
        reference = grid.strategies().index(grid.reference)
        bias, variance, norm = (rng.normal(0.4, 0.5, size=(points, strategies)) for _ in range(3))
        inner = rng.normal(0.6, 0.6, size=(points, strategies))
        norm_ref = np.repeat(rng.uniform(0.3, 2, size=(points, 1)), strategies, axis=1)
        bias[:, reference], inner[:, reference], variance = 0.0, norm_ref[:, reference], np.abs(variance) + 0.1
        missing = rng.random((points, strategies)) < holes
        missing[:, reference] = False
        cost, seconds = rng.uniform(0.5, 4, strategies).round(2), rng.uniform(0.001, 0.02, strategies)
        memory = rng.integers(10**8, 10**9, strategies).astype(float)
        for values in (cost, seconds, memory):
            values[(rng.random(strategies) < holes / 3) & (np.arange(strategies) != reference)] = np.nan
        pilot = None
        if rng.random() < 0.6:
            weights = rng.dirichlet(np.ones(strategies))
            pilot = (Stage(0, 1, tuple(zip(grid.strategies(), weights.tolist(), strict=True)), 1.0),)
        holed = (np.where(missing, np.nan, values) for values in (bias, variance, norm, inner))
        return Profile(
            grid=grid,
            progress=np.sort(rng.choice(np.linspace(0, 1, 21), points, replace=False)),
            cost=cost,
            moments=Moments(*holed, norm_ref),
            covariance=None,
            batch_size=8,
            beta=8 * float(cost[reference]),
            metric="euclidean",
            cost_model="tokens",
            digest="d1",
            reference_budget=1e6,
            seconds=seconds,
            memory=memory,
            pilot=pilot,
        )

    return build

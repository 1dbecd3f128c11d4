"""Measurements made from gradients by the formulas of design section 3, and a run of the online policy on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from schedulers import AdaptivePolicy, AdaptiveRule, Grid, Measurement, ProbePlan, Strategy

KEEP = Grid({"keep": (0.25, 0.5, 1)}, Strategy(keep=1))
TWO = Grid({"keep": (0.5, 1)}, Strategy(keep=1))
SQUARE = Grid({"patch": (2, 4, 8), "dropout": (0, 0.25, 0.5)}, Strategy(patch=2, dropout=0))


def strategy(text: str) -> Strategy:
    return Strategy.parse(text)


def keep_cost(grid: Grid) -> dict[Strategy, float]:
    """Three passes over what is kept."""
    if "keep" in grid.axes:
        return {s: 3 * s.number("keep") for s in grid.strategies()}
    return {s: 3 * (1 - s.number("dropout")) * (2 / s.number("patch")) ** 2 for s in grid.strategies()}


def moments_of(g_MP: np.ndarray, z_MP: np.ndarray, size: int) -> np.ndarray:
    """bias_sq, variance, norm_sq, inner and norm_sq_ref of M gradients of sub-batches of `size` samples."""
    count, d_MP = len(g_MP), g_MP - z_MP

    def mean_square(a_MP: np.ndarray, b_MP: np.ndarray) -> float:
        a_P, b_P = a_MP.mean(0), b_MP.mean(0)
        noise = sum(float((a - a_P) @ (b - b_P)) for a, b in zip(a_MP, b_MP, strict=True))
        return float(a_P @ b_P) - noise / (count * (count - 1))

    spread = sum(float((g - g_MP.mean(0)) @ (g - g_MP.mean(0))) for g in g_MP) / (count - 1)
    return np.array(
        [
            mean_square(d_MP, d_MP),
            size * spread,
            mean_square(g_MP, g_MP),
            mean_square(g_MP, z_MP),
            mean_square(z_MP, z_MP),
        ]
    )


def measurement_of(gradients: Mapping[Strategy, np.ndarray], reference: Strategy, size: int = 8) -> Measurement:
    """What a probe would find: moments, and influences as the delete-one jackknife gives them.

    Of each strategy M gradients (M, P), paired with those of the reference; fewer where it left the race.
    """
    z_MP, most = gradients[reference], max(len(g) for g in gradients.values())
    moments, influence = [], np.zeros((len(gradients), 5, most))
    for row, g_MP in enumerate(gradients.values()):
        count = len(g_MP)
        moments.append(moments_of(g_MP, z_MP[:count], size))
        deleted = np.stack(
            [moments_of(np.delete(g_MP, m, 0), np.delete(z_MP[:count], m, 0), size) for m in range(count)], axis=1
        )
        influence[row, :, :count] = np.sqrt((count - 1) / count) * (deleted - deleted.mean(1, keepdims=True))
    counts = np.array([len(g) for g in gradients.values()])
    return Measurement(tuple(gradients), np.stack(moments), influence, counts)


def some_of(found: Measurement, strategies: Collection[Strategy], square: float = 1.0) -> Measurement:
    """A measurement of some of its strategies, of gradients whose squared length is `square` times as large."""
    rows = [i for i, s in enumerate(found.strategies) if s in strategies]
    counts = np.asarray(found.sub_batches)[rows]
    chosen = tuple(found.strategies[i] for i in rows)
    return Measurement(chosen, square * found.moments[rows], square * found.influence[rows], counts)


def gradients_of(
    means: Mapping[Strategy, np.ndarray], rng: np.random.Generator, count: int, *, common: float = 1.0, own: float = 0.2
) -> dict[Strategy, np.ndarray]:
    """Means (P) with noise that all strategies of a sub-batch have in common, and noise of their own."""
    width = len(next(iter(means.values())))
    shared_MP = common * rng.standard_normal((count, width))
    return {s: mean + shared_MP + own * rng.standard_normal((count, width)) for s, mean in means.items()}


@dataclass
class Run:
    """A training run that does nothing but ask the policy, and tell it what `world` says.

    `world(step, fraction, plan)` gives (measurement or None, failures, units actually spent). `history` is what the
    policy was told: kind, then arguments; `seen` the strategy of every step as it was asked for.
    """

    policy: AdaptivePolicy
    world: Callable[[int, float, ProbePlan], tuple[Measurement | None, dict[Strategy, str], float]]
    spent: float = 0.0
    step: int = 0
    training_units: float = 0.0
    seen: list[Strategy] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    plans: list[ProbePlan] = field(default_factory=list)
    verdicts: list[Any] = field(default_factory=list)
    set_up: float = 0.0

    def once(self) -> bool:
        """One step; False when the budget does not pay for it."""
        policy = self.policy
        now = policy.at(self.step)
        units = policy.batch_size * policy.costs[now]
        if self.spent + units > policy.budget:
            return False
        self.seen.append(now)
        self.fractions.append(self.spent / policy.budget)
        self.spent += units
        self.training_units += units
        policy.advance(self.step, self.spent)
        plan = policy.plan(self.spent, set_up=self.set_up)
        if plan is not None:
            self.plans.append(plan)
            found, failed, cost = self.world(self.step, self.spent / policy.budget, plan)
            self.spent += cost
            self.verdicts.append(policy.tell(self.step, self.spent, cost, found, failed))
        self.step += 1
        return True

    def all(self) -> Run:
        while self.once():
            pass
        return self


def new_policy(
    grid: Grid = KEEP, budget: float = 20_000, batch_size: int = 8, seed: int = 0, **rule: Any
) -> AdaptivePolicy:
    return AdaptivePolicy(
        grid, keep_cost(grid), budget=budget, batch_size=batch_size, rule=AdaptiveRule(**rule), seed=seed
    )


def steady_world(
    policy: AdaptivePolicy,
    means: Mapping[Strategy, np.ndarray],
    *,
    seed: int = 0,
    own: float = 0.2,
    common: float = 1.0,
) -> Callable[[int, float, ProbePlan], tuple[Measurement | None, dict[Strategy, str], float]]:
    """Every probe sees the same means, with noise that is a function of seed and step."""

    def world(step: int, fraction: float, plan: ProbePlan) -> tuple[Measurement | None, dict[Strategy, str], float]:
        rng = np.random.default_rng([seed, step])
        found = gradients_of({s: means[s] for s in plan.strategies}, rng, plan.sub_batches, common=common, own=own)
        return measurement_of(found, policy.grid.reference, policy.batch_size), {}, plan.units

    return world


def aligned_means(
    grid: Grid, quality: Mapping[str, float], width: int = 12, length: float = 2.0
) -> dict[Strategy, Any]:
    """Means of `length` whose cosine with the reference's is `quality`, by the text of the strategy; 1 elsewhere."""
    along, across = np.eye(width)[0], np.eye(width)[1]
    means = {}
    for s in grid.strategies():
        cosine = quality.get(str(s), 1.0)
        means[s] = length * (cosine * along + np.sqrt(1 - cosine**2) * across)
    return means

"""What the online policy is worth where the truth is known: synthetic gradients that drift over a training run.

    python -m benchmarks.adaptive.simulation [--seeds 200] [--quick] [--scenario slow] [--rule dwell=0.1,finish=0]

A run spends its budget in steps of BATCH samples on a 3 x 3 grid with the costs of MoCo-v3. Its truth, drawn from the
seed, is a reference gradient G(f) in DIMENSION numbers at the spent fraction f, and for each strategy c

    E g^c(f) = (1 + l_c(f)) G(f) + r_c(f) |G(f)| u_c(f),    |u_c| = 1, u_c orthogonal to G,

with per-sample noise of trace variance_c(f) whose correlation with the reference's on the same sample falls with
compression. |r_c|^2 = A(f) (k_c^p - 1) for a compression of k_c = C_ref / C_c: as A grows over training, the best
strategy moves from the cheapest to the reference. A probe draws M sub-batches, paired over the strategies, and
estimates moments and influence from them as gradscope does. The policy sees nothing but these.

A strategy's worth is its score over the best strategy's at that moment (best over its own where lower is better),
regret is 1 - worth, averaged over units of the budget. Regret of the *decisions* is that of the incumbent while there
is one, before the finish; *total* regret counts every unit: mixing at the start, exploration, probes (worth 0), the
finish on the reference.

Shapes: C strategies in the grid's order, M sub-batches, D dimension, E moments in the order of MOMENTS, T cells of the
budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.summary import Row, table
from schedulers import (
    AdaptivePolicy,
    AdaptiveRule,
    Grid,
    Measurement,
    Moments,
    Strategy,
    get_criterion,
    token_cost,
)

FILE = Path(__file__).parent / "results" / "simulation.json"
COMMAND = "python -m benchmarks.adaptive.simulation"

Array = NDArray[np.float64]

BATCH, DIMENSION = 64, 64
SETTLES = 0.002  # share of the budget after which a mismatch has come, or gone, to 63 %
CELLS = 250  # the truth is looked up, and the policy asked, this often in a run
GRID = Grid({"patch": (16, 24, 48), "dropout": (0, 0.5, 0.75)}, Strategy(patch=16, dropout=0))
STRATEGIES = tuple(GRID.strategies())
COSTS = {s: token_cost("mocov3", 240, 16, s) for s in STRATEGIES}
COST_C = np.array([COSTS[s] for s in STRATEGIES])
NUMBER = {s: c for c, s in enumerate(STRATEGIES)}
REFERENCE = NUMBER[GRID.reference]
COMPRESSION_C = COST_C[REFERENCE] / COST_C
PLACE_C = np.log(COMPRESSION_C) / np.log(COMPRESSION_C).max()  # 0: reference, 1: cheapest
CRITERIA = ("descent", "ca-mse")
QUANTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Scenario:
    """How the truth drifts and how much of it probes can see.

    `drift`: "slow" (smooth over the whole run), "sudden" (one or two jumps), "steady" (none). `noise` multiplies the
    noise of the reference's gradient over |G|^2, which goes from 0.4 ... 1.5 to 3 ... 12 times that. `spectrum` is the
    power by which the noise's eigenvalues fall: about 14 effective dimensions with 1, 5 with 1.5. `likeness` is the
    correlation of the cheapest strategy's noise with the reference's on the same samples. `bias` and `length` bound A
    over noise, and l of the cheapest strategy, at the beginning and at the end. `budget` in units.

    "measured" has the noise and the alignment that profiles of mixed runs of MoCo-v3 on Fashion-MNIST found in the
    optimizer's metric (`benchmarks.adaptive.training`): noise 2 to 4 times |G|^2 at the start, up to 100 times at the
    end; <E g, G> / |G|^2 of about .75 at a third of the cost and .3 at a tenth throughout; hardly any bias besides.

    `mismatch`: the share of <E g, G> that a strategy lacks while the model trains under one strategy alone, in
    measurements only; it comes and goes with SETTLES. "unfair" is "measured" with a loss as large as the largest that
    was found (`benchmarks.adaptive.fairness`): it comes at once and whatever runs, where it was found to come slowly,
    and to turn into a gain while the reference runs.
    """

    name: str
    drift: str
    noise: float = 1.0
    spectrum: float = 1.0
    likeness: float = 0.4
    bias: tuple[tuple[float, float], tuple[float, float]] = ((0.002, 0.02), (0.3, 2.0))
    length: tuple[tuple[float, float], tuple[float, float]] = ((0, 0.5), (-1.5, 0))
    budget: float = 2e6
    mismatch: float = 0.0


MEASURED = Scenario("measured", "slow", noise=6.0, spectrum=1.5, bias=((0.002, 0.01),) * 2, length=((-0.9, -0.6),) * 2)
SCENARIOS = {
    s.name: s
    for s in (
        Scenario("slow", "slow"),
        Scenario("sudden", "sudden"),
        Scenario("steady", "steady"),
        Scenario("noisy", "slow", noise=15.0, spectrum=1.5, likeness=0.1),
        MEASURED,
        dataclasses.replace(MEASURED, name="unfair", mismatch=0.35),
        Scenario("short", "slow", budget=2e5),
    )
}


@dataclass(frozen=True, eq=False)
class Truth:
    """What a run's gradients really are; everything is a function of the phase in [0, 1], which follows the drift.

    `phases`: from each fraction on, the phase that holds, or None for a smooth course f ** `bend`. The other numbers
    are values at phase 0 and 1 between which logarithms (`size` of |G|^2, `noise` = trace per sample / BATCH / |G|^2
    of the reference, `bias` A / noise) or values (`length`, l of the cheapest strategy) go linearly.
    """

    phases: tuple[tuple[float, float], ...] | None
    bend: float
    size: tuple[float, float]
    noise: tuple[float, float]
    bias: tuple[float, float]
    length: tuple[float, float]
    power: float
    jitter_C: Array
    spread_C: Array
    likeness_C: Array
    spectrum_D: Array
    turn_2D: Array
    aside_CD: Array
    mismatch: float

    @classmethod
    def drawn(cls, scenario: Scenario, seed: int) -> Truth:
        rng = np.random.default_rng([seed, *scenario.name.replace("unfair", "measured").encode()])

        def within(low: float, high: float) -> float:
            return float(rng.uniform(low, high))

        phases: tuple[tuple[float, float], ...] | None = None
        if scenario.drift == "steady":
            phases = ((0.0, within(0.1, 0.9)),)
        elif scenario.drift == "sudden":
            jumps = np.sort(rng.uniform(0.2, 0.85, size=rng.integers(1, 3)))
            levels = (within(0, 0.3), within(0.35, 0.65), within(0.7, 1))[-len(jumps) - 1 :]
            phases = tuple(zip((0.0, *map(float, jumps)), levels, strict=True))
        spectrum_D = np.arange(1.0, DIMENSION + 1) ** -scenario.spectrum
        vectors = rng.standard_normal((2 + 1 + len(STRATEGIES), DIMENSION))
        turn_2D = np.linalg.qr(vectors[:2].T)[0].T
        noise = scenario.noise * within(0.4, 1.5)
        return cls(
            phases=phases,
            bend=within(0.7, 1.4),
            size=(1.0, within(0.05, 0.5)),
            noise=(noise, noise * within(3, 12)),
            bias=(within(*scenario.bias[0]), within(*scenario.bias[1])),
            length=(within(*scenario.length[0]), within(*scenario.length[1])),
            power=within(0.8, 1.2),
            jitter_C=np.exp(0.25 * rng.standard_normal(len(STRATEGIES))),
            spread_C=(1 + within(0, 0.8) * PLACE_C) * np.where(PLACE_C > 0, np.exp(0.1 * vectors[3:, 0]), 1),
            likeness_C=1 - (1 - scenario.likeness) * PLACE_C,
            spectrum_D=spectrum_D / spectrum_D.sum(),
            turn_2D=turn_2D,
            # strategies err in similar directions: half of it is common
            aside_CD=vectors[2] + vectors[3:],
            mismatch=scenario.mismatch,
        )

    def phase(self, fraction_T: Array) -> Array:
        if self.phases is None:
            return np.asarray(np.clip(fraction_T, 0, 1) ** self.bend)
        starts = [start for start, _ in self.phases]
        place = np.searchsorted(starts, fraction_T, side="right") - 1
        return np.array([level for _, level in self.phases])[place]

    def parts(self, fraction_T: Array) -> tuple[Array, Array, Array, Array]:
        """|G|^2 (T,), trace of the noise of a sample (T, C), l and r (T, C)."""
        phase_T = self.phase(fraction_T)
        size_T, noise_T, bias_T = (_between(ends, phase_T) for ends in (self.size, self.noise, self.bias))
        length_T = self.length[0] + (self.length[1] - self.length[0]) * phase_T
        trace_TC = (BATCH * noise_T * size_T)[:, None] * self.spread_C
        excess_C = self.jitter_C * (COMPRESSION_C**self.power - 1)
        return size_T, trace_TC, length_T[:, None] * PLACE_C, np.sqrt((bias_T * noise_T)[:, None] * excess_C)

    def moments(self, fraction_T: Array) -> Moments:
        """The exact moments, (T, C)."""
        size_T, trace_TC, length_TC, aside_TC = self.parts(fraction_T)
        size_TC = np.broadcast_to(size_T[:, None], trace_TC.shape)
        return Moments(
            bias_sq=size_TC * (length_TC**2 + aside_TC**2),
            variance=trace_TC,
            norm_sq=size_TC * ((1 + length_TC) ** 2 + aside_TC**2),
            inner=size_TC * (1 + length_TC),
            norm_sq_ref=size_TC,
        )

    def means(self, fraction: float, alone: float = 0.0) -> tuple[Array, Array]:
        """E g^c (C, D) at a fraction and the trace of each strategy's noise (C,).

        `alone`, in [0, 1]: how far the model has settled to train under one strategy only.
        """
        at_T = np.array([fraction])
        size_T, trace_TC, length_TC, aside_TC = self.parts(at_T)
        angle = 0.5 * math.pi * float(self.phase(at_T)[0])  # the reference gradient turns by a right angle
        way_D = math.cos(angle) * self.turn_2D[0] + math.sin(angle) * self.turn_2D[1]
        aside_CD = self.aside_CD - np.outer(self.aside_CD @ way_D, way_D)
        aside_CD /= np.linalg.norm(aside_CD, axis=1, keepdims=True)
        kept_C = np.where(np.arange(len(STRATEGIES)) == REFERENCE, 1.0, 1 - self.mismatch * alone)
        mean_CD = (kept_C * (1 + length_TC[0]))[:, None] * way_D + aside_TC[0][:, None] * aside_CD
        return math.sqrt(size_T[0]) * mean_CD, trace_TC[0]

    def sub_batches(
        self,
        fraction: float,
        numbers: Sequence[int],
        count: int,
        rng: np.random.Generator,
        size: int = BATCH,
        alone: float = 0.0,
    ) -> Array:
        """`count` gradients of `size` samples of each strategy in `numbers`, paired over the strategies: (C, M, D)."""
        mean_CD, trace_C = self.means(fraction, alone)
        chosen = list(numbers)
        noise_MD = rng.standard_normal((1, count, DIMENSION))
        own_CMD = rng.standard_normal((len(chosen), count, DIMENSION))
        likeness_C11 = self.likeness_C[chosen, None, None]
        noise_CMD = likeness_C11 * noise_MD + np.sqrt(1 - likeness_C11**2) * own_CMD
        scale_C1D = np.sqrt(trace_C[chosen, None, None] / size * self.spectrum_D)
        return np.asarray(mean_CD[chosen, None, :] + scale_C1D * noise_CMD)

    def worth(self, criterion: str) -> Array:
        """Worth of every strategy in every cell of the budget, (T, C): 1 is the best, below 0 leads uphill."""
        chosen = get_criterion(criterion)
        middle_T = (np.arange(CELLS) + 0.5) / CELLS
        score_TC = chosen.score(
            self.moments(middle_T),
            COST_C,
            beta=BATCH * COST_C[REFERENCE],
            batch_size=BATCH,
            reference_cost=COST_C[REFERENCE],
        )
        if chosen.lower_is_better:
            return np.asarray(score_TC.min(axis=1, keepdims=True) / score_TC)
        return np.asarray(score_TC / score_TC.max(axis=1, keepdims=True))


def _between(ends: tuple[float, float], phase_T: Array) -> Array:
    return np.asarray(ends[0] * (ends[1] / ends[0]) ** phase_T)


def measured(g_CMD: Array, z_MD: Array, batch_size: int) -> tuple[Array, Array]:
    """Moments (C, E) and influence (C, E, M) of sub-batch gradients (M >= 3), z the reference's on the same data.

    The formulas of gradscope.estimators and gradscope.influence with one term per sub-batch.
    """
    count = len(z_MD)
    d_CMD = g_CMD - z_MD

    def pairs(a_CMD: Array, b_CMD: Array) -> tuple[Array, Array]:
        """<a_i, b_j> averaged over i != j, of all sub-batches (C,) and with each left out (C, M)."""
        own_CM = np.einsum("cmd,cmd->cm", a_CMD, b_CMD)
        a_CD, b_CD = a_CMD.sum(1), b_CMD.sum(1)
        both_C = np.einsum("cd,cd->c", a_CD, b_CD)
        one_CM = np.einsum("cd,cmd->cm", a_CD, b_CMD) + np.einsum("cd,cmd->cm", b_CD, a_CMD)
        own_C = own_CM.sum(1)
        left_CM = both_C[:, None] - one_CM + own_CM - (own_C[:, None] - own_CM)
        return (both_C - own_C) / (count * (count - 1)), left_CM / ((count - 1) * (count - 2))

    square_CM = np.einsum("cmd,cmd->cm", g_CMD, g_CMD)
    norm, bias, inner = pairs(g_CMD, g_CMD), pairs(d_CMD, d_CMD), pairs(g_CMD, np.broadcast_to(z_MD, g_CMD.shape))
    reference = pairs(z_MD[None], z_MD[None])
    variance_C = batch_size * (square_CM.mean(1) - norm[0])
    left_CM = (square_CM.sum(1, keepdims=True) - square_CM) / (count - 1)
    variance = variance_C, batch_size * (left_CM - norm[1])
    columns = (bias, variance, norm, inner, (np.broadcast_to(reference[0], bias[0].shape), reference[1]))
    moments_CE = np.stack([total for total, _ in columns], axis=-1)
    deleted_CEM = np.stack([np.broadcast_to(left, bias[1].shape) for _, left in columns], axis=1)
    influence_CEM = math.sqrt((count - 1) / count) * (deleted_CEM - deleted_CEM.mean(axis=2, keepdims=True))
    return moments_CE, influence_CEM


@dataclass
class Run:
    """What one run of the policy came to: spent units by cell and strategy, and what the policy did.

    `units_TC`: of training, in each cell; `probes_T`: units of probes; `incumbent_T`: number of the incumbent at
    the start of the cell, -1 while all are mixed; `changes`: (fraction, number) of each choice before the finish.
    """

    units_TC: Array = field(default_factory=lambda: np.zeros((CELLS, len(STRATEGIES))))
    probes_T: Array = field(default_factory=lambda: np.zeros(CELLS))
    incumbent_T: NDArray[np.int64] = field(default_factory=lambda: np.full(CELLS, -1))
    changes: list[tuple[float, int]] = field(default_factory=list)
    probes: int = 0
    sub_batches: int = 0
    spent: float = 0.0
    left_out: int = 0  # strategies that probes left out


def simulate(truth: Truth, rule: AdaptiveRule, seed: int, *, budget: float, every_step: bool = False) -> Run:
    """One training run under the policy.

    Steps between two looks at the policy (one cell apart) are charged by the mixture's mean; with `every_step` each
    step is drawn by `policy.at` and the policy is asked after it, as in a real loop.
    """
    policy = AdaptivePolicy(GRID, COSTS, budget=budget, batch_size=BATCH, rule=rule, seed=seed)
    rng, size = np.random.default_rng([seed, 1]), rule.sub_batch or BATCH
    run, step, last, taken, alone = Run(), 0, None, 0, 0.0
    weight_C = np.zeros(len(STRATEGIES))
    while True:
        if every_step:
            weight_C = np.eye(len(STRATEGIES))[NUMBER[policy.at(step)]]
        elif len(policy.decisions) != taken:
            taken = len(policy.decisions)
            weight_C = _weights(policy.mixture(step))
        mean = BATCH * float(weight_C @ COST_C)
        if run.spent + mean > budget:
            return run
        count = 1 if every_step else max(1, int(min(budget / CELLS, budget - run.spent) / mean))
        cell = _cell(run.spent + count * mean / 2, budget)
        run.units_TC[cell] += count * BATCH * weight_C * COST_C
        run.incumbent_T[cell:] = -1 if last is None else NUMBER[last]
        run.spent += count * mean
        step += count
        shared = 1.0 if policy.incumbent is None else policy.decisions[-1].exploration
        alone += (1 - shared - alone) * (1 - math.exp(-count * mean / budget / SETTLES))
        policy.advance(step - 1, run.spent)
        plan = policy.plan(run.spent)
        if plan is not None:
            numbers = [NUMBER[s] for s in plan.strategies]
            units = float(plan.sub_batches * size * COST_C[numbers].sum())
            if units > plan.units * (1 + 1e-9):
                raise RuntimeError(f"a probe of {units:g} units was planned to cost at most {plan.units:g}")
            g_CMD = truth.sub_batches(run.spent / budget, numbers, plan.sub_batches, rng, size, alone)
            found = measured(g_CMD, g_CMD[numbers.index(REFERENCE)], size)
            run.probes_T[_cell(run.spent, budget)] += units
            run.spent += units
            run.probes += 1
            run.sub_batches += plan.sub_batches
            run.left_out += len(STRATEGIES) - len(numbers)
            policy.tell(step - 1, run.spent, units, Measurement(plan.strategies, *found), {})
        now = policy.incumbent
        if now != last and run.spent < (1 - rule.finish) * budget:
            run.changes.append((run.spent / budget, -1 if now is None else NUMBER[now]))
        last = now


def _cell(units: float, budget: float) -> int:
    return min(CELLS - 1, int(units / budget * CELLS))


def _weights(mixture: tuple[tuple[Strategy, float], ...]) -> Array:
    weight_C = np.zeros(len(STRATEGIES))
    for strategy, weight in mixture:
        weight_C[NUMBER[strategy]] += weight
    return weight_C


def told(run: Run, truth: Truth, rule: AdaptiveRule, budget: float) -> dict[str, float]:
    """A run in numbers. Total regret is the sum of its parts, each as a share of all units spent.

    `decisions` is the mean over the units spent while there is an incumbent, before the finish, and `constant there`
    that of the best constant over the same units; NaN where none is.
    """
    worth_TC = truth.worth(rule.criterion)
    lost_TC = run.units_TC * (1 - worth_TC)
    units_T = run.units_TC.sum(1)
    finish_T = np.arange(CELLS) >= round((1 - rule.finish) * CELLS)
    mixing_T = ~finish_T & (run.incumbent_T < 0)
    chosen_T = ~finish_T & (run.incumbent_T >= 0)
    own_T = units_T * (1 - worth_TC[np.arange(CELLS), run.incumbent_T])
    spent = float(units_T.sum() + run.probes_T.sum())
    parts = {
        "part: start": lost_TC[mixing_T].sum(),
        "part: decisions": own_T[chosen_T].sum(),
        "part: exploration": lost_TC[chosen_T].sum() - own_T[chosen_T].sum(),
        "part: finish": lost_TC[finish_T].sum(),
        "part: probes": run.probes_T.sum(),
    }
    fractions = [fraction for fraction, _ in run.changes]
    numbers = [number for _, number in run.changes]
    returns = [fractions[i + 2] - fractions[i + 1] for i in range(len(numbers) - 2) if numbers[i] == numbers[i + 2]]
    decided = units_T[chosen_T].sum()
    constant_C = (units_T[chosen_T, None] * (1 - worth_TC[chosen_T])).sum(0)
    return {
        "decisions": float(own_T[chosen_T].sum() / decided) if decided else math.nan,
        "constant there": float(constant_C.min() / decided) if decided else math.nan,
        "total": float(sum(parts.values()) / spent),
        **{name: float(value) / spent for name, value in parts.items()},
        "first decision": fractions[0] if fractions else 1.0,
        "switches": float(max(0, len(run.changes) - 1)),
        "least gap": min((b - a for a, b in itertools.pairwise(fractions)), default=math.inf),
        "returns": float(len(returns)),
        "shortest return": min(returns, default=math.inf),
        "overhead": float(run.probes_T.sum() / budget),
        "probes": float(run.probes),
        "sub-batches": float(run.sub_batches),
        "left out": float(run.left_out),
        "overspent": max(0.0, run.spent / budget - 1),
    }


def constants(truth: Truth, criterion: str) -> dict[str, dict[str, float]]:
    """Regret of runs that take no decision, over the whole budget; in the mixture all have equal shares of it."""
    regret_C = 1 - truth.worth(criterion).mean(0)
    return {
        "best constant": {"total": float(regret_C.min()), "which": float(regret_C.argmin())},
        "mixture": {"total": float(regret_C.mean())},
        "reference": {"total": float(regret_C[REFERENCE])},
    }


def run_scenario(scenario: str | Scenario, rule: AdaptiveRule, seeds: Iterable[int]) -> list[dict[str, float]]:
    """`told` of a run with each seed: the same seeds meet the same truths under any rule."""
    chosen = SCENARIOS[scenario] if isinstance(scenario, str) else scenario
    found = []
    for seed in seeds:
        truth = Truth.drawn(chosen, seed)
        run = simulate(truth, rule, seed, budget=chosen.budget)
        found.append(told(run, truth, rule, chosen.budget))
    return found


def eager(rule: AdaptiveRule) -> AdaptiveRule:
    """The same rule switching on any advantage, however small or uncertain."""
    return dataclasses.replace(rule, confidence=0.0, tolerance=0.0, dwell=0.0)


def unmixed(rule: AdaptiveRule) -> AdaptiveRule:
    """The same rule without mixing before probes, but with about as much exploration in all."""
    return dataclasses.replace(rule, mix=0.0, exploration=2 * rule.exploration)


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Quantiles and mean of the values that are finite, and how many they are."""
    known = np.array([v for v in values if math.isfinite(v)])
    if not known.size:
        return {"runs": 0}
    at = {f"q{q}": round(float(v), 5) for q, v in zip(QUANTILES, np.percentile(known, QUANTILES), strict=True)}
    return {**at, "mean": round(float(known.mean()), 5), "least": round(float(known.min()), 5)} | {
        "most": round(float(known.max()), 5),
        "runs": int(known.size),
    }


def summarised(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | int]]:
    return {name: spread([run[name] for run in runs]) for name in runs[0]}


def measure(
    seeds: int, rule: AdaptiveRule, scenarios: Iterable[str] = tuple(SCENARIOS), criteria: Iterable[str] = CRITERIA
) -> dict[str, Any]:
    """Every scenario under every criterion: the policy, the eager one, and runs without decisions."""
    from benchmarks.machine import device_text

    found: dict[str, Any] = {
        "device": device_text("cpu", 1),
        "date": datetime.date.today().isoformat(),
        "seeds": seeds,
        "rule": dataclasses.asdict(rule),
        "scenarios": {},
    }
    for name in scenarios:
        for criterion in criteria:
            chosen = dataclasses.replace(rule, criterion=criterion)
            policies: dict[str, list[Any]] = {
                "online": run_scenario(name, chosen, range(seeds)),
                "eager": run_scenario(name, eager(chosen), range(seeds)),
            }
            if name in (MEASURED.name, "unfair"):
                policies["unmixed"] = run_scenario(name, unmixed(chosen), range(seeds))
            still = [constants(Truth.drawn(SCENARIOS[name], seed), criterion) for seed in range(seeds)]
            policies |= {other: [run[other] for run in still] for other in still[0]}
            apart = {
                f"beside {other}": spread(
                    [a["total"] - b["total"] for a, b in zip(policies["online"], policies[other], strict=True)]
                )
                for other in policies
                if other != "online"
            }
            entry = {policy: summarised(runs) for policy, runs in policies.items()}
            entry["online"] |= apart
            found["scenarios"].setdefault(name, {})[criterion] = entry
    return found


def text(results: Mapping[str, Any]) -> str:
    """The results as a table for a look: medians."""
    left_out = {"total", "least gap", "shortest return", "overspent", "which"}
    lines = ["scenario criterion policy: total (5 %..95 %, mean) | medians of the rest"]
    for scenario, by_criterion in results["scenarios"].items():
        for criterion, policies in by_criterion.items():
            for policy, entry in policies.items():
                total = entry["total"]
                line = f"{scenario:7s} {criterion:8s} {policy:13s} {total['q50']:6.3f} ({total['q5']:6.3f}.."
                line += f"{total['q95']:6.3f}, {total['mean']:6.3f})"
                shown = [name for name, values in entry.items() if values.get("runs") and name not in left_out]
                rest = [f"{name} {entry[name]['q50']:.3g}" for name in shown]
                lines.append(" | ".join([line, *rest]))
    return "\n".join(lines)


def rows(results: Mapping[str, Any] | None = None) -> list[Row]:
    """Rows for `summary.json`, by default of the committed results; none where there are none."""
    if results is None:
        if not FILE.exists():
            return []
        results = json.loads(FILE.read_text(encoding="utf-8"))
    rule, every = AdaptiveRule(**results["rule"]), len(results["scenarios"]) * len(CRITERIA) * results["seeds"]
    about = results["device"], results["date"]
    made = []
    for scenario, by_criterion in results["scenarios"].items():
        for criterion, entry in by_criterion.items():
            where, kept = f"simulated, {scenario}, {criterion}", "median and 5 to 95 % of the seeds"
            decided, beside = entry["online"]["decisions"], entry["online"]["constant there"]
            if decided["runs"]:
                made.append(
                    Row(
                        f"{where}: regret of the decisions, {kept}", decided["q50"], "1", decided["q5"], decided["q95"],
                        f"no more than the best constant's in hindsight over the same units, {beside['q50']:.3g}",
                        decided["q50"] <= beside["q50"], *about, decided["runs"], COMMAND,
                    )
                )  # fmt: skip
            total = entry["online"]["total"]
            idle = {other: entry[other]["total"]["q50"] for other in ("mixture", "reference")}
            made.append(
                Row(
                    f"{where}: regret of all units, {kept} (best constant in hindsight "
                    f"{entry['best constant']['total']['q50']:.3g})",
                    total["q50"], "1", total["q5"], total["q95"],
                    f"below those of the mixture, {idle['mixture']:.3g}, and the reference, {idle['reference']:.3g}",
                    total["q50"] < min(idle.values()), *about, total["runs"], COMMAND,
                )
            )  # fmt: skip
    entries = [entry for by_criterion in results["scenarios"].values() for entry in by_criterion.values()]
    online = [entry["online"] for entry in entries]

    def extreme(claim: str, value: float, unit: str, aim: str, holds: bool) -> None:
        made.append(Row(claim, value, unit, None, None, aim, holds, *about, every, COMMAND))

    overhead = max(e["overhead"]["most"] for e in online)
    within = overhead <= rule.overhead and all(e["overspent"]["most"] == 0 for e in online)
    extreme(
        "simulated: share of the budget spent on probes, largest of all runs", overhead, "1",
        f"at most {rule.overhead:g}, and no run above its budget", within,
    )  # fmt: skip
    switches, allowed = max(e["switches"]["most"] for e in online), most_switches(rule)
    extreme(
        "simulated: switches in a run, most of all runs", switches, "switches",
        f"at most {allowed}, as dwell={rule.dwell:g} allows", switches <= allowed,
    )  # fmt: skip
    gap = min((e["least gap"]["least"] for e in online if e["least gap"]["runs"]), default=1.0)
    extreme(
        "simulated: share of the budget between two changes of the strategy, least of all runs", gap, "1",
        f"at least {rule.dwell:g}", gap >= rule.dwell,
    )  # fmt: skip
    away = min((e["shortest return"]["least"] for e in online if e["shortest return"]["runs"]), default=1.0)
    extreme(
        "simulated: share of the budget for which a strategy is left before it returns, least of all runs", away, "1",
        f"at least {rule.dwell:g}", away >= rule.dwell,
    )  # fmt: skip
    here, there = (np.mean([e[policy]["total"]["mean"] for e in entries]) for policy in ("online", "eager"))
    extreme(
        "simulated: regret of all units less that without hysteresis, mean", float(here - there), "1",
        f"at most 0.01, without it {there:.3g}", bool(here - there <= 0.01),
    )  # fmt: skip
    for scenario, by_criterion in results["scenarios"].items():
        for criterion, entry in by_criterion.items():
            if "unmixed" in entry:
                here, there = (entry[policy]["total"]["q50"] for policy in ("online", "unmixed"))
                extreme(
                    f"simulated, {scenario}, {criterion}: regret of all units less that without mixing before probes, "
                    "medians", float(here - there), "1", f"below 0, without it {there:.3g}" if scenario == "unfair"
                    else f"at most 0.01, without it {there:.3g}", bool(here - there < (scenario != "unfair") * 0.01),
                )  # fmt: skip
    for name, claim in (("switches", "switches in a run"), ("returns", "returns to the strategy before in a run")):
        here, there = (np.mean([e[policy][name]["mean"] for e in entries]) for policy in ("online", "eager"))
        extreme(
            f"simulated: {claim}, mean", float(here), name,
            f"fewer than without hysteresis (confidence, tolerance, dwell 0), {there:.3g}", bool(here < there),
        )  # fmt: skip
    return made


def most_switches(rule: AdaptiveRule) -> int:
    """How many times a policy can switch between its first decision and the finish."""
    return math.floor((1 - rule.finish - rule.start) / rule.dwell) if rule.dwell > 0 else CELLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 seeds, for a look; writes nothing")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="only this one; writes nothing")
    parser.add_argument("--rule", default="", metavar="NAME=VALUE,...", help="settings of the rule; writes nothing")
    parser.add_argument("--device", default="cpu", help="the simulation runs on the processor alone")
    options = parser.parse_args()
    seeds = min(options.seeds, 8) if options.quick else options.seeds
    results = measure(seeds, AdaptiveRule.parse(options.rule), options.scenario or SCENARIOS)
    if not (options.quick or options.scenario or options.rule):
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(text(results))
    print(table([("adaptive", each) for each in rows(results)]))


if __name__ == "__main__":
    main()

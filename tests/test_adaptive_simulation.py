"""The simulation of the online policy: its truth, its probes and its accounts, and that its rows are valid."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.adaptive import simulation
from benchmarks.adaptive.simulation import CELLS, COST_C, REFERENCE, SCENARIOS, STRATEGIES, Run, Truth
from benchmarks.summary import parse_row
from gradscope.estimators import (
    ESTIMATES,
    EUCLIDEAN,
    Block,
    GradientStream,
    GroupLayout,
    Sketch,
    estimate,
    inner_products,
)
from gradscope.influence import influence_of
from schedulers import MOMENTS, AdaptiveRule

LAYOUT = GroupLayout(("all",), (simulation.DIMENSION,))


def stream(g_MD: np.ndarray, z_MD: np.ndarray) -> GradientStream:
    found = GradientStream.empty(
        LAYOUT, EUCLIDEAN, Sketch(LAYOUT, seed=0, device=torch.device("cpu")), torch.zeros(g_MD.shape[1]).double()
    )
    for m, (g, z) in enumerate(zip(map(torch.from_numpy, g_MD), map(torch.from_numpy, z_MD), strict=True)):
        reference = Block(z, 1, *(inner_products(z, z, LAYOUT, EUCLIDEAN),) * 2)
        block = Block(g, 1, inner_products(g, g, LAYOUT, EUCLIDEAN), inner_products(g, z, LAYOUT, EUCLIDEAN))
        found.add(m, block, reference)
    return found


def test_probes_are_estimated_as_the_profiler_does() -> None:
    g_CMD = Truth.drawn(SCENARIOS["slow"], 0).sub_batches(0.3, [0, 4, 8], 6, np.random.default_rng(0))
    moments_CE, influence_CEM = simulation.measured(g_CMD, g_CMD[0], 64)
    streams = [stream(g_MD, g_CMD[0]) for g_MD in g_CMD]
    rows = [ESTIMATES.index(name) for name in MOMENTS]
    for c, one in enumerate(streams):
        found = estimate(one, streams[0], term_samples=64)
        assert moments_CE[c] == pytest.approx(found.total_WE[0, rows], rel=1e-9, abs=1e-12)
        expected = influence_of(found.deleted_MWE[..., rows], 6)[0]
        assert influence_CEM[c] == pytest.approx(expected, rel=1e-5, abs=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_probes_err_around_the_truth(scenario: str) -> None:
    truth, rng = Truth.drawn(SCENARIOS[scenario], 1), np.random.default_rng(0)
    everything = list(range(len(STRATEGIES)))
    found = []
    for _ in range(300):
        g_CMD = truth.sub_batches(0.6, everything, 4, rng)
        found.append(simulation.measured(g_CMD, g_CMD[REFERENCE], 64)[0])
    exact = truth.moments(np.array([0.6]))
    error_CE = np.std(found, axis=0) / math.sqrt(len(found))
    exact_CE = np.stack([getattr(exact, name)[0] for name in MOMENTS], axis=-1)
    apart_CE = np.abs(np.mean(found, axis=0) - exact_CE)
    assert (apart_CE <= 4.5 * error_CE + 1e-12).all()
    assert error_CE[REFERENCE, 0] == exact_CE[REFERENCE, 0] == 0  # the reference has no bias
    assert (error_CE[:, 1:] > 0).all()


@pytest.mark.parametrize("criterion", simulation.CRITERIA)
def test_the_best_strategy_moves_from_cheap_to_dear_where_the_truth_says_so(criterion: str) -> None:
    for name, scenario in SCENARIOS.items():
        best = np.array([Truth.drawn(scenario, seed).worth(criterion).argmax(1) for seed in range(20)])
        early, late = COST_C[best[:, 0]].mean(), COST_C[best[:, -1]].mean()
        if name == "steady":
            assert (best == best[:, :1]).all() and len(set(best[:, 0])) > 3
        elif name in ("measured", "unfair"):  # what is known of real runs: it hardly moves
            assert early / 2 < late < 2 * early < COST_C[REFERENCE]
        else:
            assert late > 2 * early
            changes = (np.diff(best) != 0).sum(1)
            assert (changes >= 1).sum() >= 15 and (scenario.drift != "sudden" or changes.max() <= 2)


def test_what_is_measured_of_a_model_that_trains_under_one_strategy_alone_is_less_aligned() -> None:
    fair, unfair = (Truth.drawn(SCENARIOS[name], 4) for name in ("measured", "unfair"))
    assert (fair.worth("descent") == unfair.worth("descent")).all()  # it is in measurements only
    at = fair.means(0.3)[0]
    way_D = at[REFERENCE] / np.linalg.norm(at[REFERENCE])
    for alone in (0.0, 0.5, 1.0):
        found = unfair.means(0.3, alone)[0]
        kept = np.where(np.arange(len(STRATEGIES)) == REFERENCE, 1.0, 1 - 0.35 * alone)
        assert found @ way_D == pytest.approx(kept * (at @ way_D), rel=1e-9)
        aside = found - np.outer(found @ way_D, way_D)
        assert aside == pytest.approx(at - np.outer(at @ way_D, way_D), abs=1e-9)


def test_mixing_before_probes_helps_where_they_would_mislead() -> None:
    rule, seeds = AdaptiveRule(), range(48)
    mixed, alone = (
        np.mean([run["total"] for run in simulation.run_scenario("unfair", chosen, seeds)])
        for chosen in (rule, simulation.unmixed(rule))
    )
    assert mixed < alone


def test_worth_and_regret_of_constants() -> None:
    truth = Truth.drawn(SCENARIOS["steady"], 3)
    worth_TC = truth.worth("ca-mse")
    assert worth_TC.max(1) == pytest.approx(np.ones(CELLS)) and (worth_TC > 0).all()
    still = simulation.constants(truth, "ca-mse")
    assert still["best constant"]["total"] == pytest.approx(0)
    assert still["reference"]["total"] == pytest.approx(1 - worth_TC[0, REFERENCE])
    assert 0 < still["mixture"]["total"] < 1


def test_a_run_is_told_in_parts_that_add_up() -> None:
    truth, rule = Truth.drawn(SCENARIOS["slow"], 0), AdaptiveRule(finish=0.1)
    worth_TC, run = truth.worth("descent"), Run()
    best_T = worth_TC.argmax(1)
    run.units_TC[: CELLS // 5] = 1 / len(STRATEGIES)  # mixed, then the best, then the reference
    run.units_TC[np.arange(CELLS // 5, CELLS), best_T[CELLS // 5 :]] = 1.0
    run.units_TC[-CELLS // 10 :] = np.eye(len(STRATEGIES))[REFERENCE]
    run.incumbent_T[CELLS // 5 :] = best_T[CELLS // 5 :]
    run.probes_T[CELLS // 2] = 5.0
    run.changes = [(0.2, 8), (0.3, 7), (0.45, 8), (0.7, 6)]
    found = simulation.told(run, truth, rule, float(CELLS))
    parts = {name: value for name, value in found.items() if name.startswith("part: ")}
    assert found["decisions"] == parts["part: decisions"] == parts["part: exploration"] == 0
    assert parts["part: start"] == pytest.approx((1 - worth_TC[: CELLS // 5]).mean() * 0.2 * CELLS / (CELLS + 5))
    assert parts["part: probes"] == pytest.approx(5 / (CELLS + 5)) and parts["part: finish"] > 0
    assert found["total"] == pytest.approx(sum(parts.values()))
    assert (found["switches"], found["returns"]) == (3, 1) and found["overhead"] == pytest.approx(5 / CELLS)
    assert found["least gap"] == pytest.approx(0.1) and found["shortest return"] == pytest.approx(0.15)


def test_steps_one_by_one_come_to_the_same_as_steps_in_bulk() -> None:
    scenario, rule, budget = SCENARIOS["slow"], AdaptiveRule(overhead=0.2, exploration=0.3), 40e3
    apart = []
    for seed in range(2):
        truth = Truth.drawn(scenario, seed)
        for criterion in simulation.CRITERIA:
            chosen = dataclasses.replace(rule, criterion=criterion)
            one, bulk = (
                simulation.told(
                    simulation.simulate(truth, chosen, seed, budget=budget, every_step=each), truth, chosen, budget
                )
                for each in (True, False)
            )
            assert one["probes"] == bulk["probes"] > 2 and one["overhead"] == bulk["overhead"] <= 0.2
            apart.append(one["part: exploration"] - bulk["part: exploration"])
            apart.append(one["part: start"] - bulk["part: start"])
    assert np.abs(apart).max() < 0.08 and abs(np.mean(apart)) < 0.02


def small_results() -> dict[str, Any]:
    results = simulation.measure(2, AdaptiveRule(), ["steady"])
    assert set(results["scenarios"]) == {"steady"} and set(results["scenarios"]["steady"]) == set(simulation.CRITERIA)
    return results


def test_rows_say_whether_the_bounds_are_kept() -> None:
    results = small_results()
    good = [parse_row(dataclasses.asdict(row), "here") for row in simulation.rows(results)]
    bounds = {row.claim: row.holds for row in good if "of all runs" in row.claim}
    assert len(bounds) == 4 and all(bounds.values())
    assert sum(row.claim.startswith("simulated, steady, ") for row in good) == 2 * len(simulation.CRITERIA)
    bad = copy.deepcopy(results)
    online = bad["scenarios"]["steady"]["ca-mse"]["online"]
    online["overhead"]["most"], online["switches"]["most"] = 0.031, 99
    online["least gap"] = online["shortest return"] = {"least": 0.01, "runs": 1}
    assert not any(row.holds for row in simulation.rows(bad) if "of all runs" in row.claim)


def test_the_row_of_mixing_says_whether_it_helped() -> None:
    results = small_results()
    results["scenarios"] = {"unfair": results["scenarios"]["steady"]}
    entry = results["scenarios"]["unfair"]["descent"]
    for here, holds in ((0.1, True), (-0.1, False)):
        entry["unmixed"] = {"total": {"q50": entry["online"]["total"]["q50"] + here}}
        (row,) = [row for row in simulation.rows(results) if "without mixing before probes" in row.claim]
        assert row.holds == holds and row.value == pytest.approx(-here)


def test_the_same_seeds_meet_the_same_truths_under_any_rule() -> None:
    one = simulation.run_scenario("short", AdaptiveRule(), range(2))
    assert one == simulation.run_scenario("short", AdaptiveRule(), [0, 1])
    other = simulation.run_scenario("short", AdaptiveRule(overhead=0.0), range(2))
    assert all(math.isnan(run["decisions"]) and run["overhead"] == 0 for run in other)

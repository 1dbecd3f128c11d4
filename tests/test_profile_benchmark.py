"""The sample-efficiency study: its estimates from Gram matrices, its races, its count of units, its rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.profile import efficiency, run
from benchmarks.profile import efficiency_study as study
from benchmarks.summary import read_summary, write_summary
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
from schedulers import Grid, Strategy, token_cost
from schedulers.racing import RaceRule

BATCH, P, M = 8, 3000, 24
GRID = Grid({"patch": (8, 24), "dropout": (0, 0.5)}, Strategy(patch=8, dropout=0))
COSTS = study.Costs.of(GRID, 120, 8)
PAPER_GRID = Grid({"patch": (16, 48), "dropout": (0, 0.5)}, Strategy(patch=16, dropout=0))
PAPER_COSTS = study.Costs.paper(PAPER_GRID, 240, 16)
LAYOUT = GroupLayout(("a", "b"), (1000, 2000))


@pytest.fixture(scope="module")
def gradients_CMP() -> torch.Tensor:
    """Four strategies with the same noise and growing bias."""
    random = torch.Generator().manual_seed(0)
    mean_P, bias_P = torch.randn(2, P, generator=random)
    shared_MP = torch.randn(M, P, generator=random)
    own_CMP = torch.randn(4, M, P, generator=random)
    own_CMP[0] = 0
    bias_C = torch.tensor([0, 0.1, 0.5, 2.0])
    return mean_P + bias_C[:, None, None] * bias_P + 3 * shared_MP + 0.5 * own_CMP


@pytest.fixture(scope="module")
def case(gradients_CMP: torch.Tensor) -> study.Case:
    g = gradients_CMP.double()
    sketch = Sketch(LAYOUT, seed=1, device=torch.device("cpu"))
    s = torch.stack([torch.stack([sketch(row).flatten() for row in rows]) for rows in gradients_CMP]).double()
    exact = [torch.einsum("cmp,cnp->cmn", g, other).numpy() for other in (g, g[:1].expand_as(g))]
    sketched = [torch.einsum("cmp,cnp->cmn", s, other).numpy() for other in (s, s[:1].expand_as(s))]
    for own, mixed in zip(exact, sketched, strict=True):
        for c in range(4):
            np.fill_diagonal(mixed[c], np.diagonal(own[c]))
    return study.Case(
        "synthetic", "ca-mse", *exact, *sketched, reference=0, costs=COSTS, paper_costs=PAPER_COSTS, batch_size=BATCH
    )


def test_moments_and_left_out_scores_are_the_librarys(case: study.Case, gradients_CMP: torch.Tensor) -> None:
    draws = study.Draws.shuffled(3, M, 0)
    moments = study.paired_moments(case, draws.weights(0, 10), unbiased=True)
    plugin = study.paired_moments(case, draws.weights(0, 10), unbiased=False)
    (look,) = study.looks_of(case, draws, [10], sketch=True)
    sketch = Sketch(LAYOUT, seed=1, device=torch.device("cpu"))
    for t in range(3):
        streams = []
        for c in range(4):
            stream = GradientStream.empty(LAYOUT, EUCLIDEAN, sketch, torch.zeros(P))
            for m in draws.order_TN[t, :10]:
                g_P, z_P = gradients_CMP[c, m], gradients_CMP[0, m]
                own, both = (inner_products(g_P, other, LAYOUT, EUCLIDEAN) for other in (g_P, z_P))
                square = inner_products(z_P, z_P, LAYOUT, EUCLIDEAN)
                stream.add(int(m), Block(g_P, 1, own, both), Block(z_P, 1, square, square))
            streams.append(stream)
        found = [estimate(stream, streams[0], term_samples=BATCH) for stream in streams]
        for c in range(1, 4):
            total = dict(zip(ESTIMATES, found[c].total_WE[0], strict=True))
            for name, values in moments.items():
                assert values[t, c] == pytest.approx(total[name], rel=1e-4), name
            assert plugin["bias_sq"][t, c] == pytest.approx(total["bias_sq_plugin"], rel=1e-4)
        order = np.argsort(draws.order_TN[t, :10])
        deleted = {name: np.stack([f.deleted_MWE[:, 0, e] for f in found], -1) for e, name in enumerate(ESTIMATES)}
        np.testing.assert_allclose(look.deleted_TNC[t][order], case.score(deleted), rtol=1e-4)


def test_independent_plug_in_is_the_distance_of_two_means(case: study.Case, gradients_CMP: torch.Tensor) -> None:
    draws = study.Draws.shuffled(1, M, 3)
    first, second = draws.order_TN[0, :5], draws.order_TN[0, 5:10]
    moments = study.independent_moments(case, draws.weights(5, 10), draws.weights(0, 5))
    for c in range(1, 4):
        mean_P, reference_P = gradients_CMP[c, first].mean(0), gradients_CMP[0, second].mean(0)
        assert moments["bias_sq"][0, c] == pytest.approx(float((mean_P - reference_P).square().sum()), rel=1e-5)
        assert moments["inner"][0, c] == pytest.approx(float(mean_P @ reference_P), rel=1e-4)
    assert moments["bias_sq"][0, 0] == 0


def test_resampling_counts_a_sub_batch_as_often_as_it_was_drawn(case: study.Case) -> None:
    """Brute force over the drawn list, repeats included; left-out scores leave one draw out, not all repeats."""
    draws = study.Draws(np.array([[3, 3, 5, 3, 7]]), M)
    moments = study.paired_moments(case, draws.weights(0, 5), unbiased=True)
    (look,) = study.looks_of(case, draws, [5], sketch=False)

    def brute_force(drawn: list[int]) -> float:
        pairs = [case.gg_CMM[2, i, j] for a, i in enumerate(drawn) for b, j in enumerate(drawn) if a != b]
        return float(np.mean(pairs))

    assert moments["norm_sq"][0, 2] == pytest.approx(brute_force([3, 3, 5, 3, 7]))
    without = study.Draws(np.array([[3, 5, 3, 7]]), M)
    expected = case.score(study.paired_moments(case, without.weights(0, 4), unbiased=True))
    for position in (0, 1, 3):
        np.testing.assert_allclose(look.deleted_TNC[0, position], expected[0])


def test_the_population_is_the_limit_of_many_draws(case: study.Case) -> None:
    judge = study.Judge.population(case, 2)
    draws = study.Draws.resampled(2, M, 20_000, 0)
    choice_T, bias_sq_TC = study.fixed_allocation(case, draws, study.UNBIASED, 10_000)
    np.testing.assert_allclose(bias_sq_TC, judge.bias_sq_TC, rtol=0.1)
    _, other_TC = study.fixed_allocation(case, draws, study.INDEPENDENT, 10_000)
    np.testing.assert_allclose(other_TC[:, 2:], judge.bias_sq_TC[:, 2:], rtol=0.2)
    assert judge.quality(choice_T)["regret"] < 0.02


def test_the_second_half_judges_without_what_was_drawn(case: study.Case) -> None:
    shuffled = study.Draws.shuffled(4, M, 0)
    assert (shuffled.weights(0, M // 2) * shuffled.weights(M // 2, M)).sum() == 0
    judge = study.Judge.second_half(case, shuffled)
    apart = study.paired_moments(case, shuffled.weights(M // 2, M), unbiased=True)
    np.testing.assert_allclose(judge.apart_TC, case.score(apart))
    assert judge.bias_sq_TC[:, 3] == pytest.approx(np.full(4, 4 * P), rel=0.2)
    assert judge.best != 3 and study.score_errors(case).shape == (4,)


def test_quality_of_right_and_wrong_choices() -> None:
    truth_C = np.array([2.0, 1.0, 1.04, 3.0])
    apart_TC = np.tile(truth_C, (3, 1))
    judge = study.Judge(truth_C, apart_TC, apart_TC, best=1, lower_is_better=True)
    found = judge.quality(np.array([1, 2, 3]))
    assert (found["best"], found["near"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found["regret"] == pytest.approx((0.04 + 2) / 3)
    higher = dataclasses.replace(judge, best=3, lower_is_better=False)
    assert higher.quality(np.array([3, 3, 0]))["regret"] == pytest.approx(1 / 9)


def test_races_drop_what_is_clearly_worse_and_keep_measuring_the_reference(case: study.Case) -> None:
    rule = RaceRule(minimum=4, maximum=12)

    def look(count: int, spread: float) -> study.Look:
        """The reference and the last strategy are clearly worse; the other two differ by 0.01 +- `spread`."""
        score_C = np.array([2.0, 1.0, 1.01, 3.0])
        wiggle_NC = np.zeros((count, 4))
        wiggle_NC[:, 2] = np.where(np.arange(count) % 2, 1, -1) * spread / (count - 1)
        return study.Look(count, score_C[None], (score_C + wiggle_NC)[None])

    assert rule.looks() == [4, 6, 9, 12]
    found = study.race(case, [look(4, 0.5), look(6, 0.5), look(9, 0.01), look(12, 0.01)], rule)
    assert found.count_TC.tolist() == [[9, 9, 9, 4]] and found.decided == 1
    open_to_the_end = study.race(case, [look(count, 0.5) for count in rule.looks()], rule)
    assert open_to_the_end.count_TC.tolist() == [[12, 12, 12, 4]] and open_to_the_end.decided == 0


def test_units_charge_a_key_once_for_each_patch_size() -> None:
    spent = COSTS.spent(np.array([[10.0, 4.0, 2.0, 6.0]]))[0]
    alone = [token_cost("mocov3", 120, 8, strategy) for strategy in GRID.strategies()]
    assert COSTS.total_C == pytest.approx(alone)
    keys = [226 / 226, 26 / 226]
    queries = [3 * count / 226 for count in (226, 113, 26, 13)]
    assert spent == pytest.approx(np.dot(queries, [10, 4, 2, 6]) + 10 * keys[0] + 6 * keys[1])


def test_units_in_the_papers_convention_have_one_key_for_all() -> None:
    assert PAPER_COSTS.total_C.round(2).tolist() == [4.59, 2.87, 1.54, 1.35]  # printed in its Fig. 3
    alone = PAPER_COSTS.spent(np.eye(4)).sum()
    assert alone == pytest.approx(PAPER_COSTS.total_C.sum())
    assert PAPER_COSTS.spent(np.ones((1, 4)))[0] == pytest.approx(alone - 3 * 226 / 197)


def test_rows_are_legal_and_compare_with_the_plug_in(case: study.Case, tmp_path: Path) -> None:
    found = {"run": "mixed", "criterion": "ca-mse", **efficiency.rounded(efficiency.examine(case, 5))}
    results = {
        "device": "some processor",
        "date": "2026-11-22",
        "batch_size": BATCH,
        "units_per_sample_apart": 10.0,
        "cases": [found],
    }
    rows = efficiency.rows(results)
    assert len({row.claim for row in rows}) == len(rows) and all(row.claim.startswith("efficiency: ") for row in rows)
    share = next(row for row in rows if "mean samples per cell of the race" in row.claim)
    race = efficiency.race_by(found["resampled"]["races"], efficiency.CLAIMED[0])
    assert race is not None and race["maximum"] == 256
    assert efficiency.race_by(found["resampled"]["races"], RaceRule(maximum=99)) is None
    assert share.value == pytest.approx(race["samples"] / (256 * BATCH), abs=1e-4)
    (tmp_path / "efficiency.json").write_text(json.dumps(results))
    collected = run.rows_of(tmp_path)
    assert collected == rows
    write_summary(tmp_path / "summary.json", collected)
    assert read_summary(tmp_path / "summary.json") == rows
    assert run.rows_of(tmp_path / "nothing") == []

"""The sample-efficiency study: its estimates from Gram matrices, its races, its count of units, its rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.profile import efficiency_study as study
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
    return study.Case("synthetic", "ca-mse", *exact, *sketched, reference=0, costs=COSTS, batch_size=BATCH)


def test_moments_and_left_out_scores_are_the_librarys(case: study.Case, gradients_CMP: torch.Tensor) -> None:
    draws = study.Draws.of(3, M, 0)
    moments = study.paired_moments(case, draws.weights(0, 10), unbiased=True)
    plugin = study.paired_moments(case, draws.weights(0, 10), unbiased=False)
    (look,) = study.looks_of(case, draws, [10], sketch=True)
    sketch = Sketch(LAYOUT, seed=1, device=torch.device("cpu"))
    for t in range(3):
        streams = []
        for c in range(4):
            stream = GradientStream.empty(LAYOUT, EUCLIDEAN, sketch, torch.zeros(P))
            for m in draws.order_TM[t, :10]:
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
        order = np.argsort(draws.order_TM[t, :10])
        deleted = {name: np.stack([f.deleted_MWE[:, 0, e] for f in found], -1) for e, name in enumerate(ESTIMATES)}
        np.testing.assert_allclose(look.deleted_TNC[t][order], case.score(deleted), rtol=1e-4)


def test_independent_plug_in_is_the_distance_of_two_means(case: study.Case, gradients_CMP: torch.Tensor) -> None:
    draws = study.Draws.of(1, M, 3)
    first, second = draws.order_TM[0, :5], draws.order_TM[0, 5:10]
    moments = study.independent_moments(case, draws.weights(5, 10), draws.weights(0, 5))
    for c in range(1, 4):
        mean_P, reference_P = gradients_CMP[c, first].mean(0), gradients_CMP[0, second].mean(0)
        assert moments["bias_sq"][0, c] == pytest.approx(float((mean_P - reference_P).square().sum()), rel=1e-5)
        assert moments["inner"][0, c] == pytest.approx(float(mean_P @ reference_P), rel=1e-4)
    assert moments["bias_sq"][0, 0] == 0


def test_a_choice_and_its_judge_share_no_sub_batch(case: study.Case) -> None:
    draws = study.Draws.of(5, M, 0)
    assert (draws.weights(0, M // 2) * draws.weights(M // 2, M)).sum() == 0
    apart = {count: study.fixed_allocation(case, draws, "independent plug-in", count)[2] for count in (6, 7)}
    assert apart == {6: True, 7: False}
    assert study.fixed_allocation(case, draws, "unbiased paired", 12)[2]


def test_quality_of_right_and_wrong_choices(case: study.Case) -> None:
    truth_C, nothing = np.array([2.0, 1.0, 1.04, 3.0]), np.zeros(4)
    apart_TC = np.tile(truth_C, (3, 1))
    judge = study.Judge(truth_C, nothing, nothing, 1.0, apart_TC, apart_TC, best=1, lower_is_better=True)
    found = judge.quality(np.array([1, 2, 3]))
    assert (found["best"], found["near"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found["regret"] == pytest.approx((0.04 + 2) / 3)
    higher = dataclasses.replace(judge, best=3, lower_is_better=False)
    assert higher.quality(np.array([3, 3, 0]))["regret"] == pytest.approx(1 / 9)


def test_the_judge_knows_the_bias(case: study.Case) -> None:
    judge = study.Judge.of(case, study.Draws.of(4, M, 0))
    assert judge.bias_sq_C[0] == 0 and np.all(np.diff(judge.bias_sq_C) > 0)
    assert judge.bias_sq_C[3] == pytest.approx(4 * P, rel=0.2)
    assert judge.best != 3 and judge.se_C.shape == (4,) and judge.apart_TC.shape == (4, 4)


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

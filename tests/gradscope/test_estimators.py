"""Estimators against closed forms on Gaussian gradients, and against the formulas written out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from gradscope.estimators import (
    ESTIMATES,
    EUCLIDEAN,
    SKETCH_SIZE,
    Block,
    Estimates,
    GradientStream,
    GroupLayout,
    Metrics,
    Sketch,
    estimate,
    inner_products,
    optimizer_weights,
    second_moment_from,
)

K, M, REPEATS = 4, 24, 1000
LAYOUT = GroupLayout(("a", "b"), (12, 8))


def run(
    g_NP: torch.Tensor,
    z_NP: torch.Tensor,
    *,
    batch_size: int,
    layout: GroupLayout = LAYOUT,
    metrics: Metrics = EUCLIDEAN,
    terms: int = 1,
    independent: bool = True,
) -> Estimates:
    """Estimates from N terms given in sub-batches of `terms`; `batch_size` samples make a term."""
    stream, reference = (empty_stream(layout, metrics) for _ in range(2))
    parts = zip(g_NP.split(terms), z_NP.split(terms), strict=True)
    for m, (g_KP, z_KP) in enumerate(parts):
        z = block(z_KP, z_KP, layout, metrics)
        stream.add(m, block(g_KP, z_KP, layout, metrics), z)
        reference.add(m, z, z)
    return estimate(stream, reference, term_samples=batch_size, independent=independent)


def empty_stream(layout: GroupLayout, metrics: Metrics) -> GradientStream:
    sketch = Sketch(layout, seed=0, device=torch.device("cpu"))
    return GradientStream.empty(layout, metrics, sketch, torch.zeros(layout.total, dtype=torch.float64))


def block(g_KP: torch.Tensor, z_KP: torch.Tensor, layout: GroupLayout, metrics: Metrics) -> Block:
    squares = sum(inner_products(g_P, g_P, layout, metrics) for g_P in g_KP)
    cross = sum(inner_products(g_P, z_P, layout, metrics) for g_P, z_P in zip(g_KP, z_KP, strict=True))
    return Block(g_KP.sum(0), len(g_KP), squares, cross)


@dataclass
class Gaussian:
    """REPEATS experiments of M paired sub-batch gradients with known moments."""

    truth: dict[str, float]
    plugin_excess: float
    values: np.ndarray
    errors: np.ndarray


@pytest.fixture(scope="module")
def gaussian() -> Gaussian:
    """Per-sample gradients g = mu + S e, z = nu + T e + U f with independent standard normal e, f."""
    generator = torch.Generator().manual_seed(7)
    size = LAYOUT.total
    mu, nu = (torch.randn(size, generator=generator) * 0.4 for _ in range(2))
    s, t, u = (torch.randn(size, size, generator=generator) / size**0.5 for _ in range(3))
    truth = {
        "bias_sq": float((mu - nu) @ (mu - nu)),
        "variance": float((s @ s.T).trace()),
        "norm_sq": float(mu @ mu),
        "inner": float(mu @ nu),
        "norm_sq_ref": float(nu @ nu),
    }
    values, errors = [], []
    for _ in range(REPEATS):
        e, f = (torch.randn(M, size, generator=generator) / K**0.5 for _ in range(2))
        found = run(mu + e @ s.T, nu + e @ t.T + f @ u.T, batch_size=K)
        values.append(found.total_WE[0])
        errors.append(found.total_se_WE[0])
    difference_covariance = ((s - t) @ (s - t).T + u @ u.T) / K
    return Gaussian(truth, float(difference_covariance.trace()) / M, np.array(values), np.array(errors))


@pytest.mark.parametrize("name", ["bias_sq", "variance", "norm_sq", "inner", "norm_sq_ref"])
def test_unbiased(gaussian: Gaussian, name: str) -> None:
    values = gaussian.values[:, ESTIMATES.index(name)]
    standard_error = values.std(ddof=1) / REPEATS**0.5
    assert abs(values.mean() - gaussian.truth[name]) < 3 * standard_error


def test_plugin_is_too_large_by_the_noise_of_the_mean_difference(gaussian: Gaussian) -> None:
    values = gaussian.values[:, ESTIMATES.index("bias_sq_plugin")]
    standard_error = values.std(ddof=1) / REPEATS**0.5
    assert abs(values.mean() - gaussian.truth["bias_sq"] - gaussian.plugin_excess) < 3 * standard_error
    assert gaussian.plugin_excess > 15 * standard_error  # the bias is there to be seen


@pytest.mark.parametrize("name", ["bias_sq", "variance", "norm_sq", "inner", "norm_sq_ref"])
def test_standard_errors_cover(gaussian: Gaussian, name: str) -> None:
    column = ESTIMATES.index(name)
    off = np.abs(gaussian.values[:, column] - gaussian.truth[name])
    assert 0.90 <= (off < 1.96 * gaussian.errors[:, column]).mean() <= 0.98


def test_estimates_equal_the_formulas_written_out() -> None:
    generator = torch.Generator().manual_seed(1)
    g, z = (torch.randn(6, 20, generator=generator) for _ in range(2))
    weights = torch.rand(20, generator=generator) + 0.1
    found = run(g, z, batch_size=K, metrics=Metrics({"euclidean": None, "optimizer": weights}))
    g64, z64 = g.double().numpy(), z.double().numpy()
    for w, weight in enumerate((np.ones(20), weights.double().numpy())):
        for i, part in enumerate((slice(0, 12), slice(12, 20))):
            a, b, c = g64[:, part], z64[:, part], weight[part]
            d, m = a - b, 6
            spread = lambda x, y: (c * (x - x.mean(0)) * (y - y.mean(0))).sum()  # noqa: B023, E731
            expected = [
                (c * d.mean(0) ** 2).sum() - spread(d, d) / (m * (m - 1)),
                (c * d.mean(0) ** 2).sum(),
                K / (m - 1) * spread(a, a),
                (c * a.mean(0) ** 2).sum() - spread(a, a) / (m * (m - 1)),
                (c * a.mean(0) * b.mean(0)).sum() - spread(a, b) / (m * (m - 1)),
                (c * b.mean(0) ** 2).sum() - spread(b, b) / (m * (m - 1)),
            ]
            np.testing.assert_allclose(found.groups_WGE[w, i], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.total_WE, found.groups_WGE.sum(1))


def test_jackknife_is_the_estimator_with_each_replicate_left_out() -> None:
    generator = torch.Generator().manual_seed(2)
    g, z = (torch.randn(7, 20, generator=generator) for _ in range(2))
    found = run(g, z, batch_size=K)
    rows = [[i for i in range(7) if i != m] for m in range(7)]
    left_out = np.array([run(g[r], z[r], batch_size=K).total_WE[0] for r in rows])
    centred = left_out - left_out.mean(0)
    np.testing.assert_allclose(found.covariance_WEE[0], 6 / 7 * centred.T @ centred, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("independent", [True, False])
def test_jackknife_of_blocks_of_terms_leaves_out_whole_blocks(independent: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    g, z = (torch.randn(15, 20, generator=generator) for _ in range(2))
    found = run(g, z, batch_size=1, terms=3, independent=independent)
    rows = [[i for i in range(15) if i // 3 != m] for m in range(5)]
    left_out = [run(g[r], z[r], batch_size=1, terms=3, independent=independent).total_WE for r in rows]
    np.testing.assert_allclose(found.deleted_MWE, left_out, rtol=1e-4, atol=1e-6)


def test_terms_that_come_in_blocks_give_what_single_terms_give() -> None:
    generator = torch.Generator().manual_seed(3)
    g, z = (torch.randn(12, 20, generator=generator) for _ in range(2))
    single, blocks = run(g, z, batch_size=1), run(g, z, batch_size=1, terms=4)
    np.testing.assert_allclose(blocks.total_WE, single.total_WE, rtol=1e-5)
    assert (blocks.blocks, blocks.samples) == (3, 12)


@pytest.mark.parametrize("independent", [True, False])
def test_terms_that_share_something_random_are_paired_between_blocks_only(independent: bool) -> None:
    """g = mu + e + h, z = nu + e' + h with h common to the block: within-block pairs add |h|^2 to every product."""
    generator = torch.Generator().manual_seed(11)
    size, terms = LAYOUT.total, 4
    mu, nu = (torch.randn(size, generator=generator) * 0.3 for _ in range(2))
    values = []
    for _ in range(800):
        h = torch.randn(8, 1, size, generator=generator).expand(8, terms, size).reshape(-1, size)
        e, f = (torch.randn(8 * terms, size, generator=generator) for _ in range(2))
        values.append(run(mu + e + h, nu + f + h, batch_size=1, terms=terms, independent=independent).total_WE[0])
    found, se = np.mean(values, 0), np.std(values, 0) / len(values) ** 0.5
    truth = {"norm_sq": mu @ mu, "inner": mu @ nu, "norm_sq_ref": nu @ nu, "variance": torch.tensor(2.0 * size)}
    off = {name: (found - float(v))[i] / se[i] for name, v in truth.items() for i in [ESTIMATES.index(name)]}
    if independent:
        assert off["norm_sq"] > 10 and off["inner"] > 10 and off["variance"] < -10
    else:
        assert max(map(abs, off.values())) < 3.5, off
    bias = ESTIMATES.index("bias_sq")
    assert abs(found[bias] - float((mu - nu) @ (mu - nu))) < 3.5 * se[bias]  # h cancels in the difference


def test_the_reference_has_no_bias_at_all() -> None:
    stream = empty_stream(LAYOUT, EUCLIDEAN)
    for m, z_P in enumerate(torch.randn(5, 20)):
        one = block(z_P[None], z_P[None], LAYOUT, EUCLIDEAN)
        stream.add(m, one, one)
    found = estimate(stream, stream, term_samples=K)
    assert found.total_WE[0, ESTIMATES.index("bias_sq")] == 0
    assert found.total_se_WE[0, ESTIMATES.index("bias_sq")] == 0
    assert found.total_WE[0, ESTIMATES.index("inner")] == found.total_WE[0, ESTIMATES.index("norm_sq_ref")]


def test_sketch_keeps_inner_products_on_average() -> None:
    layout = GroupLayout(("all",), (5000,))
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(5000, generator=generator)
    b = 0.5 * a + torch.randn(5000, generator=generator)
    exact = float(a.double() @ b.double())
    found = [
        float((s(a) * s(b)).sum()) for s in (Sketch(layout, seed=i, device=torch.device("cpu")) for i in range(400))
    ]
    assert abs(np.mean(found) - exact) < 3 * np.std(found) / 20
    assert np.std(found) < 2 * (float(a @ a) * float(b @ b)) ** 0.5 * (2 / SKETCH_SIZE) ** 0.5


def test_too_few_or_unpaired_replicates_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        run(torch.ones(1, 20), torch.ones(1, 20), batch_size=K)
    two = run(torch.randn(2, 20), torch.randn(2, 20), batch_size=K)
    assert np.isnan(two.total_se_WE).all() and np.isfinite(two.total_WE).all()


def test_optimizer_metric_weights() -> None:
    torch.testing.assert_close(optimizer_weights(torch.tensor([4.0, 0.25])), torch.tensor([0.5, 2.0]))
    gradients = [torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, 3.0])]
    moment = second_moment_from(gradients, GroupLayout(("x", "y"), (2, 1)))
    torch.testing.assert_close(moment, torch.tensor([0.75, 0.25, 9.0]))

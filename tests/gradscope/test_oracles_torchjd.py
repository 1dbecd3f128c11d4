"""Per-anchor InfoNCE against TorchJD, the one oracle that takes losses which mix samples: the Gramian of all terms.

The accelerated and the reference terms are stacked in one vector, so that one Gramian holds every product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradscope.untouched import untouched
from tests.gradscope.oracle_cases import (
    LIGHT,
    InfoNCETask,
    PooledViT,
    SupervisedTask,
    blocks,
    check_close,
    make_engine,
    mlp,
    moments,
)


@pytest.fixture(scope="module")
def gramian() -> Callable[..., np.ndarray[Any, Any]]:
    """(task, model, batches) -> <g_i, g_j> over the strategy's terms of all batches, then the reference's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        autogram = pytest.importorskip("torchjd.autogram", reason="torchjd is not installed (make venv installs it)")

    def compute(task: InfoNCETask, model: nn.Module, batches: Any) -> np.ndarray[Any, Any]:
        with untouched(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # fused attention under vmap
            engine = autogram.Engine(model, batch_dim=None)
            losses = [
                task.sample_losses(model, batch, strategy, torch.Generator())
                for strategy in (LIGHT, task.grid.reference)
                for batch in batches
            ]
            return engine.compute_gramian(torch.cat(losses)).detach().numpy()

    return compute


CASES = {"mlp": (mlp, (6,)), "vit": (PooledViT, (1, 8, 8))}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_norms_and_products_of_terms(gramian: Any, case: str, dtype: torch.dtype, tolerance: float) -> None:
    task = InfoNCETask(*CASES[case], dtype)
    model = task.load()
    batch, count = next(task.batches(8, 4)), 8
    reference, block = blocks(make_engine("per-sample-fast", task, model), model, batch, LIGHT)
    gram = gramian(task, model, [batch])
    ours, both, theirs = gram[:count, :count], gram[:count, count:], gram[count:, count:]
    check_close(block.squares_WG.sum(), ours.trace(), tolerance)
    check_close(reference.squares_WG.sum(), theirs.trace(), tolerance)
    check_close(block.cross_WG.sum(), both.trace(), tolerance)
    check_close(float(block.sum_P.square().sum()), ours.sum(), tolerance)
    check_close(float(block.sum_P @ reference.sum_P), both.sum(), tolerance)


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_moments_from_the_gramian(gramian: Any, case: str, independent: bool) -> None:
    """Covariance trace and debiased squares, over all pairs of terms or only those of different sub-batches."""
    task = InfoNCETask(*CASES[case])
    task.independent_terms = independent
    model, size, count = task.load(), 4, 12
    batches = [next(task.batches(size, seed)) for seed in range(3)]
    found = moments(make_engine("per-sample-fast", task, model), model, task, batches)
    gram = gramian(task, model, batches)
    ours, both, theirs = gram[:count, :count], gram[:count, count:], gram[count:, count:]
    block = np.arange(count) // size
    pairs = ~np.eye(count, dtype=bool) if independent else block[:, None] != block
    bias = ours - both - both.T + theirs
    expected = {
        "bias_sq": bias[pairs].mean(),
        "bias_sq_plugin": bias.mean(),
        "variance": ours.trace() / count - ours[pairs].mean(),
        "norm_sq": ours[pairs].mean(),
        "inner": both[pairs].mean(),
        "norm_sq_ref": theirs[pairs].mean(),
    }
    for name, value in expected.items():
        check_close(found[name], value, 1e-8)
    if independent:  # the debiasing of gradients in pairs: |mean d|^2 less the trace of their covariance over n
        trace = (bias.trace() / count - bias.mean()) * count / (count - 1)
        check_close(found["bias_sq"], bias.mean() - trace / count, 1e-8)


def test_terms_of_one_sample_by_the_slow_engine(gramian: Any) -> None:
    """Without negatives the Gramian holds for vmap of grad, too."""
    task = SupervisedTask(PooledViT, (1, 8, 8))
    model = task.load()
    batch, count = next(task.batches(8, 4)), 8
    reference, block = blocks(make_engine("per-sample", task, model), model, batch, LIGHT)
    gram = gramian(task, model, [batch])
    check_close(block.squares_WG.sum(), gram[:count, :count].trace(), 1e-8)
    check_close(reference.squares_WG.sum(), gram[count:, count:].trace(), 1e-8)
    check_close(block.cross_WG.sum(), gram[:count, count:].trace(), 1e-8)

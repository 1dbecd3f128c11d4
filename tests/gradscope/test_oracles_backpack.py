"""Squares, norms and the trace of the covariance against BackPACK, on a perceptron and a convolutional network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.gradscope.oracle_cases import (
    CASES,
    ENGINES,
    LIGHT,
    SupervisedTask,
    blocks,
    check_close,
    make_engine,
    moments,
)

REFERENCE = SupervisedTask.grid.reference


@pytest.fixture(scope="module", autouse=True)
def backpack() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports only: a layer that it misses is told by a warning
        module = pytest.importorskip("backpack", reason="backpack is not installed (make venv installs it)")
        pytest.importorskip("backpack.extensions")
    yield module


def quantities(backpack: Any, task: SupervisedTask, batch: Any, strategy: Any) -> list[Any]:
    """Parameters of a fresh copy of the model with BackPACK's `batch_l2`, `sum_grad_squared`, `variance`.

    With a mean loss these are of g_i / K; the variance is that of the population.
    """
    kinds = backpack.extensions
    model = backpack.extend(task.load())
    with backpack.backpack(kinds.BatchL2Grad(), kinds.SumGradSquared(), kinds.Variance()):
        nn.CrossEntropyLoss()(model(task.inputs(batch[0], strategy)), batch[1]).backward()
    return list(model.parameters())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("case", ["mlp", "cnn"])
def test_squares_and_norms(backpack: Any, case: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    task = SupervisedTask(*CASES[case], dtype)
    model = task.load()
    batch, count = next(task.batches(8, 4)), 8
    engine = make_engine(name, task, model)
    reference, block = blocks(engine, model, batch, LIGHT)
    for found, strategy in ((reference, REFERENCE), (block, LIGHT)):
        parameters = quantities(backpack, task, batch, strategy)
        check_close(found.squares_WG[0], [count**2 * float(p.sum_grad_squared.sum()) for p in parameters], tolerance)
        check_close(found.squares_WG[0], [count**2 * float(p.batch_l2.sum()) for p in parameters], tolerance)
        check_close(found.sum_P / count, torch.cat([p.grad.flatten() for p in parameters]), tolerance)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("case", ["mlp", "cnn"])
def test_variance_is_the_trace_of_the_covariance(backpack: Any, case: str, name: str) -> None:
    """Of all the samples, though the engine sees them as sub-batches of four."""
    task = SupervisedTask(*CASES[case])
    model, count = task.load(), 12
    x, y = next(task.batches(count, 4))
    engine = make_engine(name, task, model)
    found = moments(engine, model, task, [(x[i : i + 4], y[i : i + 4]) for i in range(0, count, 4)])
    parameters = quantities(backpack, task, (x, y), LIGHT)
    trace = count**3 / (count - 1) * sum(float(p.variance.sum()) for p in parameters)
    mean_sq = sum(float(p.grad.square().sum()) for p in parameters)
    check_close(found["variance"], trace, 1e-8)
    check_close(found["norm_sq"], mean_sq - trace / count, 1e-8)
    assert np.isfinite(list(found.values())).all()

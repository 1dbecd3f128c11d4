"""Per-sample gradients and norms against Opacus: its hooks, and its ghost norms."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscope.untouched import untouched
from tests.gradscope.oracle_cases import (
    CASES,
    ENGINES,
    LIGHT,
    SupervisedTask,
    blocks,
    check_close,
    make_engine,
    mlp,
    products,
)

REFERENCE = SupervisedTask.grid.reference
REASON = "opacus is not installed (make venv installs it)"


@pytest.fixture(scope="module", autouse=True)
def opacus() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports and of torch's shims that it imports
        yield pytest.importorskip("opacus.grad_sample", reason=REASON)


def by_hooks(opacus: Any, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Opacus' gradient of every sample's loss, (K, *shape) per parameter; its hooks are removed again."""
    wrapped = opacus.GradSampleModule(model.train(), loss_reduction="mean")
    F.cross_entropy(wrapped(x), y).backward()
    gradients = {name: p.grad_sample.clone() for name, p in model.named_parameters()}
    wrapped.to_standard_module()
    model.zero_grad()
    return gradients


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_squares_products_and_sums_are_those_of_the_hooks(
    opacus: Any, case: str, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    task = SupervisedTask(*CASES[case], dtype)
    model = task.load()
    x, y = next(task.batches(8, 4))
    engine = make_engine(name, task, model)
    reference, block = blocks(engine, model, (x, y), LIGHT)
    z, g = (by_hooks(opacus, model, task.inputs(x, strategy), y) for strategy in (REFERENCE, LIGHT))
    check_close(reference.squares_WG[0], products(z, z), tolerance)
    check_close(block.squares_WG[0], products(g, g), tolerance)
    check_close(block.cross_WG[0], products(g, z), tolerance)
    check_close(block.sum_P, engine.parameters.flatten({n: v.sum(0) for n, v in g.items()}), tolerance)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_every_gradient_is_that_of_the_hooks(opacus: Any) -> None:
    task = SupervisedTask(*CASES["vit"])
    model = task.load()
    x, y = next(task.batches(8, 4))
    engine = make_engine("per-sample", task, model)
    with untouched(model):
        (found,) = engine.gradients((x, y), REFERENCE, seed=0)
    expected = by_hooks(opacus, model, x, y)
    assert found.keys() == expected.keys()
    for key in found:
        # the key's bias shifts all of a query's scores alike: its gradient is rounding on both sides
        if not key.endswith("attn.k.bias"):
            check_close(found[key], expected[key], 1e-8)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ENGINES)
def test_norms_are_the_ghost_norms(opacus: Any, name: str) -> None:
    """Opacus never forms these gradients: norms from activations and back-propagated signals (linear layers)."""
    utils = pytest.importorskip("opacus.grad_sample.utils", reason=REASON)
    task = SupervisedTask(mlp, (6,))
    model = task.load()
    x, y = next(task.batches(8, 4))
    engine = make_engine(name, task, model)
    found = [blocks(engine, model, (x[i : i + 1], y[i : i + 1]), LIGHT)[0].squares_WG.sum() for i in range(len(x))]
    ghost = utils.wrap_model(model, "ghost", max_grad_norm=1.0)
    F.cross_entropy(ghost(x), y).backward()
    check_close(found, np.square(ghost.get_norm_sample().detach().numpy()), 1e-8)

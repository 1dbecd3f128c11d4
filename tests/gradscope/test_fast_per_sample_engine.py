"""The fast per-sample engine: metrics, groups and pairs against a loop of autograd, and the engine's contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscope import Grid, Strategy, Task
from gradscope.engines import FlatParameters
from gradscope.engines.fast import FastPerSampleEngine
from gradscope.errors import NonFiniteError, TaskError
from gradscope.estimators import EUCLIDEAN, Metrics, inner_products
from gradscope.models import VisionTransformer, ViTSize, random_keep

K = 5


class VisionTask(Task):
    """A small ViT classifier with dropout layers; axes for patches, dropped tokens and a skipped second head."""

    grid = Grid(
        {"patch": (4, 8), "dropout": (0, 0.5), "head": ("both", "one")}, Strategy(patch=4, dropout=0, head="both")
    )
    batch_size = K

    def __init__(self, dtype: torch.dtype = torch.float64, width: int = 24) -> None:
        self.dtype, self.width = dtype, width

    def load(self, checkpoint: Path) -> nn.Module:
        torch.manual_seed(0)
        backbone = VisionTransformer(ViTSize(self.width, 2, 2), image_size=16, patch=4)
        nn.init.normal_(backbone.cls_token)
        heads = [nn.Linear(self.width, 7), nn.Linear(self.width, 7)]
        return nn.ModuleDict({"backbone": backbone, "drop": nn.Dropout(0.2), "a": heads[0], "b": heads[1]}).to(
            self.dtype
        )

    def batches(self, size: int, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(size, 3, 16, 16, generator=generator, dtype=self.dtype)
            yield {"x": x, "y": torch.arange(size) % 7}

    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        x, patch = batch["x"], int(strategy.number("patch"))
        keep = None
        if strategy.number("dropout"):
            keep = random_keep(len(x), (16 // patch) ** 2, strategy.number("dropout"), generator, x.device)
        feature = model["drop"](model["backbone"](x, patch=patch, keep_BK=keep))
        losses = F.cross_entropy(model["a"](feature), batch["y"], reduction="none")
        if strategy["head"] == "both":
            losses = losses + model["b"](feature).square().mean(1)
        return losses

    def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        return self.sample_losses(model, batch, strategy, generator).mean()

    def cost(self, strategy: Strategy) -> float:
        return 3.0


REFERENCE = VisionTask.grid.reference
STRATEGIES = [REFERENCE, Strategy(patch=8, dropout=0.5, head="both"), Strategy(patch=8, dropout=0, head="one")]


def rows_by_loop(task: Task, engine: FastPerSampleEngine, batch: Any, strategy: Strategy, seed: int) -> Tensor:
    """g_i of every sample: (K, P)."""
    torch.manual_seed(seed)
    losses = task.sample_losses(engine.model, batch, strategy, torch.Generator().manual_seed(seed))
    parameters = engine.parameters
    rows = []
    for term in losses:
        found = torch.autograd.grad(term, parameters.tensors, retain_graph=True, allow_unused=True)
        pairs = zip(parameters.names, parameters.tensors, found, strict=True)
        rows.append(parameters.flatten({n: torch.zeros_like(p) if g is None else g for n, p, g in pairs}))
    return torch.stack(rows)


def metrics_for(parameters: FlatParameters, names: str) -> Metrics:
    if names == "euclidean":
        return EUCLIDEAN
    weights_P = torch.rand(parameters.layout.total, generator=torch.Generator().manual_seed(4), dtype=parameters.dtype)
    return Metrics({"euclidean": None, "optimizer": weights_P * 3})


def make(names: str, **options: Any) -> tuple[VisionTask, FastPerSampleEngine]:
    task = VisionTask(**options)
    model = task.load(Path("step-1.pt"))
    parameters = FlatParameters.of(task, model)
    return task, FastPerSampleEngine(task, model, parameters, metrics_for(parameters, names))


@pytest.mark.parametrize("names", ["euclidean", "both"])
@pytest.mark.parametrize(("options", "tolerance"), [({}, 1e-8), ({"dtype": torch.float32, "width": 64}, 1e-5)])
def test_sums_squares_and_pairs_agree_with_a_loop(names: str, options: dict[str, Any], tolerance: float) -> None:
    task, engine = make(names, **options)
    layout, metrics = engine.parameters.layout, engine.metrics
    for seed, batch in zip((3, 4), task.batches(K, 0), strict=False):
        z_KP = rows_by_loop(task, engine, batch, REFERENCE, seed)
        reference = engine.reference(batch, seed=seed)
        for strategy in STRATEGIES:
            g_KP = rows_by_loop(task, engine, batch, strategy, seed)
            block = engine.block(batch, strategy, seed=seed, reference=reference)
            assert block.terms == K and block.sum_P.dtype == engine.parameters.dtype
            torch.testing.assert_close(
                block.sum_P, g_KP.sum(0), rtol=tolerance, atol=tolerance * float(g_KP.abs().max())
            )
            squares_WG = sum(inner_products(g, g, layout, metrics) for g in g_KP)
            cross_WG = sum(inner_products(g, z, layout, metrics) for g, z in zip(g_KP, z_KP, strict=True))
            np.testing.assert_allclose(block.squares_WG, squares_WG, rtol=tolerance)
            scale_WG = np.sqrt(squares_WG * reference.block.squares_WG)  # of an inner product that may cancel
            assert (np.abs(block.cross_WG - cross_WG) <= tolerance * scale_WG).all()
        np.testing.assert_array_equal(reference.block.cross_WG, reference.block.squares_WG)
    assert set(engine.methods.values()) <= {"gram", "direct", "reduced"} and not engine.reasons


def test_large_weights_go_one_sample_at_a_time() -> None:
    """The way that is taken from 32,768 numbers on, also with what the reference kept in either form."""
    torch.manual_seed(0)

    class Wide(VisionTask):
        def load(self, checkpoint: Path) -> nn.Module:
            torch.manual_seed(0)
            body = nn.Sequential(nn.Linear(48, 192), nn.Tanh(), nn.Linear(192, 192), nn.Tanh(), nn.Linear(192, 7))
            return body.double()

        def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
            tokens = batch["x"].reshape(len(batch["x"]), -1, 48)
            tokens = tokens[:, ::2] if strategy["patch"] == 8 else tokens.repeat(1, self.width, 1)
            return F.cross_entropy(model(tokens).mean(1), batch["y"], reduction="none")

    for repeats in (1, 3, 9):  # 16, 48 and 144 positions
        for names in ("euclidean", "both"):
            task = Wide(width=repeats)
            model = task.load(Path("step-1.pt"))
            parameters = FlatParameters.of(task, model)
            engine = FastPerSampleEngine(task, model, parameters, metrics_for(parameters, names))
            batch = next(task.batches(K, 0))
            reference = engine.reference(batch, seed=0)
            z_KP = rows_by_loop(task, engine, batch, REFERENCE, 0)
            for strategy in (REFERENCE, Strategy(patch=8, dropout=0, head="both")):
                g_KP = rows_by_loop(task, engine, batch, strategy, 0)
                block = engine.block(batch, strategy, seed=0, reference=reference)
                pairs = zip(g_KP, z_KP, strict=True)
                cross_WG = sum(inner_products(g, z, parameters.layout, engine.metrics) for g, z in pairs)
                squares_WG = sum(inner_products(g, g, parameters.layout, engine.metrics) for g in g_KP)
                np.testing.assert_allclose(block.cross_WG, cross_WG, rtol=1e-8)
                np.testing.assert_allclose(block.squares_WG, squares_WG, rtol=1e-8)
                torch.testing.assert_close(block.sum_P, g_KP.sum(0))


def test_the_same_seed_repeats_and_another_differs() -> None:
    task, engine = make("euclidean")
    batch = next(task.batches(K, 0))
    reference = engine.reference(batch, seed=0)
    strategy = STRATEGIES[1]
    first, again, other = (engine.block(batch, strategy, seed=s, reference=reference).sum_P for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_bf16_keeps_float32_statistics_near_the_true_ones() -> None:
    task = VisionTask(torch.float32)
    model = task.load(Path("step-1.pt"))
    parameters = FlatParameters.of(task, model)
    exact = FastPerSampleEngine(task, model, parameters)
    rounded = FastPerSampleEngine(task, model, parameters, precision="bf16")
    batch = next(task.batches(K, 0))
    true, found = (engine.reference(batch, seed=0).block for engine in (exact, rounded))
    assert found.sum_P.dtype == torch.float32 and not rounded.reasons
    np.testing.assert_allclose(found.squares_WG.sum(), true.squares_WG.sum(), rtol=0.05)


def test_a_parameter_that_the_reference_does_not_reach_is_named() -> None:
    task = VisionTask()
    model = task.load(Path("step-1.pt"))
    model.register_parameter("spare", nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    engine = FastPerSampleEngine(task, model, FlatParameters.of(task, model))
    with pytest.raises(TaskError, match=r"'spare' receives no gradient.*frozen"):
        engine.reference(next(task.batches(K, 0)), seed=0)


def test_a_loss_that_is_not_finite_is_named_with_its_strategy() -> None:
    task, engine = make("euclidean")
    batch = next(task.batches(K, 0))
    batch["x"][2] = float("nan")
    with pytest.raises(NonFiniteError, match="loss of sample 2 is nan under patch=4"):
        engine.reference(batch, seed=0)


def test_buffers_and_gradients_are_put_back() -> None:
    class Normalised(VisionTask):
        def load(self, checkpoint: Path) -> nn.Module:
            return nn.Sequential(nn.BatchNorm1d(48, affine=False), nn.Linear(48, 7)).double()

        def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
            return F.cross_entropy(model(batch["x"].reshape(K, -1)[:, :48]), batch["y"], reduction="none")

    task = Normalised()
    model = task.load(Path("step-1.pt"))
    engine = FastPerSampleEngine(task, model, FlatParameters.of(task, model))
    model[1].weight.grad = torch.ones_like(model[1].weight)
    engine.reference(next(task.batches(K, 0)), seed=0)  # the data are normalised, which no parameter sees
    assert torch.equal(model[0].running_mean, torch.zeros(48, dtype=torch.float64))
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight)) and model[1].bias.grad is None

"""Models and tasks on which per-sample gradients are compared with other people's code.

The grids have an axis `light` that reads half of the inputs, so that a cheaper gradient exists and nothing is
random; every parameter is a group of its own, so that the engines report each parameter's squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscope import Grid, Strategy, Task
from gradscope.engines import Engine, FlatParameters
from gradscope.engines.fast import FastPerSampleEngine
from gradscope.engines.per_sample import PerSampleEngine
from gradscope.estimators import Block, GradientStream, Metrics, Sketch, estimate
from gradscope.untouched import untouched

LIGHT = Strategy(light="yes")


class SupervisedTask(Task):
    """Cross-entropy of a classifier; `shape` of one input, in `dtype`."""

    grid = Grid({"light": ("no", "yes")}, Strategy(light="no"))
    batch_size = 8
    classes = 4

    def __init__(self, make: Callable[[], nn.Module], shape: Sequence[int], dtype: torch.dtype = torch.float64) -> None:
        self.make, self.shape, self.dtype = make, tuple(shape), dtype

    def load(self, checkpoint: Path = Path("step-1.pt")) -> nn.Module:
        torch.manual_seed(3)
        model = self.make().to(self.dtype)
        with torch.no_grad():  # zeros and ones of a fresh model would hide mistakes
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(size, *self.shape, generator=generator, dtype=torch.float64).to(self.dtype)
            yield x, torch.randint(0, self.classes, (size,), generator=generator)

    def inputs(self, x: Tensor, strategy: Strategy) -> Tensor:
        """The inputs under `strategy`: with `light`, every second entry of the last dimension is hidden."""
        return x * (torch.arange(x.shape[-1]) % 2) if strategy["light"] == "yes" else x

    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(self.inputs(x, strategy)), y, reduction="none")

    def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        return self.sample_losses(model, batch, strategy, generator).mean()

    def cost(self, strategy: Strategy) -> float:
        return 3.0 if strategy["light"] == "no" else 1.5

    def param_groups(self, model: nn.Module) -> Mapping[str, Sequence[str]]:
        return {name: [name] for name, p in model.named_parameters() if p.requires_grad and name not in self.frozen}


class InfoNCETask(SupervisedTask):
    """Per-anchor InfoNCE: the model's features against constant keys of the whole sub-batch, one positive each."""

    independent_terms = False
    temperature = 0.5

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, _ in super().batches(size, seed):
            generator = torch.Generator().manual_seed(seed + 1)
            yield x, torch.randn(size, 4, generator=generator, dtype=torch.float64).to(self.dtype)

    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        x, keys = batch
        query = F.normalize(model(self.inputs(x, strategy)), dim=1)
        logits = query @ F.normalize(keys, dim=1).T / self.temperature
        return F.cross_entropy(logits, torch.arange(len(x)), reduction="none")


class Attention(nn.Module):
    """Self-attention of two heads from separate projections, as every oracle can read it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TokenBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PooledViT(nn.Module):
    """ViT of modules only (convolution, norms, linear layers; mean pooling, no bare parameter), 8 x 8 images."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, stride=4)
        self.blocks = nn.Sequential(*(TokenBlock(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.blocks(self.patch(images).flatten(2).transpose(1, 2))
        return self.head(self.norm(tokens).mean(1))


class BareViT(PooledViT):
    """With class token, position table and layer scale as bare parameters, a block used twice and a tied weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width, depth=1)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 5, width))
        self.scale = nn.Parameter(torch.ones(width))
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.blocks[0].attn.q.weight

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.pos_embed
        tokens = self.blocks(self.blocks(tokens)) * self.scale
        return self.head(self.norm(self.tied(tokens[:, 0])))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Sigmoid(), nn.Linear(7, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, (2, 6, 6)),
    "vit": (PooledViT, (1, 8, 8)),
}


ENGINES = {"per-sample": lambda: PerSampleEngine, "per-sample-fast": lambda: FastPerSampleEngine}


def make_engine(name: str, task: Task, model: nn.Module, metrics: Metrics | None = None, **options: Any) -> Any:
    parameters = FlatParameters.of(task, model)
    return ENGINES[name]()(task, model, parameters, *([] if metrics is None else [metrics]), **options)


def blocks(engine: Engine, model: nn.Module, batch: Any, strategy: Strategy, seed: int = 5) -> tuple[Block, Block]:
    """The reference's block and the strategy's, paired by the same seed."""
    with untouched(model):
        reference = engine.reference(batch, seed=seed)
        return reference.block, engine.block(batch, strategy, seed=seed, reference=reference)


def moments(engine: Any, model: nn.Module, task: Task, batches: Sequence[Any]) -> dict[str, float]:
    """Euclidean totals of the strategy LIGHT over sub-batches, by name of the estimate."""
    from gradscope.estimators import ESTIMATES

    layout, metrics = engine.parameters.layout, engine.metrics
    sketch = Sketch(layout, seed=0, device=torch.device("cpu"))
    zeros = torch.zeros(layout.total, dtype=engine.parameters.dtype)
    ours, theirs = (GradientStream.empty(layout, metrics, sketch, zeros.clone()) for _ in range(2))
    for m, batch in enumerate(batches):
        reference, block = blocks(engine, model, batch, LIGHT)
        theirs.add(m, reference, reference)
        ours.add(m, block, reference)
    found = estimate(ours, theirs, term_samples=1, independent=task.independent_terms)
    return dict(zip(ESTIMATES, found.total_WE[0].tolist(), strict=True))


def loop(task: Task, model: nn.Module, batch: Any, strategy: Strategy, seed: int = 5) -> dict[str, Tensor]:
    """Gradients of every loss term of the whole sub-batch by plain autograd, one at a time: (K, *shape) by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in task.frozen}
    with untouched(model):
        torch.manual_seed(seed)
        losses = task.sample_losses(model, batch, strategy, torch.Generator().manual_seed(seed))
        rows = [torch.autograd.grad(one, list(named.values()), retain_graph=True) for one in losses]
    return {name: torch.stack(column) for name, column in zip(named, zip(*rows, strict=True), strict=True)}


def products(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> np.ndarray[Any, Any]:
    """Sum over samples of <a_i, b_i>, per parameter, in float64."""
    return np.array([float((a[name].double() * b[name].double()).sum()) for name in a])


def check_close(found: Any, expected: Any, tolerance: float) -> None:
    """Relative error of arrays below `tolerance`, the largest entry setting the scale."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2g}"

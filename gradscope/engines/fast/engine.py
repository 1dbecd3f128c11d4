"""The fast per-sample engine: norms, sums and inner products of K gradients from one backward pass.

What it reports is the gradient of loss term i, defined where term i depends on sample i alone, given constants that
carry no gradient (design section 3). Never are K x P gradients formed: a linear layer's come from its input and the
signal at its output, either as a Gram product or a few at a time in a buffer that stays in the cache (Goodfellow
2015; Li et al. 2021 for sequences), with the ordinary weight gradient falling out beside; normalisations, biases,
class tokens and position tables are small. The modules beside this one: `taps` sees the uses of a parameter,
`rules` knows the operations, `terms` and `moments` compute, `passes` decides and checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope.engines.contract import Reference
from gradscope.engines.fast.moments import Moments
from gradscope.engines.fast.passes import Passes
from gradscope.engines.fast.terms import Part
from gradscope.engines.flat import FlatParameters, seed_streams
from gradscope.engines.subbatch import autocast, no_gradient
from gradscope.errors import NonFiniteError, TaskError
from gradscope.estimators import EUCLIDEAN, Array, Block, Metrics, out_of_range
from gradscope.task import Task
from gradscope.untouched import buffer_guard
from schedulers import Strategy


class FastPerSampleEngine:
    """Moments of the gradients of the task's loss terms; buffers, `.grad` and `requires_grad` are put back.

    On the first sub-batch of every strategy, for about one pass more, it is found out where the samples lie in every
    signal, and terms that mix samples are refused; the first strategy to use the parameters in one way pays about
    three passes to have the results held against autograd's.
    """

    name = "per-sample-fast"

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        parameters: FlatParameters,
        metrics: Metrics = EUCLIDEAN,
        precision: str = "float32",
    ) -> None:
        self.task, self.model, self.parameters = task, model, parameters
        self.metrics, self.precision = metrics, precision
        self._restore_buffers = buffer_guard(model)
        named = dict(zip(parameters.names, parameters.tensors, strict=True))
        half = precision == "bf16" or parameters.half
        self._passes = Passes(model, named, _weights_by_parameter(parameters, metrics), half=half)
        self._methods: dict[str, str] = {}
        groups = np.repeat(np.arange(len(parameters.layout.sizes)), _members(parameters))
        self._group_of = dict(zip(parameters.names, groups.tolist(), strict=True))

    def reference(self, batch: Any, *, seed: int) -> Reference:
        samples, found = self._moments(batch, self.task.grid.reference, seed, keep=True)
        for name in self.parameters.names:
            if name not in found:
                raise no_gradient(name)
        block = self._block(samples, found, self.task.grid.reference)
        block = Block(block.sum_P, samples, block.squares_WG, block.squares_WG)
        return Reference(block, {name: m.kept for name, m in found.items() if m.kept is not None})

    def block(self, batch: Any, strategy: Strategy, *, seed: int, reference: Reference) -> Block:
        samples, found = self._moments(batch, strategy, seed, other=reference.kept)
        if samples != reference.block.terms:
            raise TaskError(f"sample_losses gives {samples} terms under {strategy}, {reference.block.terms} before")
        return self._block(samples, found, strategy)

    @property
    def methods(self) -> Mapping[str, str]:
        """How each parameter's gradients were last found: gram, direct, reduced or loop."""
        return dict(self._methods)

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why parameters are differentiated sample by sample (`loop`), where some are."""
        return self._passes.reasons

    def _moments(
        self, batch: Any, strategy: Strategy, seed: int, *, keep: bool = False, other: Mapping[str, Part] | None = None
    ) -> tuple[int, dict[str, Moments]]:
        def losses(batch: Any) -> Tensor:
            self._restore_buffers()
            seed_streams(seed)
            with autocast(self.precision, self.parameters.device):
                return self.task.sample_losses(self.model, batch, strategy, torch.Generator().manual_seed(seed))

        try:
            samples, found = self._passes.run(losses, batch, key=strategy, keep=keep, other=other)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} under {strategy}") from error
        finally:
            self._restore_buffers()
        self._methods.update({name: m.method for name, m in found.items()})
        return samples, found

    def _block(self, samples: int, found: Mapping[str, Moments], strategy: Strategy) -> Block:
        parameters = self.parameters
        named = {
            name: found[name].total_P if name in found else torch.zeros_like(p).flatten()
            for name, p in zip(parameters.names, parameters.tensors, strict=True)
        }
        sum_P = parameters.flatten(named)
        if not torch.isfinite(sum_P).all():
            raise NonFiniteError(f"the gradient is not finite under {strategy}")
        squares = self._by_group({n: m.squares_WK for n, m in found.items()})
        cross = self._by_group({n: m.cross_WK for n, m in found.items() if m.cross_WK is not None})
        if sum_P.dtype != torch.float64 and sum_P.any():
            for square, weight in zip(squares.sum(1), self.metrics.weights.values(), strict=True):
                if out_of_range(square, samples * len(sum_P), weight is not None) or not np.isfinite(cross).all():
                    size = float(sum_P.double().norm()) / samples
                    raise NonFiniteError(
                        f"float32 does not hold the squares of the gradient under {strategy}, of norm {size:.1g}; use "
                        "--estimator subbatch, or scale the loss"
                    )
        return Block(sum_P, samples, squares, cross)

    def _by_group(self, by_parameter: Mapping[str, Tensor]) -> Array:
        """Sums over samples and over the parameters of a group: (W, G) float64."""
        groups_WG = np.zeros((len(self.metrics.names), len(self.parameters.layout.names)))
        if by_parameter:
            sums_NW = torch.stack([values_WK.sum(1) for values_WK in by_parameter.values()]).cpu().numpy()
            np.add.at(groups_WG.T, [self._group_of[name] for name in by_parameter], sums_NW)
        return groups_WG


@dataclass(frozen=True)
class PerSampleMoments:
    """Of K loss terms: `sums` of their gradients by parameter, squared norms (K) of each parameter's, and how."""

    sums: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    methods: Mapping[str, str]

    @property
    def squares_K(self) -> Tensor:
        """|g_i|^2 over all parameters, float64."""
        return torch.stack(list(self.squares.values())).sum(0)


def per_sample_moments(model: nn.Module, losses: Callable[[Any], Tensor], batch: Any) -> PerSampleMoments:
    """Sum and squared norms of the gradients of `losses(batch)`, one loss per sample (K), by trainable parameter.

    `batch`: a nest of tensors with K rows, which `losses` hands to `model`; it is called several times and must
    repeat itself (fixed dropout). Raises TaskError where a term depends on other samples. The model is left as it
    was, its random streams aside.
    """
    return PerSampleStream(model)(losses, batch)


class PerSampleStream:
    """`per_sample_moments` for many batches: what is found out on the first holds for those alike."""

    def __init__(self, model: nn.Module) -> None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._restore = buffer_guard(model)
        self._passes = Passes(model, parameters, {name: [None] for name in parameters})

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why parameters are differentiated sample by sample (`loop`), where some are."""
        return self._passes.reasons

    def __call__(self, losses: Callable[[Any], Tensor], batch: Any) -> PerSampleMoments:
        def repeatable(batch: Any) -> Tensor:
            self._restore()
            return losses(batch)

        try:
            samples, found = self._passes.run(repeatable, batch)
        finally:
            self._restore()
        del samples
        return PerSampleMoments(
            {n: m.total_P.view_as(self._passes.parameters[n]) for n, m in found.items()},
            {n: m.squares_WK[0] for n, m in found.items()},
            {n: m.method for n, m in found.items()},
        )


def _weights_by_parameter(parameters: FlatParameters, metrics: Metrics) -> dict[str, list[Tensor | None]]:
    sizes = [p.numel() for p in parameters.tensors]
    pieces = [
        [None] * len(sizes) if w is None else list(torch.split(w.to(parameters.device, parameters.dtype), sizes))
        for w in metrics.weights.values()
    ]
    return {name: [metric[i] for metric in pieces] for i, name in enumerate(parameters.names)}


def _members(parameters: FlatParameters) -> list[int]:
    """How many parameters each group has."""
    counts, at = [], 0
    sizes = [p.numel() for p in parameters.tensors]
    for total in parameters.layout.sizes:
        start, held = at, 0
        while held < total:
            held += sizes[at]
            at += 1
        counts.append(at - start)
    return counts

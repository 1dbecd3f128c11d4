"""The per-sample engine: `torch.func`'s vmap of grad over the samples of a sub-batch.

Its terms are the gradients of the K losses that `Task.sample_losses` returns, each computed from a batch of
one sample. That is the gradient of loss term i only where term i depends on sample i alone; where it does not
(keys of other samples as negatives, BatchNorm), the engine refuses. Everything is exact and nothing depends on
the kind of a layer, so the engine is also the yardstick of the fast one.

Attention runs through the math kernel inside this engine only: the fused kernels have no batched backward
pass, and torch would run them sample by sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradscope.engines._samples import check_shape, losses_of, sample_tensors, take, with_samples
from gradscope.engines.contract import Reference
from gradscope.engines.coupling import coupled_modules
from gradscope.engines.fast.terms import wide
from gradscope.engines.flat import FlatParameters, derive_seed, seed_streams
from gradscope.engines.subbatch import autocast, no_gradient
from gradscope.errors import GradscopeError, NonFiniteError, TaskError
from gradscope.estimators import EUCLIDEAN, Array, Block, Metrics, out_of_range
from gradscope.task import Task
from gradscope.untouched import buffer_guard
from schedulers import Strategy

PROBE = 8  # samples of the check that a term depends on its own sample alone
TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2  # of the largest loss: what batching may change by rounding

Gradients = dict[str, Tensor]  # per parameter name, (terms, *shape of the parameter)


@dataclass(frozen=True)
class _Kept:
    """How to have the reference's per-sample gradients again: themselves where they fit, and their seed."""

    gradients: Gradients | None
    seed: int


class PerSampleEngine:
    """Gradients of the K loss terms of a sub-batch, in chunks of as many samples as fit the byte budget.

    `memory`: bytes for the gradients of one chunk (chunk x P values), and again as many for the reference's
    that they are paired with. A constant, not what the machine has free: with another one, random draws differ.
    `randomness`: "different" has every sample draw its own mask or noise, "same" has all of a chunk share
    one. Each chunk is seeded anew from (seed, number of the chunk), so a strategy and the reference given one
    seed draw the same numbers wherever they draw alike (common random numbers), on every machine.
    """

    name = "per-sample"

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        parameters: FlatParameters,
        metrics: Metrics = EUCLIDEAN,
        precision: str = "float32",
        *,
        memory: int = 1 << 30,
        randomness: Literal["different", "same"] = "different",
    ) -> None:
        self.task, self.model, self.parameters = task, model, parameters
        self.metrics, self.precision, self.randomness = metrics, precision, randomness
        self.tolerance = TOLERANCE_HALF if precision == "bf16" or parameters.half else TOLERANCE
        self.chunk = max(1, memory // (parameters.layout.total * parameters.dtype.itemsize))
        self._losses = _SampleLosses(task, model)
        self._restore_buffers = buffer_guard(model)
        self._checked: set[Strategy] = set()

    def reference(self, batch: Any, *, seed: int) -> Reference:
        strategy = self.task.grid.reference
        self.check(batch, strategy, seed=seed)
        sums, kept = _Sums(self.parameters, self.metrics), None
        for gradients in self.gradients(batch, strategy, seed=seed):
            sums.add(gradients, gradients)
            kept = gradients
        whole = sums.terms <= self.chunk  # then one chunk held them all
        return Reference(sums.block(strategy), _Kept(kept if whole else None, seed))

    def block(self, batch: Any, strategy: Strategy, *, seed: int, reference: Reference) -> Block:
        self.check(batch, strategy, seed=seed)
        kept: _Kept = reference.kept
        again = (
            self.gradients(batch, self.task.grid.reference, seed=kept.seed)
            if kept.gradients is None
            else iter([kept.gradients])
        )
        sums = _Sums(self.parameters, self.metrics)
        for gradients, reference_gradients in zip(self.gradients(batch, strategy, seed=seed), again, strict=True):
            sums.add(gradients, reference_gradients)
        return sums.block(strategy)

    def gradients(self, batch: Any, strategy: Strategy, *, seed: int) -> Iterator[Gradients]:
        """Per-sample gradients, chunk by chunk: name -> (chunk, *shape), in the dtype of the parameter."""
        count = len(sample_tensors(batch)[0])
        for number, start in enumerate(range(0, count, self.chunk)):
            part = take(batch, slice(start, start + self.chunk))
            gradients, losses = self._vmapped(part, strategy, derive_seed(seed, number) if number else seed)
            finite = torch.isfinite(losses)
            if not finite.all():
                i = int(finite.logical_not().nonzero()[0])
                raise NonFiniteError(f"the loss of sample {start + i} is {losses[i].item()} under {strategy}")
            yield gradients

    def check(self, batch: Any, strategy: Strategy, *, seed: int) -> None:
        """Raise TaskError unless a loss term is what its sample alone gives, and every parameter has a gradient.

        Done once per strategy, on the first few samples. A term must keep its value when another sample is
        exchanged; and where nothing is random (two seeds agree) it must have it in a batch of one, too.
        """
        if strategy in self._checked:
            return
        few = take(batch, slice(PROBE))
        with autocast(self.precision, self.parameters.device), sdpa_kernel(SDPBackend.MATH):
            losses = losses_of(self.task, self.model, few, strategy, seed=seed)
            try:
                self._check_reached(losses, strategy)
            finally:
                self._restore_buffers()
            count = len(losses)
            exchanged = self._plain(take(few, torch.arange(count).clamp(max=max(count - 2, 0))), strategy, seed)
            other = self._plain(few, strategy, seed + 1)
        losses = losses.detach()
        _, alone = self._vmapped(take(few, slice(self.chunk)), strategy, seed)
        if not torch.isfinite(losses).all():
            return  # told by `gradients`
        self._compare(losses[:-1], exchanged[:-1])
        if self._same(losses, other):
            self._compare(losses[: len(alone)], alone)
        self._checked.add(strategy)

    @torch.no_grad()
    def _plain(self, batch: Any, strategy: Strategy, seed: int) -> Tensor:
        try:
            return losses_of(self.task, self.model, batch, strategy, seed=seed)
        finally:
            self._restore_buffers()

    def _check_reached(self, losses: Tensor, strategy: Strategy) -> None:
        """torch.func gives zeros where no gradient arrives, so plain autograd has to tell."""
        if strategy != self.task.grid.reference:
            return
        if not losses.requires_grad:
            raise TaskError("sample_losses carries no gradient; compute it from the model's trainable parameters")
        gradients = torch.autograd.grad(losses.sum(), self.parameters.tensors, allow_unused=True)
        for name, gradient in zip(self.parameters.names, gradients, strict=True):
            if gradient is None:
                raise no_gradient(name)

    def _same(self, a: Tensor, b: Tensor) -> bool:
        return len(a) == 0 or bool((a - b).abs().max() <= self.tolerance * torch.maximum(a.abs(), b.abs()).max())

    def _compare(self, losses: Tensor, others: Tensor) -> None:
        if not self._same(losses, others):
            i = int((losses - others).abs().argmax())
            modules = "".join(f" (module {name!r}: {why})" for name, why in coupled_modules(self.model)[:1])
            raise TaskError(
                f"loss term {i} depends on the other samples of the sub-batch{modules}, so the per-sample engine "
                "cannot compute it from one sample; use --estimator per-sample-fast if what they give is constant "
                "(keys, a teacher's outputs), else --estimator subbatch"
            )

    def _vmapped(self, batch: Any, strategy: Strategy, seed: int) -> tuple[Gradients, Tensor]:
        """Gradients (K, *shape) and losses (K) of every sample alone; errors of torch.func become TaskError."""
        parameters = {
            f"model.{n}": p.detach() for n, p in zip(self.parameters.names, self.parameters.tensors, strict=True)
        }
        generator = torch.Generator().manual_seed(seed)
        seed_streams(seed)

        def loss(parameters: dict[str, Tensor], samples: list[Tensor]) -> Tensor:
            one = with_samples(batch, [sample[None] for sample in samples])
            found: Tensor = torch.func.functional_call(self._losses, parameters, (one, strategy, generator))
            check_shape(found, 1)
            return found[0]

        each = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0), randomness=self.randomness)
        try:
            # Without no_grad, parameters that are not asked for would have an outer graph built for them.
            with torch.no_grad(), autocast(self.precision, self.parameters.device), sdpa_kernel(SDPBackend.MATH):
                gradients, losses = each(parameters, sample_tensors(batch))
        except (GradscopeError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            raise self._refusal(error) from error
        finally:
            self._restore_buffers()
        return {name.removeprefix("model."): gradient for name, gradient in gradients.items()}, losses.detach()

    def _refusal(self, error: Exception) -> TaskError:
        """What torch.func cannot transform, in one line, with the cure."""
        text = str(error).strip()
        first = f"raises {type(error).__name__}: {text.splitlines()[0][:200] if text else 'without a message'}"
        cause = next((cause for sign, cause in CAUSES if sign in text), f"{first}, though it runs without torch.func")
        modules = "".join(f" (module {name!r}: {why})" for name, why in coupled_modules(self.model)[:1])
        return TaskError(
            f"the per-sample engine (torch.func) cannot run sample_losses: it {cause}{modules}; change that, or use "
            "--estimator per-sample-fast or --estimator subbatch"
        )


# What torch.func's messages mean, by a part of them (torch 2.13).
CAUSES = (
    ("calling .item()", "reads a number out of a tensor (.item(), or a branch that depends on a tensor)"),
    ("dynamic shape", "makes a tensor whose shape depends on values (a boolean mask, nonzero, unique)"),
    ("doesn't have storage", "reads the memory of a tensor (.numpy(), .tolist())"),
    ("saved tensor hooks", "uses saved-tensor hooks (activation checkpointing)"),
    ("setup_context", "uses an autograd.Function without setup_context (reentrant checkpointing is one)"),
    (
        "inplace randomness",
        "draws random numbers in place (normal_, bernoulli_) instead of by torch.randn and the like",
    ),
    ("requires_grad_()", "calls requires_grad_() on a tensor"),
    (
        "expected scalar type",
        "mixes precisions where torch cannot batch it (bf16 layer_norm on a CPU: --precision float32)",
    ),
    ("in-place operation", "changes in place a tensor that all samples share"),
    ("updated in place", "changes in place a tensor that all samples share"),
    ("broadcast shape", "changes in place a tensor that all samples share"),
)


class _SampleLosses(nn.Module):
    """The task's losses as the forward of a module, which is what `functional_call` gives other parameters to."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.task, self.model = task, model

    def forward(self, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        return self.task.sample_losses(self.model, batch, strategy, generator)


class _Sums:
    """Sums over terms, from per-sample gradients g_i and the reference's z_i, a chunk at a time."""

    def __init__(self, parameters: FlatParameters, metrics: Metrics) -> None:
        self.parameters, self.terms = parameters, 0
        shape = (len(metrics.names), len(parameters.layout.names))
        self.squares_WG, self.cross_WG = np.zeros(shape), np.zeros(shape)
        self.sum_P = torch.zeros(parameters.layout.total, dtype=parameters.dtype, device=parameters.device)
        sizes = [tensor.numel() for tensor in parameters.tensors]
        ends = np.cumsum(parameters.layout.sizes)
        self.groups = np.searchsorted(ends, np.cumsum(sizes))  # a parameter's group
        self.weights = [None if w is None else torch.split(w, sizes) for w in metrics.weights.values()]

    def add(self, gradients: Gradients, reference: Gradients) -> None:
        """Take in a chunk; products in at least float32 (float64 out of its range), their sums in float64."""
        names = self.parameters.names
        self.terms += len(gradients[names[0]])
        self.sum_P += self.parameters.flatten({name: wide(gradients[name]).sum(0) for name in names})
        for i, (name, group) in enumerate(zip(names, self.groups, strict=True)):
            g_KV, z_KV = wide(gradients[name]).flatten(1), wide(reference[name]).flatten(1)
            self.squares_WG[:, group] += self._products(g_KV, g_KV, i)
            self.cross_WG[:, group] += self._products(g_KV, z_KV, i)

    def _products(self, a_KV: Tensor, b_KV: Tensor, i: int) -> Array:
        def sums(product_KV: Tensor) -> Array:
            weighted = [product_KV if w is None else product_KV * w[i] for w in self.weights]
            return np.array([product.sum(dtype=torch.float64).item() for product in weighted])

        found_W = sums(a_KV * b_KV)
        lost = (out_of_range(v, a_KV.numel(), w is not None) for v, w in zip(found_W, self.weights, strict=True))
        return sums(a_KV.double() * b_KV.double()) if a_KV.dtype != torch.float64 and any(lost) else found_W

    def block(self, strategy: Strategy) -> Block:
        """The sums as a Block; NonFiniteError when a gradient was not finite."""
        if not (np.isfinite(self.squares_WG).all() and torch.isfinite(self.sum_P).all()):
            raise NonFiniteError(f"the gradient is not finite under {strategy}")
        return Block(self.sum_P, self.terms, self.squares_WG, self.cross_WG)

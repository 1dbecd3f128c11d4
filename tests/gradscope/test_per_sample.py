"""The per-sample engine against plain autograd loops, its promises, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradscope import Strategy
from gradscope.engines import FlatParameters
from gradscope.engines.per_sample import PerSampleEngine
from gradscope.errors import NonFiniteError, TaskError
from gradscope.estimators import Metrics
from gradscope.models import random_keep
from gradscope.untouched import untouched
from tests.gradscope.oracle_cases import (
    CASES,
    LIGHT,
    BareViT,
    InfoNCETask,
    SupervisedTask,
    blocks,
    check_close,
    loop,
    make_engine,
    mlp,
    products,
)

REFERENCE = SupervisedTask.grid.reference
MODELS = {**CASES, "bare parameters": (BareViT, (1, 8, 8))}


def make(task: SupervisedTask | None = None, **options: Any) -> tuple[SupervisedTask, nn.Module, Any, PerSampleEngine]:
    task = task or SupervisedTask(mlp, (6,))
    model = task.load()
    engine = PerSampleEngine(task, model, FlatParameters.of(task, model), **options)
    return task, model, next(task.batches(task.batch_size, 0)), engine


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [3, 8])
@pytest.mark.parametrize("case", MODELS)
def test_sums_squares_and_products_are_those_of_a_loop(
    case: str, chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    task = SupervisedTask(*MODELS[case], dtype)
    model = task.load()
    batch = next(task.batches(8, 1))
    parameters = FlatParameters.of(task, model)
    weights_P = torch.rand(parameters.layout.total, generator=torch.Generator().manual_seed(2)).to(dtype)
    metrics = Metrics({"euclidean": None, "weighted": weights_P})
    engine = PerSampleEngine(task, model, parameters, metrics, memory=chunk * parameters.layout.total * dtype.itemsize)
    assert engine.chunk == chunk
    reference, block = blocks(engine, model, batch, LIGHT)
    z, g = (loop(task, model, batch, strategy) for strategy in (REFERENCE, LIGHT))
    sizes = [p.numel() for p in parameters.tensors]
    by_name = dict(zip(parameters.names, weights_P.split(sizes), strict=True))
    for found, a, b in (
        (reference.squares_WG, z, z), (reference.cross_WG, z, z), (block.squares_WG, g, g), (block.cross_WG, g, z)
    ):  # fmt: skip
        weighted = {name: value * by_name[name].view(value.shape[1:]) for name, value in a.items()}
        check_close(found, [products(a, b), products(weighted, b)], tolerance)
    assert reference.terms == block.terms == 8
    assert block.sum_P.dtype == dtype
    check_close(block.sum_P, parameters.flatten({name: value.sum(0) for name, value in g.items()}), tolerance)
    check_close(reference.sum_P, parameters.flatten({name: value.sum(0) for name, value in z.items()}), tolerance)


class MaskedTask(SupervisedTask):
    """Token dropout by the generator, a dropout layer by torch's own stream."""

    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        x, y = batch
        keep = random_keep(len(x), 6, 0.5, generator, x.device)
        return F.cross_entropy(model(x * torch.zeros_like(x).scatter(1, keep, 1)), y, reduction="none")


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 4))


def test_every_sample_draws_a_mask_of_its_own_from_the_seed() -> None:
    """In one chunk the task's generator gives the draws of a whole sub-batch."""
    task, model, batch, engine = make(MaskedTask(mlp, (6,)))
    reference, _ = blocks(engine, model, batch, LIGHT)
    z = loop(task, model, batch, REFERENCE)
    check_close(reference.squares_WG, [products(z, z)], 1e-10)


@pytest.mark.parametrize("chunk", [3, 8])
def test_the_same_seed_pairs_a_strategy_with_the_reference(chunk: int) -> None:
    task = MaskedTask(dropping, (6,))
    model = task.load()
    memory = chunk * 8 * sum(p.numel() for p in model.parameters())
    _, _, batch, _ = make(task)
    engine = make_engine("per-sample", task, model, memory=memory)
    with untouched(model):
        first, again, other = (engine.reference(batch, seed=s) for s in (1, 1, 2))
        paired = engine.block(batch, REFERENCE, seed=1, reference=first)
    assert torch.equal(first.block.sum_P, again.block.sum_P)
    assert not torch.equal(first.block.sum_P, other.block.sum_P)
    np.testing.assert_array_equal(paired.cross_WG, paired.squares_WG)


def test_samples_may_be_made_to_share_their_draws() -> None:
    _task, model, (x, y), engine = make(MaskedTask(dropping, (6,)), randomness="same")
    engine.check = lambda *_, **__: None  # type: ignore[method-assign]
    with untouched(model):
        gradients = next(engine.gradients((x[:1].expand(8, -1), y[:1].expand(8)), REFERENCE, seed=1))
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, gradient[:1].expand_as(gradient))


def test_batches_are_nested_and_leaves_of_other_lengths_pass_through() -> None:
    class Nested(SupervisedTask):
        def batches(self, size: int, seed: int) -> Iterator[Any]:
            for x, y in super().batches(size, seed):
                yield {"views": [x, (y, "label")], "scale": torch.full((3,), 2.0, dtype=x.dtype), "none": None}

        def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
            (x, (y, text)), scale = batch["views"], batch["scale"]
            assert text == "label" and batch["none"] is None and scale.shape == (3,)
            return F.cross_entropy(model(x), y, reduction="none") * scale.sum()

    task, model, batch, engine = make(Nested(mlp, (6,)))
    reference, _ = blocks(engine, model, batch, LIGHT)
    z = loop(task, model, batch, REFERENCE)
    check_close(reference.squares_WG, [products(z, z)], 1e-10)


def test_bfloat16_changes_the_passes_and_not_the_statistics() -> None:
    task = SupervisedTask(*CASES["cnn"], torch.float32)
    found = {}
    for precision in ("float32", "bf16"):
        _, model, batch, engine = make(task, precision=precision)
        found[precision], _ = blocks(engine, model, batch, LIGHT)
    assert found["bf16"].sum_P.dtype == torch.float32 and found["bf16"].squares_WG.dtype == np.float64
    check_close(found["bf16"].squares_WG, found["float32"].squares_WG, 0.05)
    assert not np.array_equal(found["bf16"].squares_WG, found["float32"].squares_WG)


def test_groups_of_several_parameters_add_up() -> None:
    task = SupervisedTask(mlp, (6,))
    single, _ = blocks(make(task)[3], *make(task)[1:3], LIGHT)
    task.param_groups = lambda model: {
        "biases": ["4.bias", "0.bias"],
        "rest": ["2.bias", "0.weight", "2.weight", "4.weight"],
    }  # type: ignore[method-assign]
    grouped, _ = blocks(make(task)[3], *make(task)[1:3], LIGHT)
    squares = dict(
        zip(FlatParameters.of(SupervisedTask(mlp, (6,)), make(task)[1]).names, single.squares_WG[0], strict=True)
    )
    biases = squares["0.bias"] + squares["4.bias"]
    check_close(grouped.squares_WG[0], [biases, sum(squares.values()) - biases], 1e-12)


def test_frozen_parameters_have_no_part() -> None:
    task = SupervisedTask(mlp, (6,))
    task.frozen = ("0.weight", "0.bias")
    task, model, batch, engine = make(task)
    reference, _ = blocks(engine, model, batch, LIGHT)
    z = loop(task, model, batch, REFERENCE)
    check_close(reference.squares_WG, [products(z, z)], 1e-10)


class Counting(nn.Module):
    """Keeps a running mean of what it sees, as a centre does: outside the loss, but inside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = mlp()
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
        return self.layer(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails: bool) -> None:
    task, model, batch, engine = make(SupervisedTask(Counting, (6,)))
    if fails:
        task.sample_losses = lambda *_: model(batch[0]).sum(1) * model(batch[0]).sum().item()  # type: ignore[method-assign]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    flash = torch.backends.cuda.flash_sdp_enabled()
    random_state = torch.get_rng_state()
    try:
        blocks(engine, model, batch, LIGHT)
    except TaskError:
        assert fails
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert objects == {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    assert attributes == [sorted(vars(module)) for module in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.backends.cuda.flash_sdp_enabled() == flash


class OldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def in_place(x: Tensor) -> Tensor:
    shared = torch.zeros(4, dtype=x.dtype)
    shared += x[0]
    return x + 0 * shared


UNSUPPORTED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "item": (lambda x: x * x.abs().max().clamp(1, 1).item(), "reads a number out of a tensor"),
    "branch": (lambda x: x if x.shape[0] and (x == x).all() else -x, "a branch that depends on a tensor"),
    "mask": (lambda x: x[x == x].view_as(x), "shape depends on values"),
    "numpy": (lambda x: x + 0 * float(x.detach().numpy().sum()), "reads the memory of a tensor"),
    "checkpoint": (lambda x: checkpoint(torch.tanh, x, use_reentrant=False), "activation checkpointing"),
    "function": (OldFunction.apply, "without setup_context"),
    "in place": (in_place, "changes in place a tensor that all samples share"),
    "noise in place": (lambda x: x + torch.empty(4, dtype=x.dtype).normal_(), r"draws random numbers in place"),
    "requires_grad": (lambda x: x.add(0).requires_grad_() * 1, r"calls requires_grad_\(\)"),
    "squeeze": (lambda x: x.squeeze().unsqueeze(1).squeeze(1), "raises .*: .*, though it runs without torch.func"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_torch_func_cannot_run_is_refused_with_cause_and_cure(case: str) -> None:
    function, cause = UNSUPPORTED[case]

    class Odd(SupervisedTask):
        def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
            return F.cross_entropy(function(model(batch[0])), batch[1], reduction="none")

    _task, model, batch, engine = make(Odd(mlp, (6,)))
    message = (
        rf"^the per-sample engine \(torch.func\) cannot run sample_losses: it .*{cause}.*--estimator per-sample-fast"
    )
    with untouched(model), pytest.raises(TaskError, match=message):
        engine.reference(batch, seed=0)


def test_negatives_from_the_batch_are_refused_with_the_fast_engine_as_the_cure() -> None:
    _task, model, batch, engine = make(InfoNCETask(mlp, (6,)))
    with untouched(model), pytest.raises(TaskError, match=r"loss term \d depends on the other .*per-sample-fast if"):
        engine.reference(batch, seed=0)


def test_dependence_is_found_behind_random_draws_too() -> None:
    class Noisy(InfoNCETask):
        def inputs(self, x: Tensor, strategy: Strategy) -> Tensor:
            return x + torch.randn(x.shape, dtype=x.dtype)

    _task, model, batch, engine = make(Noisy(mlp, (6,)))
    with untouched(model), pytest.raises(TaskError, match="depends on the other samples"):
        engine.reference(batch, seed=0)


def test_a_term_that_depends_on_the_size_of_the_batch_is_refused() -> None:
    class Summed(SupervisedTask):
        def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
            return super().sample_losses(model, batch, strategy, generator) / len(batch[0])

    _task, model, batch, engine = make(Summed(mlp, (6,)))
    with untouched(model), pytest.raises(TaskError, match="depends on the other samples"):
        engine.reference(batch, seed=0)


@pytest.mark.parametrize("track", [True, False])
def test_batch_statistics_are_refused_by_the_name_of_the_module(track: bool) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=track), nn.Flatten(), nn.Linear(64, 4)
        )

    _task, model, batch, engine = make(SupervisedTask(normed, (1, 6, 6)))
    with untouched(model), pytest.raises(TaskError, match=r"module '1': BatchNorm2d in training mode normalises"):
        engine.reference(batch, seed=0)


def test_batch_norm_in_evaluation_mode_is_a_layer_like_others() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).eval()

    task, model, batch, engine = make(SupervisedTask(normed, (6,)))
    reference, _ = blocks(engine, model, batch, LIGHT)
    z = loop(task, model, batch, REFERENCE)
    check_close(reference.squares_WG, [products(z, z)], 1e-10)


def test_a_parameter_without_gradient_is_named() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spare = mlp(), nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    _task, model, batch, engine = make(SupervisedTask(Spare, (6,)))
    with untouched(model), pytest.raises(TaskError, match=r"'spare' receives no gradient.*frozen"):
        engine.reference(batch, seed=0)


def test_losses_that_are_no_finite_terms_are_refused() -> None:
    class Odd(SupervisedTask):
        change: Callable[[Tensor], Any]

        def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
            return self.change(super().sample_losses(model, batch, strategy, generator))

    changes: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
        (lambda losses: losses * float("nan"), NonFiniteError, "the loss of sample 0 is nan under light=no"),
        (lambda losses: torch.sqrt(losses - losses.detach()), NonFiniteError, "gradient is not finite under light=no"),
        (torch.mean, TaskError, r"shape \(\) for 8 samples; return one loss per sample, \(8,\)"),
        (torch.Tensor.tolist, TaskError, "sample_losses returned list"),
        (torch.Tensor.detach, TaskError, "carries no gradient"),
    ]
    for change, error, message in changes:
        task, model, batch, engine = make(Odd(mlp, (6,)))
        task.change = change
        with untouched(model), pytest.raises(error, match=message):
            engine.reference(batch, seed=0)
    with untouched(model), pytest.raises(TaskError, match="the batch, a str, holds no tensor"):
        engine.reference("batch", seed=0)


def test_two_engines_on_one_model_do_not_disturb_each_other() -> None:
    task, model, batch, engine = make()
    first, _ = blocks(engine, model, batch, LIGHT)
    second, _ = blocks(PerSampleEngine(task, model, engine.parameters), model, batch, LIGHT)
    again, _ = blocks(engine, model, batch, LIGHT)
    assert torch.equal(first.sum_P, second.sum_P) and torch.equal(first.sum_P, again.sum_P)

"""What couples samples is found and named, and the choice of an engine says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscope import Strategy
from gradscope.engines import FlatParameters
from gradscope.engines.choose import choose_engine
from gradscope.engines.coupling import check_uncoupled, coupled_modules, find_coupling
from gradscope.engines.fast import FastPerSampleEngine
from gradscope.engines.subbatch import SubBatchEngine
from gradscope.errors import TaskError, UsageError
from gradscope.task import Task
from tests.gradscope.oracle_cases import CASES, BareViT, InfoNCETask, PooledViT, SupervisedTask, mlp

REFERENCE = SupervisedTask.grid.reference


class TwoSidedTask(SupervisedTask):
    """SimCLR's loss on two views: an anchor's positive is the other view, its negatives the other images' views."""

    stacked = True

    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        x, _ = batch
        views = (x, x.flip(1))
        z = model(torch.cat(views)) if self.stacked else torch.cat([model(view) for view in views])
        z = F.normalize(z, dim=1)
        logits = (z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
        positives = torch.arange(len(z)).roll(len(x))
        return F.cross_entropy(logits, positives, reduction="none").view(2, -1).mean(0)


class OneSidedTask(TwoSidedTask):
    stacked = False


class FirstViewTask(SupervisedTask):
    """Negatives with gradient among the first views only; the second view, computed later, gives the positive."""

    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        first, second = model(batch[0]), model(batch[0].flip(1))
        return (first @ first.T).logsumexp(1) - (first * second).sum(1)


class WithoutTerms(SupervisedTask):
    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        raise NotImplementedError("no terms")

    def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


class Centred(nn.Module):
    """Subtracts the batch's mean: coupling that no list of types knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class TokensFirst(nn.Module):
    """Mixes along (tokens, samples, width), with twice as many tokens as the probe has samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(1, 4), nn.Linear(6, 6), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.T[:, :, None])  # (6, B, 4)
        return self.head(self.mix(tokens.transpose(0, 2)).mean(2).T)


class Momentum(nn.Module):
    """A trained encoder and a frozen one with BatchNorm in training mode, whose keys are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.query = mlp()
        self.key = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).requires_grad_(False)


class MomentumTask(SupervisedTask):
    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        x = self.inputs(batch[0], strategy)
        with torch.no_grad():
            keys = model.key(x)
        return F.cross_entropy(model.query(x) @ keys.T, torch.arange(len(x)), reduction="none")


def normed(norm: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, 4))


COUPLED: dict[str, tuple[Task, str]] = {
    "batch norm": (
        SupervisedTask(normed(nn.BatchNorm1d(5)), (6,)),
        r"module '1' couples.*BatchNorm1d in training mode",
    ),
    "batch norm without running statistics": (
        SupervisedTask(lambda: normed(nn.BatchNorm1d(5, track_running_stats=False))().eval(), (6,)),
        r"module '1' couples the samples: BatchNorm1d without running statistics.*GroupNorm",
    ),
    "a module of one's own": (SupervisedTask(normed(Centred()), (6,)), r"module '1' \(Centred\) couples.*LayerNorm"),
    "two-sided loss": (TwoSidedTask(mlp, (6,)), "the loss couples the samples of a sub-batch.*--estimator subbatch"),
    "loss among first views": (FirstViewTask(mlp, (6,)), "the loss couples the samples of a sub-batch"),
    "two-sided loss, views apart": (OneSidedTask(mlp, (6,)), "the loss couples the samples of a sub-batch"),
}
UNCOUPLED: dict[str, Task] = {
    **{name: SupervisedTask(*case) for name, case in CASES.items()},
    "bare parameters": SupervisedTask(BareViT, (1, 8, 8)),
    "constant keys": InfoNCETask(mlp, (6,)),
    "momentum encoder with batch norm": MomentumTask(Momentum, (6,)),
    "batch norm in evaluation mode": SupervisedTask(lambda: normed(nn.BatchNorm1d(5))().eval(), (6,)),
    "group norm": SupervisedTask(normed(nn.GroupNorm(1, 5)), (6,)),
    "instance norm": SupervisedTask(
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten(), nn.Linear(6, 4)), (6,)
    ),
    "tokens first": SupervisedTask(TokensFirst, (6,)),
}


def choose(task: Task, estimator: str, batch: Any = None) -> Any:
    model = task.load()  # type: ignore[call-arg]
    batch = next(task.batches(8, 0)) if batch is None else batch
    return choose_engine(task, model, FlatParameters.of(task, model), estimator=estimator, batch=batch, seed=3)


@pytest.mark.parametrize("case", COUPLED)
def test_coupling_is_found_and_named(case: str) -> None:
    task, message = COUPLED[case]
    model = task.load()  # type: ignore[call-arg]
    with pytest.raises(TaskError, match=f"per-sample gradients are undefined: {message}"):
        check_uncoupled(task, model, next(task.batches(8, 0)), REFERENCE, seed=0)
    engine, why = choose(task, "auto")
    assert isinstance(engine, SubBatchEngine) and why.startswith("subbatch, ") and "couples" in why and ";" not in why
    for estimator in ("per-sample", "per-sample-fast"):
        with pytest.raises(TaskError, match=f"^--estimator {estimator}: per-sample gradients are undefined: {message}"):
            choose(task, estimator)


@pytest.mark.parametrize("case", UNCOUPLED)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_terms_of_their_own_are_recognised(case: str, size: int) -> None:
    task = UNCOUPLED[case]
    batch = next(task.batches(size, 0))
    if size == 1 and "momentum" in case:
        pytest.skip("BatchNorm needs two samples")
    assert find_coupling(task, task.load(), batch, REFERENCE, seed=0) is None  # type: ignore[call-arg]


def test_coupling_behind_a_head_of_zeros_is_found() -> None:
    class ZeroHead(SupervisedTask):
        def load(self, checkpoint: Any = None) -> nn.Module:
            model = super().load()
            nn.init.zeros_(model[3].weight)
            return model

    task = ZeroHead(normed(Centred()), (6,))
    model = task.load()
    assert "module '1' (Centred)" in (find_coupling(task, model, next(task.batches(8, 0)), REFERENCE, seed=0) or "")
    assert not model[3].weight.any()


def test_a_model_that_calls_no_module_is_not_trusted() -> None:
    class Bare(SupervisedTask):
        def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
            return F.cross_entropy(batch[0] @ model.weight.T, batch[1], reduction="none")

    task = Bare(lambda: nn.Linear(6, 4, bias=False), (6,))
    with pytest.raises(TaskError, match="no module of the model returns a row per sample"):
        check_uncoupled(task, task.load(), next(task.batches(8, 0)), REFERENCE, seed=0)


def test_modules_with_batch_statistics_are_listed() -> None:
    model = nn.Sequential(
        nn.LazyBatchNorm1d(), nn.SyncBatchNorm(3), nn.BatchNorm2d(3).eval(),
        nn.BatchNorm2d(3, track_running_stats=False).eval(),
        nn.InstanceNorm2d(3, track_running_stats=True), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3),
    )  # fmt: skip
    assert [name for name, _ in coupled_modules(model)] == ["0", "1", "3", "4"]


def test_the_probe_leaves_the_model_as_found() -> None:
    task = SupervisedTask(PooledViT, (1, 8, 8))
    model = task.load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    choose_engine(
        task, model, FlatParameters.of(task, model), estimator="per-sample", batch=next(task.batches(8, 0)), seed=0
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_auto_takes_the_fast_path_where_terms_have_gradients_of_their_own() -> None:
    for case in ("vit", "constant keys", "momentum encoder with batch norm"):
        engine, why = choose(UNCOUPLED[case], "auto")
        assert isinstance(engine, FastPerSampleEngine), why
        assert why == "per-sample-fast, because every loss term has a gradient of its own"


@pytest.mark.parametrize("estimator", ["subbatch", "per-sample", "per-sample-fast"])
def test_what_is_asked_for_is_taken(estimator: str) -> None:
    engine, why = choose(UNCOUPLED["mlp"], estimator)
    assert engine.name == estimator and why.startswith(f"{estimator} was asked for")


def test_a_task_without_terms_is_measured_by_sub_batches() -> None:
    task = WithoutTerms(mlp, (6,))
    engine, why = choose(task, "auto")
    assert engine.name == "subbatch" and "the task gives no per-sample losses" in why
    with pytest.raises(TaskError, match="--estimator per-sample: the task gives no per-sample losses"):
        choose(task, "per-sample")


def test_an_engine_that_cannot_run_the_loss_is_refused_when_it_is_chosen() -> None:
    with pytest.raises(TaskError, match=r"--estimator per-sample: loss term \d depends on the other samples"):
        choose(InfoNCETask(mlp, (6,)), "per-sample")


def test_losses_whose_mean_is_another_loss_are_refused() -> None:
    class Halved(SupervisedTask):
        def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
            return super().loss(model, batch, strategy, generator) / 2

    with pytest.raises(TaskError, match=r"the mean of sample_losses is .* but the loss is"):
        choose(Halved(mlp, (6,)), "per-sample")


def test_an_unknown_estimator_is_refused_with_the_four_names() -> None:
    with pytest.raises(UsageError, match="'gram': choose one of auto, subbatch, per-sample, per-sample-fast"):
        choose(UNCOUPLED["mlp"], "gram")

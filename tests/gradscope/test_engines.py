"""Sub-batch gradients, their guards, and the promise to leave a model untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gradscope.engines import FlatParameters, SubBatchEngine, derive_seed
from gradscope.errors import NonFiniteError, TaskError
from gradscope.task import Task
from gradscope.untouched import untouched
from schedulers import Strategy
from tests.gradscope.tasks_for_tests import LineTask

REFERENCE = LineTask.grid.reference


def make(task: Task | None = None) -> tuple[Task, nn.Module, SubBatchEngine]:
    task = task or LineTask()
    model = task.load(Path("step-1.pt"))
    return task, model, SubBatchEngine(task, model, FlatParameters.of(task, model))


def test_gradient_is_what_backward_gives() -> None:
    task, model, engine = make()
    batch = next(task.batches(8, 0))
    strategy = Strategy(keep="half", noise=0.5)
    with untouched(model):
        flat = engine.gradient(batch, strategy, seed=11)
    torch.manual_seed(11)
    task.loss(model, batch, strategy, torch.Generator().manual_seed(11)).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(flat, torch.cat([expected[n].flatten() for n in engine.parameters.names]))


def test_the_same_seed_repeats_masks_and_dropout_layers() -> None:
    task, model, engine = make()
    batch = next(task.batches(8, 0))
    with untouched(model):
        first, again, other = (engine.gradient(batch, REFERENCE, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_state_are_left_as_found(fails: bool) -> None:
    task, model, engine = make()
    model[3].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    try:
        with untouched(model):
            engine.gradient(next(task.batches(8, 0)), REFERENCE, seed=3)
            model[0].weight.grad.mul_(7)
            model[0].weight.requires_grad_(False)
            with torch.no_grad():
                model[4].bias.add_(1)
            model.eval()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == [True, True, True, True, False, True]
    assert model[0].weight.requires_grad and torch.equal(model[0].weight.grad, torch.ones(5, 6))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")


def test_batch_statistics_do_not_drift_between_gradients() -> None:
    task, model, engine = make()
    before = model[1].running_mean.clone()
    engine.gradient(next(task.batches(8, 0)), REFERENCE, seed=3)
    assert torch.equal(model[1].running_mean, before)


def test_a_parameter_without_gradient_is_named() -> None:
    class Unused(LineTask):
        def load(self, checkpoint: Path) -> nn.Module:
            model = super().load(checkpoint)
            model.register_parameter("spare", nn.Parameter(torch.zeros(2)))
            return model

    task, model, engine = make(Unused())
    with pytest.raises(TaskError, match=r"'spare' receives no gradient.*frozen"):
        engine.gradient(next(task.batches(8, 0)), REFERENCE, seed=0)
    task.frozen = ("spare",)
    engine = SubBatchEngine(task, model, FlatParameters.of(task, model))
    assert len(engine.gradient(next(task.batches(8, 0)), REFERENCE, seed=0)) == 5 * 6 + 5 + 10 + 6


def test_losses_that_are_not_finite_scalars_are_refused() -> None:
    class Odd(LineTask):
        result = torch.tensor(float("inf"))

        def loss(self, model, batch, strategy, generator):  # type: ignore[no-untyped-def]
            return self.result

    task, _, engine = make(Odd())
    with pytest.raises(NonFiniteError, match=r"loss is inf under keep=all"):
        engine.gradient(next(task.batches(8, 0)), REFERENCE, seed=0)
    task.result = 1.0
    with pytest.raises(TaskError, match="loss returned float; return a tensor"):
        engine.gradient(next(task.batches(8, 0)), REFERENCE, seed=0)
    task.result = torch.zeros(3)
    with pytest.raises(TaskError, match=r"shape \(3,\); return the mean"):
        engine.gradient(next(task.batches(8, 0)), REFERENCE, seed=0)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["0.weight"]}, "leaves out the trainable parameter '0.bias'"),
        ({"a": ["0.weight", "0.weight"]}, "in two groups"),
        ({"a": ["nothing"]}, "names 'nothing'"),
    ],
)
def test_parameter_groups_are_checked(groups: dict[str, list[str]], message: str) -> None:
    task = LineTask()
    task.param_groups = lambda model: groups  # type: ignore[method-assign]
    with pytest.raises(TaskError, match=message):
        FlatParameters.of(task, task.load(Path("step-1.pt")))


def test_default_groups_keep_numbered_blocks_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.backbone = nn.ModuleDict(
                {"blocks": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)), "norm": nn.LayerNorm(2)}
            )
            self.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    groups = LineTask().param_groups(Net())
    assert list(groups) == ["scale", "backbone.blocks.0", "backbone.blocks.1", "backbone.norm", "head"]
    assert groups["head"] == ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]


def test_seeds_differ_by_every_part_and_never_change() -> None:
    assert len({derive_seed(0, 1), derive_seed(1, 0), derive_seed(0, 1, ""), derive_seed("01")}) == 4
    assert derive_seed(0, 5, 3, Strategy(patch=4, dropout=0.5)) == 1132551925039516638


def test_a_buffer_that_the_model_replaces_is_put_back_as_the_same_object() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))
            self.register_buffer("centre", torch.zeros(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.centre = 0.9 * self.centre + x.mean(0)  # an exponential average, as in DINO
            return ((x - self.centre) @ self.weight)[:, None]

    class CentredTask(LineTask):
        def load(self, checkpoint: Path) -> nn.Module:
            return Centred()

    task, model, engine = make(CentredTask())
    batch, centre = next(task.batches(8, 0)), model.centre
    first, again = (engine.gradient(batch, REFERENCE, seed=0) for _ in range(2))
    assert torch.equal(first, again)
    assert model.centre is centre and torch.equal(centre, torch.zeros(6))

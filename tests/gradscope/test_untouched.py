"""The promise to leave a model and the random streams as they were found."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradscope import ProfileOptions, Strategy, Task, profile
from gradscope.errors import TaskError
from gradscope.task import Checkpoint
from gradscope.tasks import PretrainTask
from gradscope.untouched import untouched
from tests.gradscope.tasks_for_tests import FailingTask, LineTask, make_checkpoints

FEW = ProfileOptions(samples=24, batch_size=8, allocation="fixed")


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that the promise is about, by a name that says what differs."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"module {path}"] = id(module)
        found[f"attributes {path}"] = list(vars(module))
        for name, value in vars(module).items():
            where = f"{path}.{name}"
            if isinstance(value, dict):
                found[f"dict {where}"] = [(key, id(entry)) for key, entry in value.items()]
            elif isinstance(value, Tensor):
                found[f"tensor {where}"] = (id(value), numbers(value))
            else:
                found[f"value {where}"] = (id(value), copy.copy(value))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"value of {name}"] = (id(tensor), numbers(tensor))
        found[f"place of {name}"] = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.requires_grad)
        found[f"grad of {name}"] = None if tensor.grad is None else (id(tensor.grad), numbers(tensor.grad))
        found[f"tensor attributes of {name}"] = dict(vars(tensor))
        for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{hooks} of {name}"] = list((getattr(tensor, hooks) or {}).values())
    found["numpy"] = tuple(np.random.get_state()[1])
    found["python"] = random.getstate()
    found["torch"] = numbers(torch.get_rng_state())
    if torch.cuda.is_available():
        found["cuda"] = [numbers(state) for state in torch.cuda.get_rng_state_all()]
    return found


def numbers(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name, "-") != after.get(name, "-"))


def make_model() -> nn.Module:
    """Layers, a hook and a .grad of its own, a non-persistent buffer, attributes of every kind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1))
    model[3].eval()
    model[0].weight.grad = torch.ones(5, 6)
    model[0].bias.decay = False
    model[4].weight.register_hook(lambda grad: None)
    model[2].register_forward_hook(lambda module, inputs, output: None)
    model.register_buffer("ring", torch.arange(4.0), persistent=False)
    model.tags, model.table, model.seen, model.scale = ["a"], {"k": 1}, {1}, torch.ones(2)  # type: ignore[assignment]
    return model


def in_place(model: Any) -> None:
    with torch.no_grad():
        model[4].bias.add_(1)
        model[0].weight.grad.mul_(7)
        model.ring.add_(1)
        model.scale.mul_(3)
        model[1].running_mean.fill_(9)
    model[0].bias.data.fill_(5)  # moves no version counter


def gradients(model: Any) -> None:
    model(torch.ones(3, 6)).sum().backward()
    model[0].weight.grad = None


def replaced(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.zeros(5, 6))
    model[0].bias.data = torch.zeros(5)
    model.ring = torch.zeros(4)
    model[2] = nn.ReLU()
    model.scale = torch.zeros(3)


def added(model: Any) -> None:
    model.register_parameter("spare", nn.Parameter(torch.zeros(1)))
    model[0].register_buffer("more", torch.zeros(1))
    model[4].weight.note = "here"
    model[4].cache = object()
    model.append(nn.ReLU())
    model.tags.append("b")
    model.table["l"] = 2
    model.seen.add(2)


def removed(model: Any) -> None:
    del model[1].running_mean, model.ring, model[4].bias, model[3], model.scale
    model.tags.clear()
    model.table = None


def hooked(model: Any) -> None:
    nothing: Callable[..., None] = lambda *args: None  # noqa: E731
    model[0].register_forward_hook(nothing)
    model[0].register_forward_pre_hook(nothing, with_kwargs=True)
    model[0].register_full_backward_hook(nothing)
    model[4].register_full_backward_pre_hook(nothing)
    model[4].register_state_dict_post_hook(nothing)
    model[0].weight.register_hook(nothing)
    model[4].weight.register_hook(nothing)
    model[0].bias.register_post_accumulate_grad_hook(nothing)
    model[2]._forward_hooks.clear()


def modes(model: Any) -> None:
    model.eval()
    model[3].train()
    model[0].weight.requires_grad_(False)
    model[3].p = 0.9


def converted(model: Any) -> None:
    model.half()


def drawn(model: Any) -> None:
    torch.manual_seed(5)
    torch.rand(3)
    np.random.seed(5)
    random.seed(5)
    if torch.cuda.is_available():
        torch.rand(3, device="cuda")


MEDDLERS = [in_place, gradients, replaced, added, removed, hooked, modes, converted, drawn]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("meddle", MEDDLERS)
def test_every_change_is_undone(meddle: Callable[[nn.Module], None], fails: bool) -> None:
    model = make_model()
    before = state_of(model)
    hooks = copy.copy(model[4].weight._backward_hooks)
    kept: list[dict[str, Any]] = []
    try:
        with untouched(model):
            meddle(model)
            kept.append(state_of(model))
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert changes(before, kept[0]), "the test changes nothing"
    assert changes(before, state_of(model)) == []
    assert hooks == model[4].weight._backward_hooks and isinstance(model._modules, dict | OrderedDict)
    model(torch.ones(3, 6)).sum().backward()  # and it still works


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("meddle", [in_place, replaced, modes, converted, drawn])
def test_every_change_is_undone_on_a_cuda_device(meddle: Callable[[nn.Module], None]) -> None:
    model = make_model().cuda()
    before = state_of(model)
    with untouched(model):
        meddle(model)
    assert changes(before, state_of(model)) == []


class SameModel(Task):
    """A task whose model is loaded once, so that it can be compared; its loss draws from every random stream."""

    def load(self, checkpoint: Path) -> nn.Module:
        if not hasattr(self, "model"):
            self.model = super().load(checkpoint)  # type: ignore[safe-super]
            next(self.model.parameters()).grad = torch.ones_like(next(self.model.parameters()))
        return self.model

    def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        random.random()
        np.random.rand()
        torch.rand(1)
        return super().loss(model, batch, strategy, generator)  # type: ignore[safe-super]


class SameLine(SameModel, LineTask):
    pass


class SameFailingLine(SameModel, FailingTask):
    pass


class Meddling(SameLine):
    """A loss that changes the model, and dies in the middle of the last checkpoint's cells."""

    calls = 0

    def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        self.calls += 1
        model[1].register_forward_hook(lambda *args: None)  # type: ignore[index]
        model.note = self.calls  # type: ignore[assignment]
        model[0].bias.data.add_(1e-9)  # type: ignore[index, union-attr]
        if self.calls == 40:
            raise KeyboardInterrupt
        return super().loss(model, batch, strategy, generator)


class SamePretrain(SameModel, PretrainTask):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoints(tmp_path / "ckpts", (0, 5))


def profiled(task: Task, folder: Path, out: Path, **changed: Any) -> list[str]:
    """What a profile has changed of the task's model; what `load` draws is no part of it."""
    model = task.load(task.checkpoints(folder)[0].path)
    before = state_of(model)
    try:
        profile(task, folder, out, options=FEW, **changed)
    except (KeyboardInterrupt, TaskError) as error:
        task.stopped_by = error  # type: ignore[attr-defined]
    return changes(before, state_of(model))


@pytest.mark.parametrize("kind", [SameLine, SameFailingLine, Meddling])
def test_a_profile_changes_nothing(kind: type[Task], folder: Path, tmp_path: Path) -> None:
    task = kind()
    assert profiled(task, folder, tmp_path / "cube.nc") == []
    assert hasattr(task, "stopped_by") == (kind is Meddling)


def test_an_error_between_the_cells_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """The second checkpoint's parameter groups differ: found while the profiler takes in its cells."""

    class Regrouped(Meddling):
        def load(self, checkpoint: Path) -> nn.Module:
            self.mark = checkpoint.stem.removeprefix("step-")
            return super().load(checkpoint)

        def param_groups(self, model: nn.Module) -> Any:
            return {f"{name} {self.mark}": members for name, members in super().param_groups(model).items()}

    task = Regrouped()
    task.calls = 1000
    assert profiled(task, folder, tmp_path / "cube.nc") == []
    assert "parameter groups differ" in str(task.stopped_by)  # type: ignore[attr-defined]


def test_a_profile_of_a_bundled_checkpoint_changes_nothing(small_run: Path, tmp_path: Path) -> None:
    task = SamePretrain.from_folder(small_run)
    all_of_them = task.checkpoints(small_run)
    task.checkpoints = lambda folder: all_of_them[-1:]  # type: ignore[method-assign]
    assert profiled(task, small_run, tmp_path / "cube.nc") == []
    assert isinstance(all_of_them[-1], Checkpoint) and task.model.training


def test_the_snapshot_of_a_large_model_is_one_copy() -> None:
    """Restoring an unchanged model writes nothing: no version counter of a parameter moves."""
    model = make_model()
    versions = [p._version for p in model.parameters()]
    with untouched(model):
        model(torch.ones(3, 6))
    assert versions == [p._version for p in model.parameters()]


def test_containers_that_the_task_keeps_stay_the_same_objects() -> None:
    model = make_model()
    tags, modules = model.tags, model._modules

    def names() -> Iterator[str]:
        yield from model._modules

    with untouched(model):
        added(model)
    assert model.tags is tags and model._modules is modules and list(names()) == list("01234")

"""The examples profile models that this project did not write, with axes of their own."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from gradscope import ProfileOptions, Task, open_cube, profile
from gradscope.cube import DONE

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FEW = ProfileOptions(samples=24, batch_size=8, allocation="fixed")


@pytest.fixture(autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)


def example(name: str) -> ModuleType:
    if name == "transformers_vit":
        pytest.importorskip("transformers", reason="transformers is not installed (make test installs it)")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    spec = importlib.util.spec_from_file_location(name, NOTEBOOKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(name: str, module: ModuleType) -> nn.Module:
    """A model with random weights, as the named task loads it."""
    if name == "SimCLRTask":
        return module.ViTModel(module.CONFIG, add_pooling_layer=False)  # type: ignore[no-any-return]
    if name == "LabelTask":
        return module.ViTForImageClassification(module.CONFIG)  # type: ignore[no-any-return]
    layers = [nn.Conv2d(1, 32, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*layers)


def make_checkpoints(folder: Path, task: Task, model: nn.Module, steps: int = 2) -> Path:
    """A few steps of a plain training loop, with the state_dict written at its start and its end."""
    folder.mkdir()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.save(model.state_dict(), folder / "step-0.pt")
    for _, batch in zip(range(steps), task.batches(8, 1), strict=False):
        optimizer.zero_grad()
        task.loss(model, batch, task.grid.reference, torch.Generator().manual_seed(0)).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / f"step-{steps}.pt")
    return folder


CASES = [("own_model", "MyTask"), ("transformers_vit", "SimCLRTask"), ("transformers_vit", "LabelTask")]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_an_example_gives_a_complete_cube(file: str, name: str, tmp_path: Path) -> None:
    module = example(file)
    torch.manual_seed(0)
    task: Task = getattr(module, name)()
    folder = make_checkpoints(tmp_path / "ckpts", task, model_of(name, module))
    tree, summary = profile(task, folder, tmp_path / "cube.nc", options=FEW)
    cube = tree.dataset
    assert cube["bias_sq"].dims == ("progress", *task.grid.axes, "metric")
    assert not summary.failures and (cube["status"] == DONE).all() and (cube["n_samples"] == 24).all()
    at = {axis: task.grid.reference[axis] for axis in task.grid.axes}
    assert (cube.sel(at)["bias_sq"] == 0).all() and (cube["bias_sq_plugin"] > 0).sum() == cube["status"].size * 2 - 4
    assert (cube["variance"] > 0).all() and np.isfinite(cube["inner"]).all()
    costs = {s: task.cost(s) for s in task.grid.strategies()}
    assert max(costs, key=lambda s: costs[s]) == task.grid.reference and len(set(costs.values())) == len(costs)


@pytest.mark.parametrize(("file", "name"), [("own_model", "MyTask"), ("transformers_vit", "LabelTask")])
def test_a_supervised_example_has_gradients_of_single_samples(file: str, name: str, tmp_path: Path) -> None:
    module = example(file)
    torch.manual_seed(0)
    task: Task = getattr(module, name)()
    folder = make_checkpoints(tmp_path / "ckpts", task, model_of(name, module))
    found = {}
    for estimator in ("auto", "per-sample"):
        options = dataclasses.replace(FEW, estimator=estimator)
        tree, summary = profile(task, folder, tmp_path / f"{estimator}.nc", options=options)
        found[summary.engine] = tree.dataset
    assert set(found) == {"per-sample-fast", "per-sample"}
    for moment in ("variance", "inner", "norm_sq", "bias_sq_plugin"):
        np.testing.assert_allclose(found["per-sample-fast"][moment], found["per-sample"][moment], rtol=1e-3, atol=1e-6)


def test_the_models_are_not_rebuilt_for_a_strategy(tmp_path: Path) -> None:
    """Same parameters as the library's, fewer tokens through its layers, no hook left behind."""
    module = example("transformers_vit")
    torch.manual_seed(0)
    model = module.ViTModel(module.CONFIG, add_pooling_layer=False)
    lengths: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda layer, inputs: lengths.append(inputs[0].shape[1]))
    images, task = torch.rand(2, 1, 28, 28), module.SimCLRTask()
    for strategy in task.grid.strategies():
        module.encode(model, images, strategy, torch.Generator().manual_seed(0))
        assert task.cost(strategy) == pytest.approx(6 * lengths[-1] / 50)
    full = module.encode(model, images, task.grid.reference, torch.Generator().manual_seed(0))
    torch.testing.assert_close(full, model(images).last_hidden_state[:, 0])
    assert not model.embeddings._forward_hooks


def test_simclr_is_symmetric_and_bounded_by_its_formula() -> None:
    module = example("transformers_vit")
    torch.manual_seed(0)
    model, task = module.ViTModel(module.CONFIG, add_pooling_layer=False), module.SimCLRTask()
    views = next(task.batches(4, 0))
    found = task.loss(model, views, task.grid.reference, torch.Generator())
    z = nn.functional.normalize(model(torch.cat(views)).last_hidden_state[:, 0])
    similar = (z @ z.T / 0.2).exp()
    expected = [-(similar[i, (i + 4) % 8] / sum(similar[i, j] for j in range(8) if j != i)).log() for i in range(8)]
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_the_command_finds_the_task_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("transformers_vit")
    from gradscope.cli import main

    torch.manual_seed(0)
    folder = make_checkpoints(tmp_path / "ckpts", module.SimCLRTask(), model_of("SimCLRTask", module))
    out = tmp_path / "cube.nc"
    monkeypatch.chdir(NOTEBOOKS)
    command = f"gradscope profile {folder} --task transformers_vit:SimCLRTask --samples 24 --batch-size 8 --out {out}"
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    assert "12 cells measured" in capsys.readouterr().out
    assert (open_cube(out).dataset["status"] == DONE).all()

"""Profiling checkpoints of the bundled methods: engines, shared targets, costs that add up, Adam's moments by name."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradscope import ProfileOptions, open_cube, profile
from gradscope.checkpoints import list_checkpoints, load_checkpoint
from gradscope.cli.run_settings import make_schedule
from gradscope.cube import DONE
from gradscope.engines import FlatParameters, SubBatchEngine, choose_engine
from gradscope.errors import TaskError
from gradscope.estimators import EUCLIDEAN
from gradscope.measuring import unshared_cost
from gradscope.tasks import PretrainTask
from gradscope.trainer import train
from gradscope.untouched import untouched
from schedulers import Strategy
from tests.gradscope.small_methods import SmallSetting, make_method, small_setting

METHODS = ("mocov3", "simclr", "dino")
FULL, HALF, LARGE = Strategy(patch=4, dropout=0), Strategy(patch=4, dropout=0.5), Strategy(patch=7, dropout=0)
OPTIONS = ProfileOptions(samples=48, allocation="fixed", seed=2)
DINO = {"freeze_last_layer": 0.5, "decay_biases": False, "weight_decay_end": 0.4, "fixed_norm": False}


def setting_of(method: str, **changes: Any) -> SmallSetting:
    own = {**DINO, "teacher_temperature": 0.07, "teacher_temperature_warmup": 0.9} if method == "dino" else {}
    values = {"budget": 700.0, "checkpoints": (0.2, 0.6, 1.0), **own, **changes}
    return small_setting(method, **values)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a short mixed run of each method."""
    made = {}
    for method in METHODS:
        setting, made[method] = setting_of(method), tmp_path_factory.mktemp(method) / "run"
        train(setting, make_schedule("mixed", setting), made[method])
    return made


def opened(folders: dict[str, Path], method: str, number: int = -1) -> tuple[PretrainTask, Any, Any]:
    """The task, the model of one checkpoint and a batch."""
    task = PretrainTask(setting_of(method))
    model = task.load(list_checkpoints(folders[method])[number].path)
    return task, model, next(task.batches(16, 0))


def engine_of(task: PretrainTask, model: Any, batch: Any, estimator: str = "auto") -> tuple[Any, str]:
    parameters = FlatParameters.of(task, model)
    return choose_engine(task, model, parameters, EUCLIDEAN, estimator=estimator, batch=batch, seed=3)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_of_every_method_are_profiled(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    task = PretrainTask(setting_of(method))
    profile(task, folders[method], tmp_path / "cube.nc", options=OPTIONS)
    cube = open_cube(tmp_path / "cube.nc")
    assert cube.attrs["engine"] == ("per-sample-fast" if method == "dino" else "subbatch")
    assert (cube["status"] == DONE).all() and cube.sizes["progress"] == 3
    assert np.isfinite(cube["inner"]).all() and (cube["variance"] > 0).all()
    cost = cube["cost"] if "cost" in cube else cube["cost_tokens"]
    for strategy in task.grid.strategies():
        at = cost.sel(patch=strategy["patch"], dropout=strategy["dropout"]).values
        assert np.allclose(at.astype(float).ravel()[0], task.cost(strategy))


def test_dinos_terms_have_gradients_of_their_own_which_add_up_to_the_sub_batchs(folders: dict[str, Path]) -> None:
    """Against a loop of autograd over the loss terms, and against the engine for whole sub-batches."""
    task, model, batch = opened(folders, "dino")
    engine, why = engine_of(task, model, batch)
    assert engine.name == "per-sample-fast" and "gradient of its own" in why
    parameters = engine.parameters
    whole = SubBatchEngine(task, model, parameters)
    for strategy in (FULL, HALF, LARGE):
        with untouched(model):
            reference = engine.reference(batch, seed=7)
            block = engine.block(batch, strategy, seed=7, reference=reference)
            mean = whole.gradient(batch, strategy, seed=7)
            losses = task.sample_losses(model, batch, strategy, torch.Generator().manual_seed(7))
            rows = [torch.autograd.grad(loss, parameters.tensors, retain_graph=True) for loss in losses]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        scale = float(flat.sum(0).abs().max())
        assert block.terms == 16 and scale > 1e-4
        torch.testing.assert_close(block.sum_P, flat.sum(0), rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(block.sum_P / 16, mean, rtol=1e-3, atol=1e-5 * scale)
        assert float(block.squares_WG.sum()) == pytest.approx(float(flat.double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("estimator", ["per-sample", "per-sample-fast"])
def test_simclr_and_mocov3_are_refused_terms_of_their_own(estimator: str, folders: dict[str, Path]) -> None:
    for method in ("simclr", "mocov3"):
        task, model, batch = opened(folders, method)
        with pytest.raises(TaskError, match=rf"--estimator {estimator}: .*module 'projector\.1' couples the samples"):
            engine_of(task, model, batch, estimator)
        engine, why = engine_of(task, model, batch)
        assert engine.name == "subbatch" and "projector.1" in why


def test_simclr_without_batchnorm_is_refused_for_its_loss() -> None:
    setting = small_setting("simclr", norm=False)
    task, model = PretrainTask(setting), setting.new_model().train()
    with pytest.raises(TaskError, match=r"the loss couples the samples of a sub-batch.*--estimator subbatch"):
        engine_of(task, model, next(task.batches(16, 0)), "per-sample")


def test_dino_with_batchnorm_in_its_head_is_refused_terms_of_their_own() -> None:
    task = PretrainTask(setting_of("dino"))
    model = make_method("dino", double=False, batchnorm=True)
    with pytest.raises(TaskError, match=r"module 'head\.mlp\.1' couples the samples"):
        engine_of(task, model, next(task.batches(16, 0)), "per-sample")


def test_mocov3_without_batchnorm_has_terms_of_its_own() -> None:
    """Keys are constants: the terms share negatives, which the task says, but each has a gradient of its own."""
    setting = small_setting("mocov3", norm=False)
    task, model = PretrainTask(setting), setting.new_model().train()
    engine, _ = engine_of(task, model, next(task.batches(16, 0)), "per-sample-fast")
    assert engine.name == "per-sample-fast" and not task.independent_terms
    assert PretrainTask(small_setting("dino")).independent_terms


@pytest.mark.parametrize(("method", "per_batch"), [("mocov3", 2), ("dino", 1)])
def test_targets_are_computed_once_a_sub_batch_and_key(
    method: str, per_batch: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model, batch = opened(folders, method)
    asked: list[Hashable] = []
    real = type(model).targets

    def targets(self: Any, views: Any, strategy: Strategy) -> Tensor | None:
        asked.append(self.target_key(strategy))
        return real(self, views, strategy)

    fresh = {}
    for strategy in task.grid.strategies():
        fresh[strategy] = model.loss(batch, strategy, torch.Generator().manual_seed(1), fraction=task.fraction).detach()
    monkeypatch.setattr(type(model), "targets", targets)

    def losses(batch: Any) -> dict[Strategy, Tensor]:
        return {
            s: task.loss(model, batch, s, torch.Generator().manual_seed(1)).detach() for s in task.grid.strategies()
        }

    for _ in range(2):
        found = losses(batch)
        assert len(asked) == per_batch == len(set(asked))
        assert all(torch.equal(found[s], fresh[s]) for s in fresh)
    losses(next(task.batches(16, 1)))
    assert len(asked) == 2 * per_batch
    losses(batch)
    assert len(asked) == 3 * per_batch  # of the last batch alone
    model.before_step(0.5) if method == "mocov3" else model.after_step(0.5, torch.zeros(16, 20))
    moved = losses(batch)
    assert len(asked) == 4 * per_batch and not torch.equal(moved[FULL], fresh[FULL])


@pytest.mark.parametrize("method", METHODS)
def test_shared_costs_add_up(method: str) -> None:
    """All strategies on one sub-batch: every query's three passes, and one key pass for each patch, or one in all."""
    task = PretrainTask(setting_of(method))
    shared: set[str] = set()
    total = sum(unshared_cost(task, strategy, shared) for strategy in task.grid.strategies())
    expected = 0.0
    for patch in (4, 7):
        tokens = (28 // patch) ** 2
        for dropout in (0, 0.5):
            query = tokens - math.ceil(tokens * dropout) + 1
            expected += 3 * query + {"mocov3": 0, "simclr": 3 * query, "dino": 3 * 2 * 10}[method]
        expected += tokens + 1 if method == "mocov3" else 0
    expected += 50 if method == "dino" else 0
    assert total == pytest.approx(expected / 50, rel=1e-12)
    for strategy in task.grid.strategies():
        assert sum(task.shared_costs(strategy).values()) < task.cost(strategy)
        assert set(task.other_costs(strategy)) == {"paper"} and set(task.tokens(strategy)) == {"query", "key"}


def test_the_papers_cost_counts_the_small_crops() -> None:
    task = PretrainTask(setting_of("dino"))
    assert task.other_costs(FULL)["paper"] == pytest.approx((3 * 50 + 3 * 2 * 10 + 50) / 197, rel=1e-12)


def test_second_moments_have_the_names_of_the_trainable_parameters(folders: dict[str, Path]) -> None:
    """With two groups of AdamW, whose order is not the model's; against the optimizer's state taken apart here."""
    task, model, _ = opened(folders, "dino")
    path = list_checkpoints(folders["dino"])[-1].path
    found = task.second_moment(path, model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found is not None and found.keys() == trainable.keys()
    content = load_checkpoint(path)
    assert len(content["optimizer"]["param_groups"]) == 2
    vectors = [n for n, p in trainable.items() if p.ndim == 1 or n.endswith("bias")]
    ordered = [n for n in trainable if n not in vectors] + vectors
    for i, name in enumerate(ordered):
        state = content["optimizer"]["state"][i]
        assert found[name].shape == trainable[name].shape
        expected = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
        torch.testing.assert_close(found[name], expected, msg=name)
    steps = {name: float(content["optimizer"]["state"][i]["step"]) for i, name in enumerate(ordered)}
    assert steps["head.last_layer.weight_v"] < steps["head.mlp.0.weight"] == content["step"]


def test_a_checkpoint_inside_the_freeze_of_the_last_layer_is_profiled(folders: dict[str, Path]) -> None:
    task, model, _ = opened(folders, "dino", 0)
    first = list_checkpoints(folders["dino"])[0]
    assert 0 < first.progress < 0.5
    moments = task.second_moment(first.path, model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moments is None or moments.keys() == names


def test_the_loss_is_that_of_the_checkpoints_place_in_its_run(folders: dict[str, Path]) -> None:
    """DINO's teacher temperature warms up: the same model further along has another loss."""
    task, model, batch = opened(folders, "dino", 1)
    checkpoint = list_checkpoints(folders["dino"])[1]
    assert task.fraction == pytest.approx(checkpoint.progress) and 0.6 <= task.fraction < 0.7
    loss = task.loss(model, batch, FULL, torch.Generator().manual_seed(0)).detach()
    expected = model.loss(batch, FULL, torch.Generator().manual_seed(0), fraction=checkpoint.progress).detach()
    late = model.loss(batch, FULL, torch.Generator().manual_seed(0), fraction=1.0).detach()
    assert torch.equal(loss, expected) and not torch.equal(loss, late)


def test_the_task_tells_how_its_checkpoints_were_trained(folders: dict[str, Path]) -> None:
    task = PretrainTask(setting_of("dino"))
    told = task.training(folders["dino"])
    assert sorted(told["strategies"]) == sorted(str(s) for s in task.grid.strategies()) and told["budget"] == 700.0
    assert json.loads(json.dumps(task.describe()))["config"]["method"] == "dino"

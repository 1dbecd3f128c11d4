"""One step: accumulated passes, AdamW's groups, clipping, what rests, half precision, compiled graphs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradscope.cli.run_settings import make_schedule
from gradscope.config import TrainConfig
from gradscope.engines import derive_seed
from gradscope.errors import NonFiniteError, UsageError
from gradscope.stepper import Stepper, clip_each, new_optimizer, second_moments
from gradscope.trainer import RunOptions, read_log, train
from schedulers import Strategy
from tests.gradscope.small_methods import SmallSetting, seeded, small_setting

CPU = torch.device("cpu")
FULL, HALF, LARGE = Strategy(patch=4, dropout=0), Strategy(patch=4, dropout=0.5), Strategy(patch=7, dropout=0)


def views_of(setting: SmallSetting, step: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    indices = torch.arange(setting.config.batch_size) + step
    return [view.to(dtype) for view in setting.views(indices, seeded(step), CPU)]


def moved(setting: SmallSetting, steps: int = 2, *, strategy: Strategy = HALF, double: bool = True) -> Any:
    """A model after some steps, with the gradients of the last one, the losses and the optimizer."""
    model = setting.new_model()
    model = model.double() if double else model
    stepper = Stepper(setting, model, device=CPU)
    stepper.start([strategy])
    dtype = torch.float64 if double else torch.float32
    losses = [stepper.step(i, 0.3 + i / 10, strategy, views_of(setting, i, dtype))[0] for i in range(steps)]
    return model, losses, stepper


@pytest.mark.parametrize("passes", [2, 4])
@pytest.mark.parametrize("method", ["mocov3", "dino"])
def test_accumulated_passes_give_the_gradient_of_the_whole_batch(method: str, passes: int) -> None:
    """Exactly so without BatchNorm, whose statistics are a pass's own; with skipped branches and dropped tokens."""
    whole, parts = (small_setting(method, norm=False, accumulate=n, drop_path=0.3, momentum=0.9) for n in (1, passes))
    (model, losses, _), (model_p, losses_p, _) = moved(whole), moved(parts)
    assert losses == pytest.approx(losses_p, rel=1e-6 if method == "dino" else 1e-12)
    compared = 0
    for (name, p), q in zip(model.named_parameters(), model_p.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11, msg=name)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-9, msg=name)
            compared += bool(p.grad.abs().max() > 1e-6)
    assert compared > 20


def test_accumulated_passes_run_a_part_of_the_batch_each_with_all_keys() -> None:
    setting = small_setting("mocov3", accumulate=4)
    model = setting.new_model()
    sizes: list[tuple[int, int]] = []
    model.backbone.register_forward_hook(lambda m, inputs, out: sizes.append((0, len(inputs[0]))))
    model.momentum_backbone.register_forward_hook(lambda m, inputs, out: sizes.append((1, len(inputs[0]))))
    Stepper(setting, model, device=CPU).step(0, 0.5, FULL, views_of(setting))
    assert sizes == [(1, 16), *[(0, 4)] * 4]


def test_simclr_is_refused_passes_with_the_reason() -> None:
    with pytest.raises(UsageError, match=r"accumulate is 2: SimCLR's gradient flows into the negatives.*bf16"):
        small_setting("simclr", accumulate=2)
    with pytest.raises(UsageError, match="batch_size 16 is not a multiple of accumulate 3"):
        small_setting("mocov3", accumulate=3)


@pytest.mark.parametrize("method", ["mocov3", "simclr", "dino"])
def test_one_step_is_adamw_by_hand(method: str) -> None:
    """Rate, decay by group, clipping by tensor and the resting layer, from the gradient of the loss."""
    changes: dict[str, Any] = {"weight_decay": 0.3, "betas": (0.8, 0.95), "warmup": 0.0}
    if method == "dino":
        changes |= {"weight_decay_end": 0.5, "decay_biases": False, "clip": 0.05, "fixed_norm": False}
    setting = small_setting(method, **changes)
    config, fraction, strategy = setting.config, 0.3, HALF
    model = setting.new_model().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.before_step(fraction)
    generator = torch.Generator().manual_seed(derive_seed("mask", config.seed, 0))
    views = views_of(setting, dtype=torch.float64)
    model.loss(views, strategy, generator, fraction=fraction).backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    stepped = setting.new_model().double()
    Stepper(setting, stepped, device=CPU).step(0, fraction, strategy, views)
    lr = config.lr * 16 / 256 * (1 + math.cos(math.pi * fraction)) / 2
    clipped = 0
    for name, p in stepped.named_parameters():
        if name not in gradient:
            assert name.startswith("momentum_") or torch.equal(p, before[name]), name
            continue
        g, decay = gradient[name], 0.3
        if method == "dino":
            one_dimensional = p.ndim == 1 or name.endswith(".bias")
            decay = 0.0 if one_dimensional else 0.3 + 0.2 * (1 - math.cos(math.pi * fraction)) / 2
            factor = 0.05 / (float(g.norm()) + 1e-6)
            clipped += factor < 1
            g = g * min(factor, 1.0)
        first, second = 0.2 * g / (1 - 0.8), 0.05 * g**2 / (1 - 0.95)
        expected = before[name] * (1 - lr * decay) - lr * first / (second.sqrt() + 1e-8)
        torch.testing.assert_close(p.data, expected, rtol=1e-9, atol=1e-12, msg=name)
    assert clipped > 3 or method != "dino"


def test_dinos_biases_and_other_vectors_do_not_decay_and_mocov3s_do() -> None:
    for method, decay_biases in (("dino", False), ("mocov3", True), ("dino", True)):
        own = {"fixed_norm": False} if method == "dino" else {}
        setting = small_setting(method, decay_biases=decay_biases, positions="learned", **own)
        model = setting.new_model()
        optimizer, names = new_optimizer(model, setting.config, CPU)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(names) == len(set(names)) == len(trainable) == len(listed)
        assert all(trainable[name] is p for name, p in zip(names, listed, strict=True))
        stepper = Stepper(setting, model, device=CPU)
        stepper.step(0, 0.3, FULL, views_of(setting))
        decays = {id(p): group["weight_decay"] > 0 for group in stepper.optimizer.param_groups for p in group["params"]}
        for name, p in trainable.items():
            assert decays[id(p)] == (decay_biases or p.dim() > 1), name
        if method == "dino":
            assert all(decays[id(trainable[n])] for n in ("backbone.cls_token", "backbone.pos_embed"))
            assert decays[id(trainable["head.last_layer.weight_g"])]


def test_the_decay_goes_from_start_to_end_along_half_a_cosine() -> None:
    config = TrainConfig(budget=1e3, weight_decay=0.04, weight_decay_end=0.4)
    for fraction in (0.0, 0.2, 0.5, 1.0):
        expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * fraction))
        assert config.weight_decay_at(fraction) == pytest.approx(expected, rel=1e-12)
    assert TrainConfig(budget=1e3, weight_decay=0.1).weight_decay_at(0.7) == 0.1


def test_the_rate_warms_up_from_zero_and_ends_at_its_end() -> None:
    config = TrainConfig(budget=1e3, lr=5e-4, lr_end=1e-6, warmup=0.1, batch_size=512)
    base = 5e-4 * 512 / 256
    assert config.learning_rate(0.0) == 0
    assert config.learning_rate(0.05) == pytest.approx(base / 2)
    assert config.learning_rate(0.1) == pytest.approx(base)
    assert config.learning_rate(0.55) == pytest.approx(1e-6 + (base - 1e-6) / 2)
    assert config.learning_rate(1.0) == pytest.approx(1e-6)


def test_every_tensor_is_clipped_by_its_own_norm() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    gradients = [torch.tensor([3.0, 4.0, 0, 0]), torch.tensor([0.1, 0, 0, 0]), None]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    clip_each(parameters, 2.0)
    torch.testing.assert_close(parameters[0].grad, gradients[0] * 2 / 5, rtol=1e-5, atol=0)
    assert torch.equal(parameters[1].grad, gradients[1]) and parameters[2].grad is None


@pytest.mark.parametrize("fixed_norm", [True, False])
def test_the_last_layer_is_left_alone_until_its_fraction(fixed_norm: bool) -> None:
    setting = small_setting("dino", freeze_last_layer=0.35, fixed_norm=fixed_norm, weight_decay=0.5)
    model = setting.new_model()
    stepper, last = Stepper(setting, model, device=CPU), model.head.last_layer
    before = [p.clone() for p in last.parameters()]
    stepper.step(0, 0.3, HALF, views_of(setting))
    assert all(torch.equal(p, q) for p, q in zip(before, last.parameters(), strict=True))
    assert model.head.mlp[4].weight.grad is not None
    content = {"optimizer": stepper.optimizer.state_dict(), "parameter_names": stepper.parameter_names}
    assert second_moments(content, CPU) is None  # a parameter has none yet: better estimated than in part
    stepper.step(1, 0.4, HALF, views_of(setting, 1))
    assert not torch.equal(before[1], last.weight_v)
    assert torch.equal(before[0], last.weight_g) == fixed_norm
    content["optimizer"] = stepper.optimizer.state_dict()
    found = second_moments(content, CPU)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trainable
    gradient = last.weight_v.grad  # its first step, whose corrected moment is the gradient's square
    torch.testing.assert_close(found["head.last_layer.weight_v"], gradient**2, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("decay_biases", [True, False])
def test_second_moments_are_found_by_name(decay_biases: bool) -> None:
    """After one step from nothing: the gradient's square, whatever group a parameter is in."""
    setting = small_setting("dino", decay_biases=decay_biases)
    model, _, stepper = moved(setting, 1, double=False)
    found = second_moments(
        {"optimizer": stepper.optimizer.state_dict(), "parameter_names": stepper.parameter_names}, CPU
    )
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found is not None and found.keys() == named.keys()
    for name, gradient in named.items():
        torch.testing.assert_close(found[name], gradient**2, rtol=1e-4, atol=1e-12, msg=name)
    fresh = new_optimizer(model, setting.config, CPU)[0]
    assert second_moments({"optimizer": fresh.state_dict(), "parameter_names": stepper.parameter_names}, CPU) is None


@pytest.mark.parametrize("method", ["mocov3", "simclr", "dino"])
def test_half_precision_stays_close_and_keeps_float32_parameters(method: str) -> None:
    exact, half = (small_setting(method, precision=name) for name in ("float32", "bf16"))
    (model, losses, _), (model_h, losses_h, stepper) = moved(exact, 1, double=False), moved(half, 1, double=False)
    assert losses_h == pytest.approx(losses, rel=0.02) and losses_h != losses
    assert all(p.dtype == torch.float32 for p in model_h.parameters())
    states = stepper.optimizer.state_dict()["state"].values()
    assert all(state["exp_avg"].dtype == torch.float32 for state in states)
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (model, model_h))
    assert float(nn.functional.cosine_similarity(a, b, dim=0)) > 0.98


def test_a_loss_that_is_not_finite_is_told_before_anything_is_trained() -> None:
    setting = small_setting("mocov3")
    model = setting.new_model()
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    views = views_of(setting)
    views[0][3].fill_(math.inf)
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is nan under patch=4,dropout=0; lower --lr"):
        Stepper(setting, model, device=CPU).step(7, 0.2, FULL, views)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported
@pytest.mark.parametrize("method", ["mocov3", "simclr", "dino"])
def test_every_strategy_has_its_graphs_before_the_first_step_and_none_follows(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with evaluations, counted by dynamo; its losses are those without compiling, to rounding."""
    from torch._dynamo.utils import counters

    setting = small_setting(method, drop_path=0.2 if method == "dino" else 0.0, evaluations=(0.0, 0.4, 1.0))
    plan = make_schedule("patch=4@0.3;patch=4,dropout=0.5@0.6;patch=7", setting)
    train(setting, plan, tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    made: list[int] = []
    start, fresh = Stepper.start, setting.new_model().state_dict()

    def counted(self: Stepper, strategies: list[Strategy]) -> None:
        start(self, strategies)
        made.append(counters["stats"]["unique_graphs"])
        assert all(torch.equal(fresh[name], value) for name, value in self.model.state_dict().items())
        assert not any(p.grad is not None for p in self.model.parameters())

    monkeypatch.setattr(Stepper, "start", counted)
    train(setting, plan, tmp_path / "compiled", options=RunOptions(compiled=True))
    keys = {"mocov3": 2, "simclr": 0, "dino": 1}[method]  # with a patch each, or one for all
    small = 1 if method == "dino" else 0
    assert made == [3 + keys + small]
    assert counters["stats"]["unique_graphs"] == made[0] and not counters["graph_break"]
    plain, compiled = ([r["loss"] for r in read_log(tmp_path / n) if "loss" in r] for n in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=5e-3) and compiled[0] == pytest.approx(plain[0], rel=1e-5)
    accuracies = [[r["accuracy"] for r in read_log(tmp_path / n) if "accuracy" in r] for n in ("plain", "compiled")]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.11)

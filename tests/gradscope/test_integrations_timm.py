"""The adapter for timm's loops, on modules of timm's shape; the last test needs timm itself."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradscope import Strategy
from gradscope.errors import GradscopeError, UsageError
from gradscope.integrations.common import set_strategy
from gradscope.integrations.timm import UNSEEN, OnlineScheduler, apply_to_vit, resize
from tests.gradscope.loops_for_tests import GRID, Classifier, assert_same_run, batch_of, controller_for, plain_run


@pytest.fixture(autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)


class CosineLike:
    """A scheduler with the methods of timm's, which counts nothing itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.metric, self.epochs = optimizer, math.nan, [0]

    def step(self, epoch: int, metric: float | None = None) -> None:
        self.epochs.append(epoch)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        self.metric = math.nan if metric is None else metric
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05 / (1 + num_updates / 50)

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)


class Loop:
    """A training loop as in timm's script: it counts updates, and calls the scheduler after each."""

    def __init__(self, scheduled: bool = False, **changes: Any) -> None:
        self.model = Classifier()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.controller = controller_for(self.model, self.optimizer)
        own = CosineLike(self.optimizer) if scheduled else None
        self.scheduler = OnlineScheduler(
            self.controller, self.model, self.optimizer, scheduler=own, apply=set_strategy, **changes
        )
        self.num_updates = 0

    def run(self, stop: int = 1000, overflows: tuple[int, ...] = ()) -> None:
        while not self.scheduler.finished and self.num_updates < stop:
            loss = self.model(*batch_of(self.controller.step))["loss"]
            loss.backward()
            if self.num_updates not in overflows:
                self.optimizer.step()
            self.num_updates += 1
            self.optimizer.zero_grad()
            self.scheduler.step_update(num_updates=self.num_updates, metric=loss.item())


def continue_from(first: Loop, second: Loop) -> None:
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    second.num_updates = first.num_updates
    second.scheduler.step_update(second.num_updates)  # timm's script does so when it resumes


def test_timm_s_calls_give_the_run_of_a_loop_of_ones_own() -> None:
    loop = Loop()
    loop.run()
    assert_same_run(loop.controller, loop.model, plain_run())
    assert loop.model.seen == [loop.controller.at(step) for step in range(loop.controller.step)]
    with pytest.raises(UsageError, match="budget of 1,200 units is spent"):
        loop.optimizer.step()
    loop.scheduler.close()
    loop.optimizer.step()
    assert loop.model.strategy == GRID.reference


def test_the_loop_s_own_scheduler_gets_every_call() -> None:
    loop = Loop(scheduled=True)
    loop.run(stop=10)
    loop.scheduler.step(1, 0.5)
    own = loop.scheduler.scheduler
    assert isinstance(own, CosineLike) and own.epochs == [0, 1] and own.metric > 0
    assert loop.optimizer.param_groups[0]["lr"] == 0.05 / 1.2


def test_a_run_goes_on_from_its_state() -> None:
    whole, first, second = Loop(scheduled=True), Loop(scheduled=True), Loop(scheduled=True)
    whole.run()
    first.run(stop=60)
    continue_from(first, second)
    second.run()
    assert_same_run(second.controller, second.model, (whole.controller, whole.model))
    assert first.model.seen + second.model.seen == whole.model.seen


def test_a_state_of_another_make_is_refused() -> None:
    with pytest.raises(GradscopeError, match="lacks controller, scheduler, skipped"):
        Loop().scheduler.load_state_dict({})
    with pytest.raises(UsageError, match="`scheduler` was given in one of the two runs"):
        Loop().scheduler.load_state_dict(Loop(scheduled=True).scheduler.state_dict())


def test_a_loop_at_another_update_is_told() -> None:
    loop = Loop()
    with pytest.raises(UsageError, match="has done 500 updates, of which the controller saw 0"):
        loop.scheduler.step_update(500)
    loop.run(stop=3)
    with pytest.raises(UsageError, match="has done 2 updates, of which the controller saw 3"):
        loop.scheduler.step_update(2)


def test_a_skipped_update_is_made_up_for() -> None:
    """An update without a step, as after an overflow: the next one has its strategy, also in a run that goes on."""
    first, loop = Loop(), Loop()
    first.run(stop=40, overflows=(0, 1, 2, 30))
    assert first.controller.step == 36
    continue_from(first, loop)
    loop.run()
    assert_same_run(loop.controller, loop.model, plain_run())
    assert loop.num_updates == loop.controller.step + 4


def test_a_grad_scaler_s_skipped_updates_are_made_up_for() -> None:
    loop, scaler = Loop(), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    while not loop.scheduler.finished:
        loss = 64 * loop.model(*batch_of(loop.num_updates))["loss"]
        scaler.scale(loss).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.num_updates += 1
        loop.optimizer.zero_grad()
        loop.scheduler.step_update(loop.num_updates)
    skipped = loop.scheduler.state_dict()["skipped"]
    assert 3 < skipped < 20 and loop.controller.step == loop.num_updates - skipped


def test_an_optimizer_that_never_steps_is_told() -> None:
    loop = Loop()
    with pytest.raises(UsageError, match=f"has done {UNSEEN + 1} updates, of which the controller saw 0: give the opt"):
        loop.run(overflows=tuple(range(UNSEEN + 1)))
    assert loop.num_updates == UNSEEN + 1


class PatchDropout(nn.Module):
    """As timm's: a random part of the patch tokens, all of them outside training."""

    def __init__(self, prob: float) -> None:
        super().__init__()
        self.prob = prob

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        if not self.training or self.prob == 0:
            return tokens_BLD
        kept = max(1, int((tokens_BLD.shape[1] - 1) * (1 - self.prob)))
        return torch.cat([tokens_BLD[:, :1], tokens_BLD[:, 1 : 1 + kept]], 1)


class TinyViT(nn.Module):
    """The attributes of timm's VisionTransformer that the adapter reads."""

    def __init__(self, patch_drop_rate: float = 0.0, dynamic_img_size: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 4, 8, 8)
        self.patch_embed.img_size, self.patch_embed.patch_size = (32, 32), (8, 8)  # type: ignore[assignment]
        self.patch_drop = PatchDropout(patch_drop_rate) if patch_drop_rate > 0 else nn.Identity()
        self.dynamic_img_size = dynamic_img_size

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images).flatten(2).mT
        dropped: Tensor = self.patch_drop(torch.cat([tokens[:, :1], tokens], 1))
        return dropped


def test_a_vit_drops_and_shrinks_as_its_strategy_says() -> None:
    model, images = TinyViT(patch_drop_rate=0.5, dynamic_img_size=True), torch.rand(2, 3, 32, 32)
    lengths = {}
    for resolution in (16, 32):
        for dropout in (0, 0.5, 0.75):
            strategy = Strategy(resolution=resolution, dropout=dropout)
            apply_to_vit(model, strategy)
            small = resize(images, strategy)
            assert small.shape[-2:] == (resolution, resolution)
            lengths[resolution, dropout] = model(small).shape[1]
    assert lengths == {(16, 0): 5, (16, 0.5): 3, (16, 0.75): 2, (32, 0): 17, (32, 0.5): 9, (32, 0.75): 5}
    assert model.eval()(images).shape[1] == 17
    assert resize(images, Strategy(dropout=0.5)) is images


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Strategy(dropout=0.5), "dropout=0.5: TinyViT.patch_drop is Identity.*patch_drop_rate=0.5"),
        (Strategy(dropout=1), "dropout=1: a rate is at least 0 and below 1"),
        (Strategy(resolution=16), "TinyViT takes images of 32 pixels alone.*dynamic_img_size=True"),
        (Strategy(resolution=36), "TinyViT takes images of 32 pixels alone"),
        (Strategy(patch=16), "know nothing of the axis 'patch'; .*set_input_size would replace.*`resolution`"),
        (Strategy(colour=1), "know nothing of the axis 'colour'; pass `apply=`"),
    ],
)
def test_a_vit_not_built_for_a_strategy_is_refused(strategy: Strategy, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply_to_vit(TinyViT(), strategy)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(UsageError, match="resolution=20 is not a multiple of the patch size, 8 pixels"):
        apply_to_vit(TinyViT(dynamic_img_size=True), Strategy(resolution=20))
    apply_to_vit(TinyViT(), Strategy(dropout=0, resolution=32))
    apply_to_vit(SimpleNamespace(), Strategy(dropout=0))  # type: ignore[arg-type]


def test_timm_s_own_scheduler_can_be_given() -> None:
    timm = pytest.importorskip("timm.scheduler", reason="timm is not installed", exc_type=ImportError)
    loop = Loop()
    own = timm.CosineLRScheduler(loop.optimizer, t_initial=100, t_in_epochs=False)
    loop.scheduler.close()
    loop.scheduler = OnlineScheduler(loop.controller, loop.model, loop.optimizer, scheduler=own, apply=set_strategy)
    loop.run(stop=50)
    loop.scheduler.step(1, 0.5)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    loop.scheduler.load_state_dict(loop.scheduler.state_dict())


def test_timm_s_own_vit_takes_every_strategy() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, num_classes=10, patch_drop_rate=0.5, dynamic_img_size=True
    )
    lengths: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[0].shape[1]))
    for strategy in (Strategy(resolution=64, dropout=0), Strategy(resolution=32, dropout=0.5)):
        apply_to_vit(model, strategy)
        model(resize(torch.rand(2, 3, 64, 64), strategy))
    assert lengths == [17, 3]
    with pytest.raises(UsageError, match="patch_drop is Identity"):
        apply_to_vit(timm.create_model("vit_tiny_patch16_224"), Strategy(dropout=0.5))

"""The callback in Lightning's own Trainer: the run of a loop of one's own, interrupted or not."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradscope import Strategy
from gradscope.errors import UsageError
from tests.gradscope.loops_for_tests import (
    BATCH,
    FEATURES,
    GRID,
    LABELS,
    Classifier,
    assert_same_run,
    controller_for,
    plain_run,
)

NAMES = [name for name in ("pytorch_lightning", "lightning") if importlib.util.find_spec(name)]
if not NAMES:
    pytest.skip("Lightning is not installed", allow_module_level=True)
pl: Any = importlib.import_module({"lightning": "lightning.pytorch"}.get(NAMES[0], NAMES[0]))
from gradscope.integrations.lightning import OnlineCallback  # noqa: E402  # after the Lightning that it is to use

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, loggers and intervals
ROWS = TensorDataset(FEATURES, LABELS)


@pytest.fixture(autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)


class Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        self.validated: list[Strategy] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(*batch)["loss"]
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.net.strategy)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def tell(module: nn.Module, strategy: Strategy) -> None:
    module.net.strategy = strategy  # type: ignore[union-attr, assignment]


def fit(
    folder: Path,
    module: Module,
    callback: Any = None,
    ckpt_path: Path | None = None,
    validate: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Train on the rows in their order; the finished trainer and its callback."""
    callback = callback or OnlineCallback(lambda m, optimizer: controller_for(m.net, optimizer), apply=tell)
    saver = pl.callbacks.ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[callback, saver], **{"max_epochs": -1, **options},
    )  # fmt: skip
    loaders = [DataLoader(ROWS, batch_size=BATCH)] + [DataLoader(ROWS, batch_size=48)] * validate
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer, callback


def test_a_run_is_that_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    module = Module()
    trainer, callback = fit(tmp_path, module, validate=True, val_check_interval=5)
    controller = callback.controller
    assert_same_run(controller, module.net, plain_run())
    assert trainer.global_step == controller.step
    assert module.net.seen == [controller.at(step) for step in range(controller.step)]
    assert module.validated and set(module.validated) == {GRID.reference} == {module.net.strategy}


def test_accumulated_batches_share_a_strategy(tmp_path: Path) -> None:
    module = Module()
    callback = OnlineCallback(lambda m, optimizer: controller_for(m.net, optimizer, batch_size=2 * BATCH), apply=tell)
    fit(tmp_path, module, callback, accumulate_grad_batches=2)
    assert_same_run(callback.controller, module.net, plain_run(accumulate=2))
    assert module.net.seen[::2] == module.net.seen[1::2]
    assert len(module.net.seen) == 2 * callback.controller.step


@pytest.mark.parametrize("made", ["before", "when training begins"])
def test_a_resumed_run_decides_as_the_uninterrupted_one(tmp_path: Path, made: str) -> None:
    fit(tmp_path, Module(), max_epochs=5)
    path = tmp_path / "epoch=4.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["gradscope.OnlineCallback"]
    assert state["step"] == 60
    module = Module()
    before = OnlineCallback(controller_for(module.net, module.optimizer), apply=tell) if made == "before" else None
    _, callback = fit(tmp_path / "second", module, before, ckpt_path=path)
    assert_same_run(callback.controller, module.net, plain_run())
    assert module.net.seen == [callback.controller.at(step) for step in range(60, callback.controller.step)]


def test_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    module = Module()
    _, callback = fit(tmp_path, module)
    last = max(tmp_path.iterdir(), key=lambda path: int(path.stem.partition("=")[2]))
    again = Module()
    trainer, second = fit(tmp_path, again, ckpt_path=last)
    assert trainer.global_step == callback.controller.step == second.controller.step and again.net.seen == []
    with pytest.raises(UsageError, match="budget of 1,200 units is spent"):
        fit(tmp_path, Module(), ckpt_path=last, min_steps=1000)


def test_a_checkpoint_without_the_state_is_told(tmp_path: Path) -> None:
    class Plain(Module):
        def on_train_start(self) -> None:
            self.net.strategy = GRID.reference  # type: ignore[assignment]

    fit(tmp_path, Plain(), pl.Callback(), max_epochs=1)
    with pytest.raises(UsageError, match="begins at optimizer step 12 and the controller is at 0"):
        fit(tmp_path, Module(), ckpt_path=tmp_path / "epoch=0.ckpt")

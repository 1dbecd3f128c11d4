"""The callback in the Trainer of transformers: the run of a loop of one's own, interrupted or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler

from gradscope.errors import CheckpointError, UsageError
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

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
from gradscope.integrations.transformers import OnlineCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer, on settings that it will drop


@pytest.fixture(autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return len(FEATURES)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": FEATURES[index], "labels": LABELS[index]}


class InOrder(transformers.Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *rows: Any) -> SequentialSampler:
        return SequentialSampler(Rows())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.evaluated = [*getattr(self, "evaluated", []), self.model.strategy]
        return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]


def trainer_for(folder: Path, model: Classifier, callback: Any = None, **options: Any) -> Any:
    callback = callback or OnlineCallback(controller_for)
    settings = {
        "max_steps": 1000, "save_strategy": "steps", "save_steps": 50, "learning_rate": 0.05, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "per_device_train_batch_size": BATCH, **options,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **settings)
    return InOrder(model, args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback])


def callback_of(trainer: Any) -> Any:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, OnlineCallback))


def test_a_run_is_that_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    model = Classifier()
    trainer = trainer_for(tmp_path, model, eval_strategy="steps", eval_steps=40)
    trainer.train()
    controller = callback_of(trainer).controller
    assert_same_run(controller, model, plain_run())
    assert trainer.state.global_step == controller.step
    assert model.seen == [controller.at(step) for step in range(controller.step)]
    assert trainer.evaluated == [GRID.reference] * (controller.step // 40 + 1)
    assert (tmp_path / f"checkpoint-{controller.step}" / "gradscope_online.json").is_file()


def test_accumulated_batches_share_a_strategy(tmp_path: Path) -> None:
    model = Classifier()
    callback = OnlineCallback(lambda m, optimizer: controller_for(m, optimizer, batch_size=2 * BATCH))
    trainer_for(tmp_path, model, callback, gradient_accumulation_steps=2, save_strategy="no").train()
    assert_same_run(callback.controller, model, plain_run(accumulate=2))
    assert model.seen[::2] == model.seen[1::2] and len(model.seen) == 2 * callback.controller.step


def test_a_resumed_run_decides_as_the_uninterrupted_one(tmp_path: Path) -> None:
    trainer_for(tmp_path, Classifier(), max_steps=50).train()  # in the middle of an epoch of 12 steps
    model = Classifier()
    trainer = trainer_for(tmp_path, model)
    trainer.train(resume_from_checkpoint=True)
    controller = callback_of(trainer).controller
    assert_same_run(controller, model, plain_run())
    assert model.seen == [controller.at(step) for step in range(50, controller.step)]


def test_a_checkpoint_that_lies_elsewhere_is_named(tmp_path: Path) -> None:
    trainer_for(tmp_path / "first", Classifier(), max_steps=50).train()
    moved = (tmp_path / "first" / "checkpoint-50").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"second/checkpoint-50/gradscope_online.json: missing"):
        trainer_for(tmp_path / "second", Classifier()).train(resume_from_checkpoint=str(moved))
    model, callback = Classifier(), OnlineCallback(controller_for, resume_from=moved)
    trainer_for(tmp_path / "second", model, callback).train(resume_from_checkpoint=str(moved))
    assert_same_run(callback.controller, model, plain_run())


def test_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    trainer_for(tmp_path, Classifier()).train()
    model = Classifier()
    with pytest.raises(UsageError, match="budget of 1,200 units is spent"):
        trainer_for(tmp_path, model).train(resume_from_checkpoint=True)
    assert model.seen == []

"""A few real images and a small configuration, so that training and profiling take a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gradscope.config
from gradscope.config import Setting, TrainConfig, open_setting
from gradscope.data import ImageData, load_data


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def few_images() -> ImageData:
    full = load_data("fashion-mnist-10k")
    return dataclasses.replace(
        full,
        train_images=full.train_images[:192],
        train_labels=full.train_labels[:192],
        test_images=full.test_images[:48],
        test_labels=full.test_labels[:48],
    )


@pytest.fixture
def small_data(few_images: ImageData, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """Everything that opens a data set gets 192 + 48 images."""
    monkeypatch.setattr(gradscope.config, "load_data", lambda name, folder=None, image_size=None: few_images)
    return few_images


@pytest.fixture
def make_setting(small_data: ImageData) -> Callable[..., Setting]:
    def make(**changes: object) -> Setting:
        values = {
            "budget": 400.0,
            "batch_size": 16,
            "patch": 4,
            "patches": (4, 7),
            "dropouts": (0.0, 0.5),
            "head_hidden": 16,
            "head_width": 8,
        }
        return open_setting(TrainConfig(**{**values, **changes}))  # type: ignore[arg-type]

    return make


@pytest.fixture
def small_run(make_setting: Callable[..., Setting], tmp_path: Path) -> Path:
    """A folder with five checkpoints of a short mixed run."""
    from gradscope.cli.run_settings import make_schedule
    from gradscope.trainer import train

    setting = make_setting()
    train(setting, make_schedule("mixed", setting), tmp_path / "ckpt_dir")
    return tmp_path / "ckpt_dir"

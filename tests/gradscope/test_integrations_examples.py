"""The examples of the online mode run to their end, in their own loop and in each framework that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gradscope import AdaptiveController

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, NOTEBOOKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(controller: AdaptiveController, accuracy: float) -> None:
    """The budget is used and kept, probes were made and kept to their cap, and something was learnt."""
    assert controller.finished and 0.98 * controller.budget < controller.spent <= controller.budget
    assert controller.probes and not any(record.failures or record.error for record in controller.probes)
    assert 0 < controller.probe_units <= 0.1 * controller.budget
    assert len({controller.at(step) for step in range(controller.step)}) == 3
    assert 0.3 < accuracy <= 1


def test_a_loop_of_ones_own_gets_five_lines() -> None:
    lines = (NOTEBOOKS / "online_own_loop.py").read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("def train"))
    body = lines[begin : next(i for i, line in enumerate(lines) if line.startswith("    return model, controller"))]
    assert sum("# +" in line for line in body) == 5
    assert not [line for line in body if "controller" in line.lower() and "# +" not in line]
    module = example("online_own_loop")
    model, controller = module.train()
    check(controller, module.accuracy(model))


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and loggers
def test_lightning_s_trainer_runs_it() -> None:
    if not any(importlib.util.find_spec(name) for name in ("lightning", "pytorch_lightning")):
        pytest.skip("Lightning is not installed")
    check(*example("online_lightning").train())


@pytest.mark.filterwarnings("ignore")  # of the Trainer, on settings that it will drop
def test_the_trainer_of_transformers_runs_it() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
    check(*example("online_transformers").train())

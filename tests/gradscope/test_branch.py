"""Training on from a checkpoint for a benchmark: as the run itself did, where the strategies are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.adaptive import fairness
from benchmarks.branch import branch
from benchmarks.summary import parse_row
from gradscope.checkpoints import list_steps, load_checkpoint
from gradscope.config import Setting
from gradscope.trainer import train
from schedulers import Strategy, constant_schedule

SMALL, LARGE = Strategy(patch=4, dropout=0), Strategy(patch=7, dropout=0)
Make = Callable[..., Setting]


@pytest.fixture
def run(make_setting: Make, tmp_path: Path) -> list[Path]:
    """Checkpoints of a run under LARGE."""
    setting = make_setting(checkpoints=(0.25, 0.5, 0.75), evaluations=())
    train(setting, constant_schedule(LARGE, setting.cost(LARGE)), tmp_path / "run")
    return list_steps(tmp_path / "run")


def assert_same(first: Path, second: Path) -> None:
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert a["step"] == b["step"] and a["units"] == pytest.approx(b["units"])
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    for i, kept in a["optimizer"]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(b["optimizer"]["state"][i][k])) for k, v in kept.items()
        )


def test_it_goes_on_as_the_run_did(run: list[Path], tmp_path: Path) -> None:
    at = [load_checkpoint(path)["units"] for path in run]
    asked: list[int] = []

    def same(step: int) -> Strategy:
        asked.append(step)
        return LARGE

    folders = [tmp_path / name for name in ("none", "near", "far")]
    made = branch(run[0], same, [0.0, at[1] - at[0] + 1e-6, at[2] - at[0] + 1e-6], folders, "cpu")
    assert [path.parent for path in made] == folders
    for here, there in zip(made, run, strict=False):
        assert_same(here, there)
    assert asked[0] == load_checkpoint(run[0])["step"]
    asked.clear()
    assert branch(run[0], same, [0.0, 1.0, 2.0], folders, "cpu") == made and not asked  # what is there is kept


def test_another_strategy_makes_another_model(run: list[Path], tmp_path: Path) -> None:
    units = load_checkpoint(run[1])["units"] - load_checkpoint(run[0])["units"]
    (made,) = branch(run[0], lambda step: SMALL, [units], [tmp_path / "other"], "cpu")
    content, before = load_checkpoint(made), load_checkpoint(run[0])
    assert 0 < content["units"] - before["units"] <= units
    assert content["step"] - before["step"] < load_checkpoint(run[1])["step"] - before["step"]
    other = load_checkpoint(run[1])["model"]
    trained = [name for name in content["parameter_names"] if name in other]
    assert trained and not any(torch.equal(content["model"][name], other[name]) for name in trained)


def test_rows_of_fairness_are_medians(tmp_path: Path) -> None:
    def point(way: str, units: float, alignment: float) -> dict[str, Any]:
        return {
            "trained": way, "units": units, "alignment": {str(SMALL): 1.0, str(LARGE): alignment},
            "descent": {str(SMALL): 0.2, str(LARGE): 0.2 * alignment},
        }  # fmt: skip

    points = [point("mixed", 0.0, a) for a in (0.6, 0.7, 0.9)] + [point(f"mixed, then {LARGE} alone", 3000.0, 0.5)]
    file = tmp_path / "fairness.json"
    file.write_text(fairness.json.dumps({"budget": 6e5, "device": "d", "date": "2026-01-01", "points": points}))
    found = [parse_row(vars(row), "here") for row in fairness.rows(file)]
    assert [(row.value, row.low, row.high, row.runs) for row in found] == [
        (0.7, 0.6, 0.9, 3), (0.7, 0.6, 0.9, 3), (0.5, 0.5, 0.5, 1), (0.5, 0.5, 0.5, 1),
    ]  # fmt: skip
    assert "alone, 0.50% of the budget" in found[2].claim and fairness.rows(tmp_path / "absent.json") == []

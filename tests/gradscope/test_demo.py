"""The whole loop at the smallest size, interrupted and started again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import gradscope.demo
from gradscope.config import TrainConfig
from gradscope.data import ImageData
from gradscope.demo import run_demo
from schedulers import load_schedule, save_schedule


@pytest.fixture
def small_demo(small_data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(budget: float, data: str, seed: int) -> TrainConfig:
        return TrainConfig(
            budget=budget,
            data=data,
            seed=seed,
            batch_size=16,
            patch=4,
            patches=(4, 7),
            dropouts=(0.0, 0.5),
            head_hidden=16,
        )

    monkeypatch.setattr(gradscope.demo, "demo_config", config)
    monkeypatch.setattr(gradscope.demo, "SAMPLES", 64)


def test_demo_goes_round_and_continues_after_an_interruption(
    small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_demo(tmp_path / "whole", budget=400, data="fashion-mnist-10k", quiet=True)
    assert [row.run for row in whole.rows] == ["no acceleration", "mixed pilot", "optimized schedule"]
    assert whole.rows[0].samples < whole.rows[2].samples
    assert load_schedule(tmp_path / "whole" / "schedule.json").budget == 400
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["profile_units"] == whole.profile_units
    cells = 5 * 64 * (4 + 1.5 + 17 * 4 / 50 + 3 * 9 / 50)  # the key's pass once per patch size
    assert whole.profile_units == pytest.approx(cells + 4 * 16 * 4)  # and the metric of the first checkpoint
    html = (tmp_path / "whole" / "report.html").read_text()
    assert "mixed pilot" in html and f"{whole.rows[2].knn_accuracy:.1%}" in html

    real = gradscope.demo.optimize

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gradscope.demo, "optimize", broken)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "again", budget=400, data="fashion-mnist-10k", quiet=True)
    monkeypatch.setattr(gradscope.demo, "optimize", real)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again" / "ckpt_dir").glob("step-*.pt")}
    again = run_demo(tmp_path / "again", budget=400, data="fashion-mnist-10k", quiet=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    strip = [dataclasses.replace(row, seconds=0.0) for row in again.rows]
    assert strip == [dataclasses.replace(row, seconds=0.0) for row in whole.rows]


def test_what_is_tried_in_its_folder_does_not_stop_the_demo_from_running_again(
    small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_demo(tmp_path, budget=400, data="fashion-mnist-10k", quiet=True)
    found = load_schedule(tmp_path / "schedule.json")
    save_schedule(dataclasses.replace(found, budget=800.0), tmp_path / "schedule.json")  # `gradscope optimize` there
    monkeypatch.setattr(gradscope.demo, "SAMPLES", 128)  # a finer profile would give another schedule
    again = run_demo(tmp_path, budget=400, data="fashion-mnist-10k", quiet=True)
    assert [row.samples for row in again.rows] == [row.samples for row in first.rows]
    assert load_schedule(tmp_path / "schedule.json").budget == 800

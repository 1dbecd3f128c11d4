"""The benchmark of the input pipeline: what it measures is what it says."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.training.pipeline import SMALL_CROPS, Source, measure, photograph, rates, rows, table


@pytest.mark.parametrize("name", ["memory", "photographs"])
def test_every_method_is_measured_for_every_batch_size(name: str) -> None:
    source = Source((40, 50), 4, 16, (2, 3), repeats=2) if name == "photographs" else Source(None, 0, 28, (2, 3), 2)
    found = measure(name, source, torch.device("cpu"), 2)
    assert [(entry["method"], entry["batch"], entry["view_count"]) for entry in found] == [
        ("mocov3", 2, 2),
        ("mocov3", 3, 2),
        ("simclr", 2, 2),
        ("simclr", 3, 2),
        ("dino", 2, 2 + SMALL_CROPS),
        ("dino", 3, 2 + SMALL_CROPS),
    ]
    for entry in found:
        for stage in ("prepare", "views"):
            for clock in ("wall", "processor"):
                rate = entry[stage][clock]
                assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert len(table({name: {"measured": found}}).splitlines()) == 7


def test_rates_are_images_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that the body itself moves: batches of 8 that take 1, 2 and 4 seconds, half of them the processor's."""
    now, durations = [0.0], iter((1.0, 2.0, 4.0))

    def body(_: torch.Tensor) -> None:
        now[0] += next(durations)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.process_time", lambda: now[0] / 2)
    found = rates(body, [torch.zeros(8)] * 3, torch.device("cpu"))
    assert found["wall"] == {"low": 3.0, "median": 4.0, "high": 6.0}
    assert found["processor"] == {"low": 6.0, "median": 8.0, "high": 12.0}


def test_rows_compare_with_the_fastest_step(tmp_path: Path) -> None:
    rate = {"low": 90.0, "median": 100.0, "high": 110.0}
    measured = {
        "image_size": 28, "view_count": 2, "batch": 64, "repeats": 3,
        "views": {"processor": rate, "wall": {"low": 1.0, "median": 2.0, "high": 3.0}},
    }  # fmt: skip
    entry = {
        "measured": [{**measured, "method": "mocov3"}, {**measured, "method": "simclr"}],
        "device": "a processor", "date": "2026-01-02", "command": "python",
    }  # fmt: skip
    (tmp_path / "pipeline-cpu.json").write_text(json.dumps({"memory": entry}))
    assert [(row.value, row.holds, row.aim) for row in rows(tmp_path)] == [(100.0, True, "none; stated")] * 2
    for speed, holds in ((99.0, True), (101.0, False)):
        strategies = {"patch=2": {"samples_per_second": 5.0}, "patch=7": {"samples_per_second": speed}}
        (tmp_path / "speed-cpu.json").write_text(
            json.dumps({"cases": {"demo-28": {"title": "the ViT", "strategies": strategies}}})
        )
        first, second = rows(tmp_path)
        assert (first.holds, first.aim) == (holds, f"at least {speed:.0f}, a step of the ViT under patch=7")
        assert (first.low, first.high, first.runs) == (90.0, 110.0, 3) and second.holds


def test_photographs_weigh_about_what_natural_ones_do() -> None:
    """ImageNet's 1.28 million training files take 138 GB, 108 kB each; noise of equal amplitudes takes much more."""
    buffer = io.BytesIO()
    image = photograph(375, 500, seed=0)
    image.save(buffer, "JPEG", quality=90)
    assert 80_000 < len(buffer.getvalue()) < 140_000
    assert not np.array_equal(image, photograph(375, 500, seed=1))
    white = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8))
    white.save(noise := io.BytesIO(), "JPEG", quality=90)
    assert len(noise.getvalue()) > 1.3 * len(buffer.getvalue())

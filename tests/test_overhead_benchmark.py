"""The overhead benchmark: it replays exactly the profile's passes, and its rows are valid."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.profile import overhead
from benchmarks.summary import parse_row

CASE = overhead.Case("demo", 28, (4, 7), (0, 0.5), batch_size=8, blocks=3)


def test_every_pass_of_a_profile_is_run_bare_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    losses: list[float] = []
    plain = overhead.PretrainTask.loss

    def noted(self, *arguments):  # type: ignore[no-untyped-def]
        loss = plain(self, *arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(overhead.PretrainTask, "loss", noted)
    found = overhead.measure_time(CASE, torch.device("cpu"), tmp_path)
    assert found["passes"] == 2 + 3 * 4  # the check's two, then every strategy on every sub-batch
    warm, measured = losses[:4], losses[4:]
    assert len(warm) == 4 and len(measured) == 2 * found["passes"]
    assert sorted(measured)[::2] == sorted(measured)[1::2]
    assert found["ratio"] > 0 and len(found["ratio_per_block"]) == CASE.blocks - 1


def test_rows_say_whether_the_aim_is_met() -> None:
    time = {"clock": "wall", "ratio": 1.08, "ratio_per_block": [1.02, 1.05]}
    entry = {"time": time, "memory": {"profile_bytes": 3, "training_bytes": 2}, "device": "x", "date": "2026-01-01"} | {
        "threads": 2
    }
    cpu, gpu = overhead.rows({"cpu:small": entry}), overhead.rows({"cuda:small": entry})
    assert [row.holds for row in cpu] == [True, True] and [row.holds for row in gpu] == [False, True]
    for row in cpu + gpu:
        assert parse_row(dataclasses.asdict(row), "here") == row and row.claim.startswith("overhead: ")
    assert cpu[1].value == 1.5 and "--device cuda --threads 2 --clock wall" in gpu[0].command

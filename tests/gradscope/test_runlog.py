"""The run's log: whole lines, the same rows in TensorBoard, and errors that tell what to do."""

from __future__ import annotations

import builtins
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from gradscope.errors import UsageError
from gradscope.runlog import LOG_FILE, RunLog, read_log

ROWS = [
    {"step": 1, "units": 10.0, "loss": 2.0, "lr": 0.1, "strategy": "patch=4"},
    {"step": 1, "units": 10.0, "accuracy": 0.5},
    {"step": 2, "units": 20.0, "loss": 1.5, "lr": 0.2, "strategy": "patch=7"},
]


def test_rows_are_written_whole_and_read_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for row in ROWS:
        log.add(row)
    log.write()
    assert read_log(tmp_path) == ROWS == log.rows
    assert [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()] == ROWS
    assert [path.name for path in tmp_path.iterdir()] == [LOG_FILE]
    log.close()


def test_a_continued_run_goes_on_from_the_rows_it_had(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.load(iter(ROWS[:2]))
    log.add(ROWS[2])
    log.write()
    assert read_log(tmp_path) == ROWS


def test_a_log_that_is_missing_or_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"log.jsonl: no training log; give a folder that `gradscope train --out`"):
        read_log(tmp_path)
    for text in ("{broken", "[1, 2", "3"):
        (tmp_path / LOG_FILE).write_text(text)
        with pytest.raises(UsageError, match="not a training log of gradscope"):
            read_log(tmp_path)


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: Path) -> None:
            assert folder == tmp_path / "tensorboard"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            written.append(("flush", 0, 0))

        def close(self) -> None:
            written.append(("close", 0, 0))

    stub = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    log = RunLog(tmp_path, tensorboard=True)
    for row in ROWS:
        log.add(row)
    log.write()
    log.close()
    assert written[-2:] == [("flush", 0, 0), ("close", 0, 0)]
    assert {("loss", 2.0, 1), ("lr", 0.1, 1), ("units", 10.0, 1), ("accuracy", 0.5, 1), ("loss", 1.5, 2)} <= {*written}
    assert "strategy" not in {name for name, _, _ in written}


def test_a_missing_tensorboard_is_told_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"--tensorboard needs the package tensorboard \(pip install tensorboard\)"):
        log = RunLog(tmp_path, tensorboard=True)
        log.add(ROWS[0])  # where the writer is opened with the first row


def test_event_files_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path, tensorboard=True)
    log.add(ROWS[0])
    log.write()
    log.close()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))

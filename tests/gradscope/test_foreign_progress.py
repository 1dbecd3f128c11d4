"""Folders of foreign checkpoints: order, copies, epochs, and what is not one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradscope.errors import CheckpointError, UsageError
from gradscope.foreign import ForeignCheckpoint, foreign_files, read_foreign, run_of
from gradscope.foreign.progress import epoch_in_name


def checkpoint(path: str, epoch: float | None, **more: object) -> ForeignCheckpoint:
    values = {"layout": "moco-v3", "method": "mocov3", "backbone": {"cls_token": torch.ones(1, 1, 4)}, **more}
    return ForeignCheckpoint(path=Path(path), epoch=epoch, **values)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in foreign_files(folder)]


def test_files_in_natural_order_without_those_that_hold_no_model(tmp_path: Path) -> None:
    files = ("checkpoint_0010.pth.tar", "checkpoint_2.pth.tar", "last.ckpt", "optimizer.pt", "training_args.bin")
    for name in (*files, "rng_state_0.pth", "log.txt", "args.json"):
        (tmp_path / name).touch()
    for step in (90, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").touch()
    assert names(tmp_path) == [
        "checkpoint-90/model.safetensors", "checkpoint-1000/model.safetensors", "checkpoint_2.pth.tar",
        "checkpoint_0010.pth.tar", "last.ckpt",
    ]  # fmt: skip


def test_folders_without_checkpoints_and_sharded_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        foreign_files(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(\*\.pt, "):
        foreign_files(tmp_path)
    (tmp_path / "ckpt-199").mkdir()
    (tmp_path / "ckpt-199" / ".metadata").touch()
    with pytest.raises(CheckpointError, match=r"ckpt-199: is sharded over files by torch\.distributed"):
        foreign_files(tmp_path)


def test_progress_is_epochs_completed_over_all() -> None:
    found = [checkpoint("r/checkpoint_0299.pth.tar", 300), checkpoint("r/checkpoint_0029.pth.tar", 30)]
    run = run_of(found, Path("r"), epochs=300)
    assert [(c.path.name, c.step, c.progress) for c in run.checkpoints] == [
        ("checkpoint_0029.pth.tar", 30, 0.1),
        ("checkpoint_0299.pth.tar", 300, 1.0),
    ]
    assert run_of([checkpoint("r/a1", 30, total_epochs=60.0)], Path("r")).checkpoints[0].progress == 0.5
    assert run_of([checkpoint("r/a1", 30, total_epochs=60.0)], Path("r"), 120).checkpoints[0].progress == 0.25
    steps = [checkpoint("r/a1", 1, step=500), checkpoint("r/a2", 2, step=1000)]
    assert [c.step for c in run_of(steps, Path("r"), 2).checkpoints] == [500, 1000]


def test_copies_of_an_epoch_are_left_out_and_named() -> None:
    found = [
        checkpoint("r/checkpoint-9.pth.tar", 10),
        checkpoint("r/last.pth.tar", 10),
        checkpoint("r/checkpoint-4.pth.tar", 5),
        checkpoint("r/model_best.pth.tar", 5),
        checkpoint("r/recovery-4-100.pth.tar", 5),
        checkpoint("r/checkpoint.pth", 7),
    ]
    run = run_of(found, Path("r"), epochs=10)
    assert [c.path.name for c in run.checkpoints] == ["checkpoint-4.pth.tar", "checkpoint.pth", "checkpoint-9.pth.tar"]
    assert run.left_out == {
        "last.pth.tar": "checkpoint-9.pth.tar",
        "model_best.pth.tar": "checkpoint-4.pth.tar",
        "recovery-4-100.pth.tar": "checkpoint-4.pth.tar",
    }


def test_epochs_that_nobody_tells_are_asked_for() -> None:
    with pytest.raises(UsageError, match=r"r: its moco-v3 files do not tell how many epochs .* add --epochs N"):
        run_of([checkpoint("r/a1", 1)], Path("r"))
    with pytest.raises(UsageError, match="differ in how many epochs"):
        run_of([checkpoint("r/a1", 1, total_epochs=5.0), checkpoint("r/a2", 2, total_epochs=6.0)], Path("r"))
    with pytest.raises(CheckpointError, match=r"model\.pth tell no epoch; rename the files to epoch-N"):
        run_of([checkpoint("r/model.pth", None)], Path("r"), epochs=5)
    with pytest.raises(CheckpointError, match="is of epoch 9, beyond the run's 5"):
        run_of([checkpoint("r/a9", 9)], Path("r"), epochs=5)
    with pytest.raises(UsageError, match="--epochs 0"):
        run_of([checkpoint("r/a0", 0)], Path("r"), epochs=0)


def test_checkpoints_of_two_runs_are_refused() -> None:
    with pytest.raises(CheckpointError, match="is a DINO checkpoint, a1 a moco-v3 one"):
        run_of([checkpoint("r/a1", 1), checkpoint("r/a2", 2, layout="DINO", method="dino")], Path("r"), 2)
    other = checkpoint("r/a2", 2, backbone={"cls_token": torch.ones(1, 1, 8)})
    with pytest.raises(CheckpointError, match=r"cls_token is \(1, 1, 8\), in a1 \(1, 1, 4\)"):
        run_of([checkpoint("r/a1", 1), other], Path("r"), 2)


@pytest.mark.parametrize(
    ("name", "epoch"),
    [("epoch-12.pth", 12), ("epoch%3D7.ckpt", 7), ("vit-b-300ep.pth.tar", 300), ("ckpt_3.pt", 3), ("model.pth", None)],
)
def test_epochs_in_names(name: str, epoch: float | None) -> None:
    assert epoch_in_name(Path(name)) == epoch


def test_a_file_that_tells_no_epoch_has_that_of_its_name(tmp_path: Path) -> None:
    from tests.gradscope.foreign_models import ViT

    save_file(ViT().state_dict(), tmp_path / "epoch-12.safetensors")
    assert read_foreign(tmp_path / "epoch-12.safetensors").epoch == 12
    (tmp_path / "trainer_state.json").write_text(json.dumps([]))

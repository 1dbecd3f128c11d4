"""Foreign files are read without running anything in them, and refused with the reason and the cure."""

from __future__ import annotations

import argparse
import os
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradscope.errors import CheckpointError
from gradscope.foreign.reading import read_file


class Payload:
    """What a malicious file holds: unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_does_not_run_and_is_named(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": {"w": torch.ones(2)}, "args": Payload(f"touch {tmp_path / 'ran'}")}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: not loaded, .*posix\.system.*save it again") as error:
        read_file(path)
    assert not (tmp_path / "ran").exists() and len(str(error.value).splitlines()) == 1
    torch.load(path, weights_only=False)  # the payload is a real one
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_argparse_and_numpy_leave_is_read(tmp_path: Path, zipped: bool) -> None:
    content = {
        "model": {"w": torch.arange(3.0)},
        "args": argparse.Namespace(epochs=5),
        "optimizer": {"param_groups": [{"lr": np.float64(0.25), "half": np.float32(0.5), "n": np.int64(3)}]},
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    allowed = set(map(str, torch.serialization.get_safe_globals()))
    read = read_file(tmp_path / "a.pth")
    assert read["args"].epochs == 5 and torch.equal(read["model"]["w"], torch.arange(3.0))
    assert read["optimizer"]["param_groups"][0] == {"lr": 0.25, "half": 0.5, "n": 3}
    assert set(map(str, torch.serialization.get_safe_globals())) == allowed  # nothing stays allowed for others


def test_numbers_as_older_numpy_wrote_them(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "lr": np.float64(0.25)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(name, content)
    assert read_file(tmp_path / "old.pth")["lr"] == 0.25


def test_safetensors(tmp_path: Path) -> None:
    save_file({"cls_token": torch.arange(4.0)}, tmp_path / "model.safetensors")
    assert torch.equal(read_file(tmp_path / "model.safetensors")["cls_token"], torch.arange(4.0))
    (tmp_path / "broken.safetensors").write_bytes(b"\x01" * 40)
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: cannot be read as safetensors"):
        read_file(tmp_path / "broken.safetensors")


def test_pickled_modules_are_refused_with_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lightly_train._checkpoint")
    kind = type("Model", (nn.Linear,), {"__module__": module.__name__})
    module.Model = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightly_train", types.ModuleType("lightly_train"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"state_dict": {}, "lightly_train": kind(2, 2)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"lightly-train keeps whole pickled modules .*lightly_train\.export"):
        read_file(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.pth",
            {"model": {"_fsdp_wrapped_module._flat_param": torch.ones(9)}},
            "flattened by FSDP .*FULL_STATE_DICT",
        ),
        ("a.pth", {"state": {0: {"exp_avg_sq": torch.ones(2)}}, "param_groups": []}, "state of an optimizer and no"),
        ("a.pth", {"optimizer": {"state": {}}, "epoch": 3}, "state of an optimizer and no"),
        ("a.pth", {"lightly_train": {}, "state_dict": {}}, "lightly-train; export"),
        ("a.pth", [torch.ones(2)], "holds a list, not a dict"),
        ("model_0012.rank_1.pth", {"model": {"w": torch.ones(2)}}, "the shard of one rank"),
        ("pytorch_model-00001-of-00003.bin", {"w": torch.ones(2)}, "is part 1 of 3"),
    ],
)
def test_files_without_a_whole_model(tmp_path: Path, name: str, content: Any, message: str) -> None:
    torch.save(content, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: .*{message}"):
        read_file(tmp_path / name)


def test_rank_0_is_a_shard_only_beside_others(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "ep1-rank0.pt")
    assert set(read_file(tmp_path / "ep1-rank0.pt")) == {"model"}
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "ep1-rank1.pt")
    with pytest.raises(CheckpointError, match="shard of one rank \\(beside 1 others\\)"):
        read_file(tmp_path / "ep1-rank0.pt")


def test_missing_damaged_and_sharded_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_file(tmp_path / "nothing.pth")
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(CheckpointError, match="damaged or not one"):
        read_file(tmp_path / "half.pth")
    (tmp_path / "199").mkdir()
    (tmp_path / "199" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"sharded over files by torch\.distributed\.checkpoint.*dcp_to_torch"):
        read_file(tmp_path / "199")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_file(tmp_path)

"""Checkpoint files of the bundled trainer: `step-*.pt`, written whole or not at all, loaded without running code."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gradscope.errors import CheckpointError
from gradscope.files import write_atomically
from gradscope.task import Checkpoint

FORMAT = 1
REQUIRED = (
    "format",
    "config",
    "schedule",
    "model",
    "optimizer",
    "parameter_names",
    "step",
    "units",
    "samples",
    "seconds",
    "rng",
)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically; `content` holds tensors and plain values under the names of REQUIRED.

    Raises WriteError where that cannot be; a file of that name is then as it was.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            write_checkpoint(stream, content)

    write_atomically(path, write)


def write_checkpoint(stream: BinaryIO, content: dict[str, Any]) -> None:
    """Write a checkpoint to an open file, so that the archive carries no file's name."""
    torch.save({"format": FORMAT, **content}, stream)


def load_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of the bundled trainer onto the CPU, with `weights_only=True`.

    `mmap` leaves tensors on disk until they are used: for reading step, units and settings alone.
    The checksums of what is read are checked, which `torch.load` does not. Raises CheckpointError when the file is
    missing, damaged, of a newer format, or not the trainer's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint, it is damaged or not one (no archive, as torch.save writes them)"
        )
    try:
        check_archive(path, tensors=not mmap)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint, it is damaged or not one ({reason}); move it away and "
            "run the same command again"
        ) from error
    if not isinstance(content, dict) or any(name not in content for name in REQUIRED):
        raise CheckpointError(f"{path}: not a checkpoint of `gradscope train`; profile it with --task module:Class")
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: written by a newer gradscope (format {content['format']}, known up to {FORMAT}); update gradscope"
        )
    return content


def check_archive(path: Path, *, tensors: bool = True) -> None:
    """Read the records of a file of `torch.save` against their checksums; without `tensors`, all but those.

    Raises zipfile.BadZipFile for a wrong one, or a file that is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{record.filename} is compressed, which torch.save does not do")
            if tensors or "/data/" not in record.filename:
                with archive.open(record) as stream:
                    while stream.read(1 << 20):
                        pass


def list_steps(folder: Path) -> list[Path]:
    """The `step-*.pt` files of a folder by step; none where there is no folder."""
    found = folder.glob("step-*.pt") if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.stem)), key=_step_of)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files that a killed run left in its folder."""
    written = r"(step-\d+\.pt|resume\.pt|log\.jsonl|config\.toml|followed\.json|\.log\.jsonl\.probe)"
    for path in folder.glob(".*") if folder.is_dir() else ():
        if re.fullmatch(rf"\.{written}\.([0-9a-f]{{8}}\.)?\d+\.tmp|\.log\.jsonl\.probe", path.name):
            path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The `step-*.pt` files of a run by step, with the progress they record.

    Raises CheckpointError when there are none.
    """
    if not folder.is_dir():
        there = "a file" if folder.is_file() else "no such folder"
        raise CheckpointError(f"{folder}: {there}; give the folder that `gradscope train --out` wrote")
    found = []
    for path in list_steps(folder):
        content = load_checkpoint(path, mmap=True)
        found.append(Checkpoint(path, content["step"], min(content["units"] / content["config"]["budget"], 1.0)))
    if not found:
        raise CheckpointError(
            f"{folder}: holds no checkpoint (step-*.pt); make some with `gradscope train --out {folder}`"
        )
    return found


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))

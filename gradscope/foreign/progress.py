"""A folder of foreign checkpoints as positions in one run: natural order, copies of one epoch left out.

Progress is epochs completed over epochs in all. Most code bases write the first into the file, few the second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradscope.errors import CheckpointError, UsageError
from gradscope.foreign.checkpoint import ForeignCheckpoint
from gradscope.foreign.reading import refuse_folder, some_names
from gradscope.task import Checkpoint

SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".safetensors", ".bin")
_NO_MODEL = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|random_states)[^/]*")
_INNER_FILES = ("model.safetensors", "pytorch_model.bin")  # of a trainer's folder checkpoint-N


def epoch_in_name(path: Path) -> float | None:
    """The number of epochs that a file's name tells (`epoch-12`, `ckpt_12`, `vit-300ep`), or None."""
    name = path.name.replace("%3D", "=")
    found = re.search(r"(?<![a-zA-Z])(?:epochs?|ep|checkpoint|ckpt)[-_=]?(\d+)", name)
    found = found or re.search(r"(\d+)ep(?:ochs)?\b", name)
    return float(found[1]) if found else None


def foreign_files(folder: Path) -> list[Path]:
    """Files of a folder that may hold models, in natural order (2 before 10), and those of subfolders `checkpoint-N`.

    Raises CheckpointError when there are none, or when the folder is one sharded checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder that holds the checkpoints")
    refuse_folder(folder)
    found = [p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file() and not _NO_MODEL.fullmatch(p.name)]
    for inner in (p for p in folder.iterdir() if p.is_dir()):
        refuse_folder(inner)
        files = [inner / name for name in _INNER_FILES if (inner / name).is_file()]
        found += files[:1] if inner.name.startswith("checkpoint") else []
    if not found:
        raise CheckpointError(f"{folder}: holds no checkpoint ({', '.join('*' + suffix for suffix in SUFFIXES)})")
    return sorted(found, key=lambda path: _natural(path.relative_to(folder)))


@dataclass(frozen=True)
class Run:
    """The checkpoints of one foreign run by progress, its epochs in all, and copies that are left out: copy, kept."""

    checkpoints: tuple[Checkpoint, ...]
    total_epochs: float
    left_out: Mapping[str, str]


def run_of(found: Sequence[ForeignCheckpoint], folder: Path, epochs: float | None = None) -> Run:
    """Put the checkpoints in order. `epochs`: of the whole run, where the files cannot tell (or tell wrong).

    Raises UsageError when the number of epochs in all is not known, CheckpointError for a file without an epoch, one
    beyond the end, or one that another run wrote.
    """
    for other in found[1:]:
        _check_same(found[0], other)
    unknown = [one.path.name for one in found if one.epoch is None]
    if unknown:
        raise CheckpointError(
            f"{folder}: {some_names(unknown)} tell no epoch; rename the files to epoch-N with the suffix they have"
        )
    known = {one.total_epochs for one in found} - {None}
    if epochs is None and len(known) != 1:
        what = "differ in" if known else "do not tell"
        raise UsageError(f"{folder}: its {found[0].layout} files {what} how many epochs the run has; add --epochs N")
    total = epochs if epochs is not None else next(iter(known - {None}), None)
    assert total is not None
    if not total > 0:
        raise UsageError(f"--epochs {total:g}: the run has more than 0 epochs")
    chosen: dict[float, ForeignCheckpoint] = {}
    left_out: dict[str, str] = {}
    for one in sorted(found, key=_preference):
        assert one.epoch is not None
        if one.epoch > total:
            raise CheckpointError(f"{one.path}: is of epoch {one.epoch:g}, beyond the run's {total:g}; give --epochs N")
        kept = chosen.setdefault(one.epoch, one)
        if kept is not one:
            left_out[_shown(one.path, folder)] = _shown(kept.path, folder)
    steps = {one.step for one in chosen.values()}
    by_step = None not in steps and len(steps) == len(chosen)
    checkpoints = tuple(
        Checkpoint(one.path, int(one.step if by_step and one.step is not None else epoch), epoch / total)
        for epoch, one in sorted(chosen.items())
    )
    return Run(checkpoints, total, left_out)


def _check_same(first: ForeignCheckpoint, other: ForeignCheckpoint) -> None:
    if (first.layout, first.method) != (other.layout, other.method):
        raise CheckpointError(
            f"{other.path}: is a {other.layout} checkpoint, {first.path.name} a {first.layout} one; "
            "profile one run at a time"
        )
    for name in first.backbone.keys() | other.backbone.keys():
        shapes = [tuple(one.backbone[name].shape) if name in one.backbone else None for one in (first, other)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{other.path}: {name} is {shapes[1]}, in {first.path.name} {shapes[0]}; profile one run at a time"
            )


def _preference(one: ForeignCheckpoint) -> tuple[bool, int, list[tuple[int, int, str]]]:
    """Of copies of one epoch the one with a number in its name is kept, the furthest first, then by name."""
    passing = one.path.name.startswith(("last", "recovery", "model_best", "best", "tmp"))
    return (passing or not re.search(r"\d", str(one.path)), -(one.step or 0), _natural(one.path))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts runs of digits as numbers."""
    return [
        (0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in re.split(r"(\d+)", str(path)) if piece
    ]


def _shown(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))

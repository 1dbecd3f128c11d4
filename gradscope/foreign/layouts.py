"""Which code base wrote a checkpoint, seen from its keys, and the checkpoint as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gradscope.errors import CheckpointError
from gradscope.foreign.backbones import bare, hugging_face, mae, timm
from gradscope.foreign.checkpoint import ForeignCheckpoint
from gradscope.foreign.lightning import is_lightning, lightning
from gradscope.foreign.names import is_hugging_face, unwrapped
from gradscope.foreign.pretraining import dino, mocov3, openmmlab
from gradscope.foreign.progress import epoch_in_name, foreign_files
from gradscope.foreign.reading import read_file, some_names

KNOWN = "moco-v3, DINO, MAE, timm, lightly, solo-learn, mmselfsup, Hugging Face ViT"


def read_foreign(path: Path) -> ForeignCheckpoint:
    """The checkpoint of another code base at `path`, with every tensor of its backbone.

    Raises CheckpointError, naming the file, the tensors and the cure, when it cannot be read, is in no known layout or
    holds another model than a plain ViT.
    """
    found = interpreted(read_file(path), path)
    return found if found.epoch is not None else replace(found, epoch=epoch_in_name(path))


def interpreted(content: Mapping[str, Any], path: Path) -> ForeignCheckpoint:
    """The value of a file's content; `path` is where messages say it is from, and where JSON files may lie."""
    state = content.get("state_dict")
    if isinstance(content.get("teacher"), Mapping):
        return dino(content, path)
    if is_lightning(content):
        return lightning(content, path)
    if isinstance(state, Mapping):
        names = unwrapped(state)
        if any(name.startswith("base_encoder.") for name in names):
            return mocov3(content, path)
        if "patch_embed.projection.weight" in names or "backbone.patch_embed.projection.weight" in names:
            return openmmlab(content, path)
        return hugging_face(state, path) if is_hugging_face(names) else timm(content, path)
    model = content.get("model")
    if isinstance(model, Mapping):
        masked = any(name == "mask_token" or name.startswith("decoder_") for name in unwrapped(model))
        return mae(content, path) if masked else timm(content, path, "model")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        return hugging_face(tensors, path) if is_hugging_face(unwrapped(tensors)) else bare(tensors, path)
    raise CheckpointError(
        f"{path}: in none of the layouts known ({KNOWN}); it holds {some_names([str(name) for name in content])}"
    )


def is_foreign(path: Path) -> bool:
    """Whether a checkpoint file is not one of `gradscope train`. Raises CheckpointError when it cannot be read."""
    return not {"format", "config", "model", "units"} <= set(read_file(path))


def holds_foreign(folder: Path) -> bool:
    """Whether a folder holds checkpoints, but none of `gradscope train` (`step-*.pt`)."""
    own = sorted(path for path in folder.glob("step-*.pt") if path.is_file())
    try:
        return is_foreign(own[0]) if own else bool(foreign_files(folder))
    except CheckpointError:  # unreadable, or no files at all: the reason is told where they are opened
        return not own and folder.is_dir() and any(folder.glob("*.distcp"))

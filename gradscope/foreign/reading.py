"""Reading checkpoint files of other code bases without running anything that they contain.

`.safetensors` files hold tensors alone. All others go through `torch.load(weights_only=True)`, with a short list of
harmless classes allowed besides torch's own: what argparse and NumPy leave in training checkpoints. A file that needs
more is refused by name; there is no way round that through pickle.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradscope.errors import CheckpointError

SHOWN = 6  # names in one error message
_NUMBERS = ("?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d")
_RESAVE = (
    "where you trust the file, save it again with tensors and plain numbers alone: c = torch.load(f, "
    "weights_only=False); torch.save({k: c[k] for k in ('state_dict', 'epoch')}, f)"
)


def read_file(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file on the CPU, tensors left on disk until they are used where that is possible.

    A `.safetensors` file gives a flat dict of tensors. Raises CheckpointError, naming the file and the cure, for files
    that are missing, damaged, shards of a larger checkpoint, that need code to be read, or hold no model.
    """
    if path.is_dir():
        refuse_folder(path)
        raise CheckpointError(f"{path}: is a folder; give a checkpoint file")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    _refuse_shard(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    _refuse_unusable(content, path)
    return content


def refuse_folder(folder: Path) -> None:
    """Raise CheckpointError where a folder is one sharded checkpoint of torch.distributed.checkpoint (DCP)."""
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"{folder}: is sharded over files by torch.distributed.checkpoint; join it first with "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} joined.pth`"
        )


def allowed_globals() -> list[type | Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What may stand in a file besides torch's own list: plain containers and single numbers, nothing that acts."""
    from numpy._core.multiarray import scalar

    dtypes = {type(np.dtype(code)) for code in _NUMBERS}
    return [
        argparse.Namespace,
        OrderedDict,
        np.dtype,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 wrote it
        *dtypes,
    ]


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors, it is damaged or not one ({error})") from error


def _read_pickled(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(allowed_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        if offending := _offending_globals(path, str(error)):
            raise CheckpointError(_refusal(path, offending)) from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        why = next((line for line in lines if "Unpickler error:" in line), lines[0])[:200]
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint, it is damaged or not one ({why}); copy it again"
        ) from error
    if isinstance(content, Mapping):
        return dict(content)
    raise CheckpointError(
        f"{path}: holds a {type(content).__name__}, not a dict; save the model's state_dict() instead"
    )


def _offending_globals(path: Path, message: str) -> list[str]:
    """Names in the file's pickle that `weights_only` refuses, without importing any of them."""
    found: list[str] = []
    with suppress(Exception), torch.serialization.safe_globals(allowed_globals()):  # not of torch.save's newer format
        found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if not found:
        found = re.findall(r"(?:unsupported GLOBAL|Unsupported global: GLOBAL|Unsupported class) (\S+)", message)
    return [name.strip("'\"") for name in found]


def _refusal(path: Path, offending: list[str]) -> str:
    names = some_names(offending)
    if any(name.startswith(("lightly_train", "lightly.train")) for name in offending):
        return (
            f"{path}: a checkpoint of lightly-train keeps whole pickled modules ({names}), which cannot be read "
            "without running their code; export the weights with `lightly_train.export`"
        )
    if any(name.startswith("torch.distributed") for name in offending):
        return f"{path}: holds shards of a distributed model ({names}); save a full, unsharded state dict"
    return f"{path}: not loaded, for its pickle asks for {names}, which could run code; {_RESAVE}"


def _refuse_shard(path: Path) -> None:
    if match := re.search(r"-(\d{5})-of-(\d{5})\.", path.name):
        raise CheckpointError(f"{path}: is part {int(match[1])} of {int(match[2])}; save the model in one file")
    ranked = re.match(r"(.*rank[_-]?)(\d+)(.*)", path.name)
    if ranked is None:
        return
    others = [p for p in path.parent.glob("*") if p != path and _same_but_number(p.name, ranked)]
    if others or int(ranked[2]):
        raise CheckpointError(
            f"{path}: is the shard of one rank (beside {len(others)} others); save a full, unsharded state dict"
        )


def _same_but_number(name: str, ranked: re.Match[str]) -> bool:
    return re.fullmatch(re.escape(ranked[1]) + r"\d+" + re.escape(ranked[3]), name) is not None


def _refuse_unusable(content: Mapping[str, Any], path: Path) -> None:
    if "lightly_train" in content:
        raise CheckpointError(f"{path}: a checkpoint of lightly-train; export the weights with `lightly_train.export`")
    tensors = dict(_tensors(content))
    flat = [name for name in tensors if "_flat_param" in name or "_fsdp_wrapped_module" in name]
    if flat:
        raise CheckpointError(
            f"{path}: holds parameters flattened by FSDP ({flat[0]}), whose shapes are lost; save it with "
            "StateDictType.FULL_STATE_DICT"
        )
    sharded = [name for name, value in tensors.items() if type(value).__name__ in ("DTensor", "ShardedTensor")]
    if sharded:
        raise CheckpointError(f"{path}: {sharded[0]} is sharded over ranks; save a full, unsharded state dict")
    names = set(content)
    if {"state", "param_groups"} <= names or names <= {"optimizer", "scheduler", "scaler", "epoch", "step"}:
        raise CheckpointError(f"{path}: holds the state of an optimizer and no model; give the file beside it")


def _tensors(content: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Tensors of a dict and of the dicts in it, two levels deep at most: where models stand in checkpoints."""
    found = [(str(name), value) for name, value in content.items() if isinstance(value, Tensor)]
    for inner in content.values():
        if isinstance(inner, Mapping):
            found += [(str(name), value) for name, value in inner.items() if isinstance(value, Tensor)]
    return found


def some_names(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

"""Files that hold a backbone alone: timm, MAE, Hugging Face, and bare state dicts such as DINO's `*_pretrain.pth`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gradscope.foreign.checkpoint import ForeignCheckpoint
from gradscope.foreign.names import backbone_of, from_hugging_face, unwrapped
from gradscope.foreign.pretraining import SMALL_HEADS
from gradscope.foreign.values import json_beside, number_in, values_of

HUGGING_FACE_EPS = 1e-12


def mae(content: Mapping[str, Any], path: Path) -> ForeignCheckpoint:
    """`{model, optimizer, epoch, scaler, args}` with `mask_token` and `decoder_*`; `epoch` is an index."""
    backbone, rest = backbone_of(unwrapped(content["model"]), path)
    settings, index = values_of(content.get("args")), number_in(content, "epoch")
    return ForeignCheckpoint(
        path=path, layout="MAE", method=None, backbone=backbone, leftovers=tuple(rest), settings=settings,
        epoch=None if index is None else index + 1, total_epochs=number_in(settings, "epochs"),
        lacking="MAE reconstructs pixels, which is none of the losses mocov3, simclr, dino",
    )  # fmt: skip


def timm(content: Mapping[str, Any], path: Path, key: str = "state_dict") -> ForeignCheckpoint:
    """`{state_dict, state_dict_ema, epoch, args, ...}` in timm's own names; `epoch` is an index. Not the average."""
    state = unwrapped(content[key])
    backbone, rest = backbone_of(state, path)
    settings, index = values_of(content.get("args")), number_in(content, "epoch")
    small = backbone["cls_token"].shape[-1] == 384 and "best_acc1" in content  # a linear classifier of moco-v3
    return ForeignCheckpoint(
        path=path, layout="timm", method=None, backbone=backbone, settings=settings, leftovers=tuple(rest),
        epoch=None if index is None else index + 1, total_epochs=number_in(settings, "epochs"),
        heads_count=SMALL_HEADS if small else None,
    )  # fmt: skip


def bare(tensors: Mapping[str, Tensor], path: Path) -> ForeignCheckpoint:
    """A flat dict of tensors in timm's names: DINO's backbone file where it has no classifier, timm's where it has."""
    backbone, rest = backbone_of(unwrapped(tensors), path)
    layout = "timm" if "head.weight" in rest else "backbone in timm's names (timm or DINO)"
    return ForeignCheckpoint(path=path, layout=layout, method=None, backbone=backbone, leftovers=tuple(rest))


def hugging_face(tensors: Mapping[str, Tensor], path: Path) -> ForeignCheckpoint:
    """A ViT of transformers, with `config.json` and a trainer's `trainer_state.json` beside it where they are there."""
    backbone, rest = backbone_of(from_hugging_face(unwrapped(tensors)), path)
    config, state = json_beside(path, "config.json"), json_beside(path, "trainer_state.json")
    heads, eps = number_in(config, "num_attention_heads"), number_in(config, "layer_norm_eps")
    epoch, step, last = (number_in(state, name) for name in ("epoch", "global_step", "max_steps"))
    total = number_in(state, "num_train_epochs")
    if epoch is not None and step and last:
        total = epoch * last / step  # as many epochs as `max_steps` makes, whatever the wish was
    numbered = re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
    if step is None and numbered:
        step = float(numbered[1])
    notes = () if config else ("no config.json beside it: norms' epsilon 1e-12 is the library's default",)
    return ForeignCheckpoint(
        path=path, layout="Hugging Face ViT", method=None, backbone=backbone, leftovers=tuple(rest),
        epoch=epoch, total_epochs=total, step=None if step is None else int(step),
        heads_count=None if heads is None else int(heads), heads_told=heads is not None,
        norm_eps=HUGGING_FACE_EPS if eps is None else eps, settings=config, notes=notes,
    )  # fmt: skip

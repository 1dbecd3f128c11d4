"""Lightning checkpoints of lightly and solo-learn: `{epoch, global_step, state_dict, loops, ...}`.

`epoch` in them is the index of the current epoch; newer files count beside it the epochs that were gone through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gradscope.foreign.checkpoint import ForeignCheckpoint, Tensors
from gradscope.foreign.names import backbone_of, dino_head_names, given, part, same_weight, unwrapped
from gradscope.foreign.pretraining import SMALL_HEADS
from gradscope.foreign.values import json_beside, number_in, values_of

_KEY_BACKBONES = ("key_backbone.", "backbone_momentum.", "momentum_backbone.")
_KEY_HEADS = ("key_projection_head.", "projection_head_momentum.", "momentum_projection_head.")


def is_lightning(content: Mapping[str, Any]) -> bool:
    marks = ("pytorch-lightning_version", "loops", "global_step", "callbacks")
    return isinstance(content.get("state_dict"), Mapping) and any(mark in content for mark in marks)


def lightning(content: Mapping[str, Any], path: Path) -> ForeignCheckpoint:
    """A checkpoint of lightly's or solo-learn's modules, told apart by the names of their heads."""
    state = unwrapped(content["state_dict"])
    solo = json_beside(path, "args.json")
    heads = ("projection_head.", "student_head.", "student_projection_head.", *_KEY_HEADS)
    found = lightly(state, path) if any(name.startswith(heads) for name in state) else solo_learn(state, path, solo)
    hyper = values_of(content.get("hyper_parameters"))
    total = number_in(solo, "max_epochs", "trainer.max_epochs")
    if total is None:
        total = number_in(hyper, "max_epochs", "epochs", "trainer.max_epochs")
    index, step = number_in(content, "epoch"), number_in(content, "global_step")
    whole = number_in(content, "loops.fit_loop.epoch_progress.current.processed")  # less by one in mid-epoch
    return replace(
        found,
        epoch=whole if whole is not None or index is None else index + 1,
        step=None if step is None else int(step),
        total_epochs=total,
        settings={**hyper, **found.settings},
    )


def lightly(state: Tensors, path: Path) -> ForeignCheckpoint:
    """lightly's modules. In its DINO `backbone` is the teacher's, `student_backbone` the one that is trained."""
    student = part(state, "student_backbone.")
    if student:
        return _lightly_dino(state, student, path)
    online, key = part(state, "backbone."), part(state, *_KEY_BACKBONES)
    backbone, rest = backbone_of(_inside(online), path, what="backbone.")
    used = ["backbone.", "projection_head."]
    if not key:
        heads = given(projector=part(state, "projection_head.layers.", "projection_head."))
        return ForeignCheckpoint(
            path=path, layout="lightly SimCLR", method="simclr" if heads else None, backbone=backbone, heads=heads,
            leftovers=_leftovers(state, rest, used),
            notes=("temperature 0.1: the file does not tell it",) if heads else (),
        )  # fmt: skip
    slow, slow_rest = backbone_of(_inside(key), path, what="key backbone's ")
    heads = given(
        projector=part(state, "projection_head.layers.", "projection_head."),
        predictor=part(state, "prediction_head.layers.", "prediction_head."),
        momentum_projector=part(state, *(name + "layers." for name in _KEY_HEADS), *_KEY_HEADS),
    )
    used += [*_KEY_BACKBONES, *_KEY_HEADS, "prediction_head."]
    queue = any(name.startswith("criterion.memory_bank.") for name in state)
    complete = {"projector", "predictor", "momentum_projector"} <= set(heads) and not queue
    return ForeignCheckpoint(
        path=path, layout="lightly MoCo", method="mocov3" if complete else None, backbone=backbone,
        momentum_backbone=slow, heads=heads, leftovers=_leftovers(state, [*rest, *slow_rest], used),
        notes=("temperature 0.2, the recipe's for ViT: the file does not tell it",) if complete else (),
        lacking="its loss is that of MoCo with a queue of keys" if queue else "MoCo without a prediction head",
    )  # fmt: skip


def _lightly_dino(state: Tensors, student: Mapping[str, Tensor], path: Path) -> ForeignCheckpoint:
    backbone, rest = backbone_of(_inside(student), path, what="student_backbone.")
    teacher = part(state, "teacher_backbone.", "backbone.")
    slow, slow_rest = backbone_of(_inside(teacher), path, what="teacher's backbone.") if teacher else ({}, [])
    roles = (
        ("student_head.", "student_projection_head."),
        ("teacher_head.", "teacher_projection_head.", "projection_head."),
    )
    heads = given(head=_lightly_head(part(state, *roles[0])), momentum_head=_lightly_head(part(state, *roles[1])))
    centre = part(state, "criterion.center.", "criterion.").get("center")
    used = ["student_backbone.", "teacher_backbone.", "backbone.", *roles[0], *roles[1], "criterion.center"]
    complete = bool(slow) and {"head", "momentum_head"} <= set(heads)
    return ForeignCheckpoint(
        path=path, layout="lightly DINO", method="dino" if complete else None, backbone=backbone,
        momentum_backbone=slow or None, heads=heads, centre=None if centre is None else centre.reshape(1, -1),
        leftovers=_leftovers(state, [*rest, *slow_rest], used), lacking="it has no teacher or no heads",
        notes=("the backbone that lightly calls `backbone` is the teacher's",) if part(state, "backbone.") else (),
    )  # fmt: skip


def solo_learn(state: Tensors, path: Path, arguments: Mapping[str, Any]) -> ForeignCheckpoint:
    """solo-learn: `backbone.*` (older: `encoder.*`), `projector`, `predictor`, `head` and their `momentum_` copies."""
    online = part(state, "backbone.", "encoder.")
    backbone, rest = backbone_of(_inside(online), path, what="backbone.")
    momentum = part(state, "momentum_backbone.", "momentum_encoder.")
    slow, slow_rest = backbone_of(_inside(momentum), path, what="momentum_backbone.") if momentum else ({}, [])
    heads = given(
        projector=part(state, "projector."),
        predictor=part(state, "predictor."),
        momentum_projector=part(state, "momentum_projector."),
        head=dino_head_names(part(state, "head.")),
        momentum_head=dino_head_names(part(state, "momentum_head.")),
    )
    named = str(arguments.get("method", "")).replace("_", "").replace("plus", "").lower()
    methods = {
        "mocov3": bool(slow) and {"projector", "predictor", "momentum_projector"} <= set(heads),
        "dino": bool(slow) and {"head", "momentum_head"} <= set(heads),
        "simclr": set(heads) == {"projector"} and not slow,
    }
    possible = [method for method, complete in methods.items() if complete and (named or method) == method]
    centre = part(state, "dino_loss_func.").get("center")
    kernel = "patch_embed.proj.weight"
    used = ["backbone.", "encoder.", "momentum_backbone.", "momentum_encoder.", *(f"{role}." for role in _SOLO_ROLES)]
    layout = f"solo-learn {named}".strip() if heads else "Lightning"
    unknown = f"solo-learn's method {named!r} is none of mocov3, simclr, dino" if named and not possible else ""
    return ForeignCheckpoint(
        path=path, layout=layout, method=possible[0] if possible else None, backbone=backbone,
        momentum_backbone=slow or None, heads=heads, centre=None if centre is None else centre.reshape(1, -1),
        heads_count=SMALL_HEADS if possible == ["mocov3"] and backbone["cls_token"].shape[-1] == 384 else None,
        frozen_patch_embed=same_weight(backbone[kernel], slow.get(kernel)),
        settings=_solo_settings(arguments), leftovers=_leftovers(state, [*rest, *slow_rest], used),
        lacking=unknown or "it holds no heads of mocov3, simclr or dino",
        notes=() if arguments or not heads else ("no args.json beside it: temperatures are the recipe's",),
    )  # fmt: skip


_SOLO_ROLES = ("projector", "predictor", "momentum_projector", "head", "momentum_head", "dino_loss_func")


def _solo_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's numbers under the names that DINO's and moco-v3's own arguments have."""
    own = {**arguments, **values_of(arguments.get("method_kwargs"))}
    names = {
        "temperature": "temperature",
        "student_temp": "student_temperature",
        "teacher_temp": "teacher_temperature",
        "warmup_teacher_temp": "warmup_teacher_temperature",
        "warmup_teacher_temp_epochs": "warmup_teacher_temperature_epochs",
    }
    found = {name: number for name, theirs in names.items() if (number := number_in(own, theirs)) is not None}
    batch = number_in(arguments, "optimizer.batch_size", "batch_size")
    return {**found, **({} if batch is None else {"batch_size": batch})}


def _inside(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A backbone's tensors, out of lightly's wrapper `vit` or a sequence's first place."""
    return part(tensors, "vit.", "0.") or tensors


def _lightly_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """lightly's DINO head, whose MLP is called `layers`, in DINO's names."""
    return dino_head_names(
        {"mlp." + name[len("layers.") :] if name.startswith("layers.") else name: v for name, v in tensors.items()}
    )


def _leftovers(state: Tensors, rest: list[str], used: list[str]) -> tuple[str, ...]:
    return tuple([*rest, *(name for name in state if not name.startswith(tuple(used)))])

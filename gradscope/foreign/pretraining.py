"""Training checkpoints of moco-v3, DINO and mmselfsup: backbone, heads and all that their losses need.

`epoch` in them is the number of completed epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gradscope.foreign.checkpoint import ForeignCheckpoint
from gradscope.foreign.moments import Moments, moments_of, parameters_of
from gradscope.foreign.names import (
    backbone_of,
    dino_head_names,
    from_openmmlab,
    given,
    head_from_openmmlab,
    part,
    same_weight,
    unwrapped,
)
from gradscope.foreign.values import number_in, values_of

SMALL_HEADS = 12  # moco-v3's ViT-Small, where timm's and DINO's have 6
MOCO_MODELS = {"vit_small": (384, SMALL_HEADS), "vit_base": (768, 12)}  # width and attention heads by `arch`
DINO_MODELS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}


def mocov3(content: Mapping[str, Any], path: Path) -> ForeignCheckpoint:
    """`{epoch, arch, state_dict, optimizer}` with `module.base_encoder.*`, projector in its `head`."""
    state = unwrapped(content["state_dict"])
    encoder, momentum = part(state, "base_encoder."), part(state, "momentum_encoder.")
    projector, momentum_projector = _without(encoder, "head."), _without(momentum, "head.")
    backbone, rest = backbone_of(encoder, path, what="base_encoder.")
    slow, slow_rest = backbone_of(momentum, path, what="momentum_encoder.") if momentum else ({}, [])
    heads = given(projector=projector, predictor=part(state, "predictor."), momentum_projector=momentum_projector)
    names = {f"base_encoder.{name}": f"backbone.{name}" for name in backbone}
    names |= {f"base_encoder.head.{name}": f"projector.{name}" for name in projector}
    names |= {f"predictor.{name}": f"predictor.{name}" for name in heads.get("predictor", {})}
    found = moments_of(content.get("optimizer"), state, [parameters_of(state)], names)
    kernel = "patch_embed.proj.weight"
    frozen = f"base_encoder.{kernel}" in found[1] if found else same_weight(backbone[kernel], slow.get(kernel))
    complete = bool(slow) and {"projector", "predictor", "momentum_projector"} <= set(heads)
    told = _named_heads(content.get("arch"), backbone, MOCO_MODELS)
    return ForeignCheckpoint(
        path=path, layout="moco-v3", method="mocov3" if complete else None, backbone=backbone,
        momentum_backbone=slow or None, heads=heads, moments=found[0] if found else None,
        epoch=number_in(content, "epoch"), frozen_patch_embed=frozen,
        heads_count=SMALL_HEADS if _width(backbone) == 384 else told, heads_told=told is not None,
        leftovers=tuple(rest + slow_rest + _others(state, "base_encoder.", "momentum_encoder.", "predictor.")),
        notes=("temperature 0.2, the recipe's for ViT: the file does not tell it",),
        lacking="it has no projector, predictor or momentum encoder",
    )  # fmt: skip


def dino(content: Mapping[str, Any], path: Path) -> ForeignCheckpoint:
    """`{student, teacher, optimizer, epoch, args, dino_loss}`, or the released one with its older names of the head."""
    student = {_released_head(name): value for name, value in unwrapped(content.get("student", {})).items()}
    teacher = {_released_head(name): value for name, value in unwrapped(content["teacher"]).items()}
    notes = [] if student else ["it holds a teacher alone"]
    trained, slow = student or teacher, teacher if student else {}
    wrapped = part(trained, "backbone.")
    backbone, rest = backbone_of(wrapped or trained, path, what="student." if student else "teacher.")
    teacher_backbone, slow_rest = backbone_of(part(slow, "backbone."), path, what="teacher.") if slow else ({}, [])
    heads = given(head=dino_head_names(part(trained, "head.")), momentum_head=dino_head_names(part(slow, "head.")))
    settings = values_of(content.get("args"))
    centre = unwrapped(content.get("dino_loss") or {}).get("center")
    if centre is None and student:
        notes.append("the file has no centre; it is estimated from the teacher's outputs")
    complete = {"head", "momentum_head"} <= set(heads) and bool(teacher_backbone)
    names = {f"backbone.{name}": f"backbone.{name}" for name in backbone}
    names |= {f"head.{name}": f"head.{name}" for name in heads.get("head", {})}
    found = _dino_moments(content.get("optimizer"), student, names) if student else None
    told = _named_heads(settings.get("arch"), backbone, DINO_MODELS)
    return ForeignCheckpoint(
        path=path, layout="DINO", method="dino" if complete else None, backbone=backbone,
        momentum_backbone=teacher_backbone or None, heads=heads,
        centre=None if centre is None else centre.reshape(1, -1), moments=found,
        epoch=number_in(content, "epoch"), total_epochs=number_in(settings, "epochs"), settings=settings,
        leftovers=tuple(rest + slow_rest + (_others(trained, "backbone.", "head.") if wrapped else [])),
        heads_count=told, heads_told=told is not None, notes=tuple(notes),
        lacking="it has no student, teacher or head",
    )  # fmt: skip


def openmmlab(content: Mapping[str, Any], path: Path) -> ForeignCheckpoint:
    """mmselfsup: `{meta, state_dict}` with `backbone.*`, `neck.*`, `head.predictor.*`, `momentum_encoder.module.*`."""
    state = unwrapped(content["state_dict"])
    backbone, rest = backbone_of(from_openmmlab(part(state, "backbone.")), path, what="backbone.")
    first = part(state, "momentum_encoder.module.0.")
    slow, slow_rest = backbone_of(from_openmmlab(first), path, what="momentum_encoder.") if first else ({}, [])
    heads = given(
        projector=head_from_openmmlab(part(state, "neck.")),
        predictor=head_from_openmmlab(part(state, "head.predictor.")),
        momentum_projector=head_from_openmmlab(part(state, "momentum_encoder.module.1.")),
    )
    complete = bool(slow) and {"projector", "predictor", "momentum_projector"} <= set(heads)
    meta = values_of(content.get("meta"))
    kernel = "patch_embed.proj.weight"
    return ForeignCheckpoint(
        path=path, layout="mmselfsup", method="mocov3" if complete else None, backbone=backbone,
        momentum_backbone=slow or None, heads=heads, epoch=number_in(meta, "epoch"),
        step=None if (step := number_in(meta, "iter")) is None else int(step),
        frozen_patch_embed=same_weight(backbone[kernel], slow.get(kernel)),
        heads_count=SMALL_HEADS if complete and _width(backbone) == 384 else None,
        leftovers=(*rest, *slow_rest, *_others(state, "backbone.", "neck.", "head.predictor.", "momentum_encoder.")),
        notes=("temperature 0.2, the recipe's for ViT: the file does not tell it",) if complete else (),
        lacking="it has no neck, predictor or momentum encoder of MoCo-v3",
    )  # fmt: skip


def _dino_moments(optimizer: Any, student: Mapping[str, Tensor], names: Mapping[str, str]) -> Moments | None:
    """DINO's two groups: first what has two dimensions or more and is no bias, then biases and vectors.

    `weight_g` is among them only where it is trained (`norm_last_layer` off).
    """
    every = parameters_of(student)
    for left_out in ((), ("head.last_layer.weight_g",)):
        ordered = [name for name in every if name not in left_out]
        vectors = [name for name in ordered if name.endswith(".bias") or student[name].ndim == 1]
        found = moments_of(optimizer, student, [[n for n in ordered if n not in vectors], vectors], names)
        if found:
            return found[0]
    return None


def _released_head(name: str) -> str:
    """The head's names in the released full checkpoints, as the released code has them."""
    for old, new in (("head.projection_head.", "head.mlp."), ("head.prototypes.", "head.last_layer.")):
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _without(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors with that prefix out of a dict."""
    taken = part(tensors, prefix)
    for name in taken:
        del tensors[prefix + name]
    return taken


def _others(tensors: Mapping[str, Tensor], *prefixes: str) -> list[str]:
    return [name for name in tensors if not name.startswith(prefixes)]


def _named_heads(arch: Any, backbone: Mapping[str, Tensor], models: Mapping[str, tuple[int, int]]) -> int | None:
    """The attention heads of the model called `arch`, where the backbone has that model's width."""
    width, heads = models.get(str(arch), (0, 0))
    return heads if width == _width(backbone) else None


def _width(backbone: Mapping[str, Tensor]) -> int:
    return int(backbone["cls_token"].shape[-1])

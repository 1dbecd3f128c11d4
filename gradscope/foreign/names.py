"""Names of tensors: prefixes off, other libraries' names into timm's, and the check that a backbone is complete.

Prefixes are only ever taken off the front, so `momentum_backbone.x` never counts as `backbone.x`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gradscope.errors import CheckpointError
from gradscope.foreign.reading import some_names

WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")  # of DistributedDataParallel, torch.compile, Fabric
_BLOCK = re.compile(r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)")
_OUTER = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias")
_INNER = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_KINDS = ("weight", "bias")
_COMPUTES = ("blocks.", "patch_embed.", "norm.", "pos_embed", "cls_token", "layers.", "encoder.")  # into the features
_REFUSED = {
    r"(^|\.)(reg_token|register_tokens|storage_tokens|reg_tokens)$": "register tokens",
    r"(^|\.)dist_token$|^distillation_token$": "a distillation token",
    r"\.ls[12]\.|\.gamma_[12]$|\.layer_scale[12]?\.|\.lambda1$": "layer scale",
    r"(^|\.)rope|freqs_cis|inv_freq|periods$": "rotary positions (RoPE)",
    r"(^|\.)fc_norm\.": "a norm after average pooling (fc_norm), so its features are not the class token's",
    r"(^|\.)norm_pre\.": "a norm before the blocks",
    r"\.attn\.[qk]_norm\.": "norms of queries and keys",
    r"\.mlp\.w(12|1|2|3)\.": "a SwiGLU MLP",
    r"relative_position": "relative positions",
    r"^blocks\.\d+\.\d+\.": "blocks in chunks, as FSDP asks for",
}


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict, without the prefixes that wrappers put before every name."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            continue
        while prefix := next((p for p in WRAPPERS if name.startswith(p)), None):
            name = name[len(prefix) :]
        found[name] = value
    return found


def part(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the first of `prefixes` that any has, without it."""
    for prefix in prefixes:
        found = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        if found:
            return found
    return {}


def backbone_of(tensors: Mapping[str, Tensor], path: Path, *, what: str = "") -> tuple[dict[str, Tensor], list[str]]:
    """All of a ViT's tensors under timm's names, in a fixed order, and the names of what else there was.

    Raises CheckpointError for a tensor that is missing, and for one that takes part in the computation but has no place
    in the bundled ViT. `what`: a prefix that messages put before the names.
    """
    for name, value in tensors.items():
        for pattern, meaning in _REFUSED.items():
            if re.search(pattern, name):
                raise CheckpointError(
                    f"{path}: {what}{name} {tuple(value.shape)}: this model has {meaning}, which the bundled ViT does "
                    "not; profile it with a task of your own (--task module:Class)"
                )
    depth = 1 + max((int(match[1]) for name in tensors if (match := _BLOCK.fullmatch(name))), default=-1)
    wanted = [*_OUTER, *(f"blocks.{i}.{inner}.{kind}" for i in range(depth) for inner in _INNER for kind in _KINDS)]
    missing = [what + name for name in wanted if name not in tensors]
    if missing or not depth:
        lacking = some_names(missing) if depth else f"{what}blocks.0, ..."
        raise CheckpointError(
            f"{path}: not a complete ViT in timm's names, it has no {lacking}; it holds "
            f"{some_names([what + name for name in tensors]) or 'no tensors there'}; a model of another kind needs a "
            "task of your own (--task module:Class)"
        )
    others = [name for name in tensors if name not in set(wanted)]
    if strange := [what + name for name in others if name.startswith(_COMPUTES)]:
        raise CheckpointError(f"{path}: tensors that the bundled ViT has no place for: {some_names(strange)}")
    return {name: tensors[name] for name in wanted}, [what + name for name in others]


_HUGGING_FACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_HUGGING_FACE_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",  # names of version 4, and of the files that version 5 writes
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.o_proj": "attn.proj",  # modules of version 5
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
}


def from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Hugging Face ViT's tensors (either of its two namings) in timm's names; q, k and v joined into one matrix."""
    found: dict[str, Tensor] = {}
    separate: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in tensors.items():
        name = name.removeprefix("vit.")
        match = re.fullmatch(r"(?:encoder\.layer|layers|encoder\.layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        inner = _HUGGING_FACE_BLOCK.get(match[2]) if match else None
        if match and inner in ("q", "k", "v"):
            separate.setdefault((match[1], match[3]), {})[inner] = value
        elif match and inner:
            found[f"blocks.{match[1]}.{inner}.{match[3]}"] = value
        else:
            stem, dot, kind = name.rpartition(".")
            known = _HUGGING_FACE.get(name) or (_HUGGING_FACE[stem] + dot + kind if stem in _HUGGING_FACE else name)
            found[known] = value
    for (block, kind), values in separate.items():
        if len(values) == 3:
            found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([values["q"], values["k"], values["v"]])
        else:
            found |= {f"blocks.{block}.attn.{letter}.{kind}": value for letter, value in values.items()}
    return found


def is_hugging_face(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.removeprefix("vit.").startswith("embeddings.patch_embeddings.") for name in tensors)


_OPENMMLAB = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.ln1\.", r"blocks.\1.norm1."),
    (r"^layers\.(\d+)\.ln2\.", r"blocks.\1.norm2."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
    (r"^ln1\.", "norm."),
)


def from_openmmlab(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's tensors as mmselfsup and mmpretrain name them, in timm's names."""
    found = {}
    for name, value in tensors.items():
        for pattern, replacement in _OPENMMLAB:
            name, changed = re.subn(pattern, replacement, name)
            if changed:
                break
        found[name] = value
    return found


def head_from_openmmlab(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A non-linear neck (`fc0`, `bn0`, `fc1`, ...) as a sequence: linear layer 3 i, norm 3 i + 1, the ReLU between."""
    found = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(fc|bn)(\d*)\.(.+)", name)
        if match:
            name = f"{3 * int(match[2] or 0) + (match[1] == 'bn')}.{match[3]}"
        found[name] = value
    return found


def dino_head_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DINO head's tensors with the weight norm's older names, g and v."""
    newer = {"last_layer.parametrizations.weight.original0": "last_layer.weight_g"}
    newer["last_layer.parametrizations.weight.original1"] = "last_layer.weight_v"
    return {newer.get(name, name): value for name, value in tensors.items()}


def given(**heads: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    return {role: tensors for role, tensors in heads.items() if tensors}


def same_weight(online: Tensor, slow: Tensor | None) -> bool:
    """Whether a weight equals its average over training but for rounding: then it was not trained (stop-grad-conv1)."""
    return slow is not None and online.shape == slow.shape and bool(online.allclose(slow, rtol=1e-3, atol=1e-6))

"""Heads rebuilt from their tensors: the index of each in its sequence tells the layers, gaps the activations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from gradscope.errors import CheckpointError
from gradscope.foreign.names import part
from gradscope.methods import BatchNorm1d, DINOHead, PrototypeLayer


def sequence_of(
    tensors: Mapping[str, Tensor], activation: type[nn.Module], path: Path, what: str
) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """An `nn.Sequential` as those that wrote `tensors` (`0.weight`, `1.running_mean`, ...), and its state dict.

    A matrix makes a Linear, running statistics a BatchNorm1d (affine where it has a weight), a missing index the
    activation. Raises CheckpointError, naming the tensor, for anything else and for layers that do not fit together.
    """
    if "weight" in tensors:  # a single layer
        tensors = {f"0.{name}": value for name, value in tensors.items()}
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, kind = name.partition(".")
        if not number.isdigit() or "." in kind:
            raise CheckpointError(f"{path}: {what}.{name}: not a tensor of a sequence of linear layers and BatchNorm")
        layers.setdefault(int(number), {})[kind] = value
    modules: list[nn.Module] = []
    state: dict[str, Tensor] = {}
    width: int | None = None
    for index in range(max(layers) + 1):
        if index not in layers:
            modules.append(activation())
            continue
        module = _layer(layers[index], path, f"{what}.{index}")
        width_in = module.in_features if isinstance(module, nn.Linear) else module.num_features
        if width not in (None, width_in):
            raise CheckpointError(f"{path}: {what}.{index} takes {width_in} numbers, the layer before gives {width}")
        width = module.out_features if isinstance(module, nn.Linear) else width_in
        modules.append(module)
        own = module.state_dict()  # older files lack the count of batches, which nothing here reads
        state |= {f"{index}.{kind}": layers[index].get(kind, own[kind]) for kind in own}
    return nn.Sequential(*modules), state


def dino_head_of(
    tensors: Mapping[str, Tensor], path: Path, fixed_norm: bool | None
) -> tuple[DINOHead, dict[str, Tensor]]:
    """A DINO head and its state dict. `fixed_norm` None: lengths g that are all 1 count as not trained."""
    last = part(tensors, "last_layer.")
    if set(last) != {"weight_g", "weight_v"}:
        names = ", ".join(sorted(last)) or "nothing"
        raise CheckpointError(f"{path}: the head's last_layer has {names}, not weight_g and weight_v of a weight norm")
    mlp, state = sequence_of(part(tensors, "mlp."), nn.GELU, path, "head.mlp")
    prototypes, width = last["weight_v"].shape
    if fixed_norm is None:
        fixed_norm = bool((last["weight_g"] == 1).all())
    head = DINOHead(mlp, PrototypeLayer(width, prototypes, fixed_norm=fixed_norm))
    named = {f"mlp.{name}": value for name, value in state.items()}
    return head, {**named, **{f"last_layer.{name}": value for name, value in last.items()}}


def _layer(tensors: Mapping[str, Tensor], path: Path, what: str) -> nn.Linear | BatchNorm1d:
    names = set(tensors)
    if "running_mean" in names and names <= {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"}:
        return BatchNorm1d(len(tensors["running_mean"]), affine="weight" in names)
    if "weight" in names and names <= {"weight", "bias"} and tensors["weight"].ndim == 2:
        width_out, width_in = tensors["weight"].shape
        return nn.Linear(width_in, width_out, bias="bias" in names)
    shapes = ", ".join(f"{what}.{name} {tuple(value.shape)}" for name, value in tensors.items())
    raise CheckpointError(f"{path}: {shapes}: neither a linear layer nor a BatchNorm1d")

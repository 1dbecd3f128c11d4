"""Adam's second moment out of a foreign optimizer's state, where every parameter's place in it is certain.

An optimizer numbers parameters in the order in which it got them. That order is known where a code base hands over
`model.parameters()`, which is the order of the state dict without its buffers. It is trusted only if the counts and all
shapes agree; otherwise there is no second moment, and the profiler estimates one from gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Moments = Mapping[str, tuple[Tensor, float]]
"""v and 1 - beta2^t by name of the parameter; tensors may still lie on disk."""

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "center", "centre")


def parameters_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of a state dict's parameters, in order: buffers left out."""
    return [name for name in tensors if name.rpartition(".")[2] not in BUFFERS]


def moments_of(
    optimizer: Any, tensors: Mapping[str, Tensor], groups: Sequence[Sequence[str]], names: Mapping[str, str]
) -> tuple[Moments, set[str]] | None:
    """v and 1 - beta2^t by our names, and the foreign names of parameters that the optimizer holds but never updated.

    `groups`: the names in `tensors` of the parameters of every parameter group, in order. `names`: our name of each
    that is wanted. None where the optimizer's state does not fit them.
    """
    try:
        found_groups, states = optimizer["param_groups"], optimizer["state"]
        if [len(group["params"]) for group in found_groups] != [len(group) for group in groups]:
            return None
        moments: dict[str, tuple[Tensor, float]] = {}
        untouched: set[str] = set()
        for found, wanted in zip(found_groups, groups, strict=True):
            beta2 = float(found["betas"][1])
            for number, name in zip(found["params"], wanted, strict=True):
                state = states.get(number)
                if state is None:
                    untouched.add(name)
                    continue
                if state["exp_avg_sq"].shape != tensors[name].shape:
                    return None
                if name in names:
                    moments[names[name]] = state["exp_avg_sq"], 1 - beta2 ** max(float(state["step"]), 1.0)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return (moments, untouched) if moments else None

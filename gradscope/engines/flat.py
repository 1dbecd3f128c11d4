"""The trainable parameters of a model as one flat vector, and seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradscope.errors import TaskError
from gradscope.estimators import GroupLayout
from gradscope.task import Task


@dataclass(frozen=True)
class FlatParameters:
    """The trainable parameters of a model in the order of the flat gradient, group by group."""

    names: tuple[str, ...]
    tensors: tuple[nn.Parameter, ...]
    layout: GroupLayout

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the flat gradient: float64 for a model in float64, else float32."""
        return torch.float64 if any(p.dtype == torch.float64 for p in self.tensors) else torch.float32

    @property
    def half(self) -> bool:
        """Whether some are in half precision."""
        return any(p.dtype in (torch.float16, torch.bfloat16) for p in self.tensors)

    @classmethod
    def of(cls, task: Task, model: nn.Module) -> FlatParameters:
        """Every trainable parameter that the task does not declare frozen, in the task's groups.

        Raises TaskError when a group names a parameter that does not exist, or a parameter is in no group or two.
        """
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in set(task.frozen)}
        if not trainable:
            raise TaskError(
                f"{type(task).__name__}: the model has no trainable parameter; set requires_grad before profiling"
            )
        groups = task.param_groups(model)
        names: list[str] = []
        sizes: list[int] = []
        for group, members in groups.items():
            for name in members:
                if name not in trainable:
                    raise TaskError(f"param_groups: group {group!r} names {name!r}, which is no trainable parameter")
                if name in names:
                    raise TaskError(f"param_groups: parameter {name!r} is in two groups")
                names.append(name)
            sizes.append(sum(trainable[name].numel() for name in members))
        missing = sorted(set(trainable) - set(names))
        if missing:
            raise TaskError(f"param_groups leaves out the trainable parameter {missing[0]!r}; put every one in a group")
        layout = GroupLayout(tuple(groups), tuple(sizes))
        return cls(tuple(names), tuple(trainable[name] for name in names), layout)

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """One vector (P) of `dtype` from a tensor per parameter name."""
        return torch.cat([named[name].reshape(-1).to(self.dtype) for name in self.names])


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values with a stable text, the same on every machine and in every run."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_streams(seed: int) -> None:
    """Seed torch's own random streams, those of the CPU and of every CUDA device that is in use.

    The same as torch.manual_seed, which without CUDA formats a stack trace for later on every call (2 ms).
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)

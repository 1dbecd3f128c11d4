"""Several processes that measure one profile together: `torchrun --nproc-per-node N -m gradscope profile ...`.

Every rank works on its own sub-batches; sums are reduced and records gathered with torch.distributed's
collectives when a decision is due. All ranks then hold the same numbers and decide alike.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from gradscope.errors import RankError

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among `size` ones; every method is a collective call, and the identity for one process.

    All raise RankError when another rank is gone.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        with _peers():
            count = torch.tensor([int(flag)], device=self.device)
            dist.all_reduce(count)
            return bool(count.item())

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, as a new tensor on the given one's device."""
        if self.size == 1:
            return tensor
        with _peers():
            summed = tensor.to(self.device, copy=True)
            dist.all_reduce(summed)
            return summed.to(tensor.device)

    def gather(self, value: T) -> list[T]:
        """The value of every rank (anything that pickles), in the order of ranks."""
        if self.size == 1:
            return [value]
        with _peers():
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value)
            return values


ALONE = Ranks()


@contextmanager
def open_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, and this rank's device; one process alone when it started none.

    `cuda` becomes the CUDA device of the local rank and the collectives nccl's, otherwise gloo's. A job whose
    ranks stop answering ends after 30 minutes (environment variable GRADSCOPE_RANK_TIMEOUT, in seconds).
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(device=device), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    seconds = os.environ.get("GRADSCOPE_RANK_TIMEOUT")
    timeout = TIMEOUT if seconds is None else datetime.timedelta(seconds=float(seconds))
    with _peers():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device), device
    finally:
        dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    """Turn what a collective raises when a peer is gone into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo, nccl and the store have no common class of their own
        text = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise RankError(
            f"another rank of this job is gone or does not answer ({text}); finished cells are saved, "
            "run the same command again to continue, on any number of ranks"
        ) from error

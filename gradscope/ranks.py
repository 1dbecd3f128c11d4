"""Several processes that profile or train together: `torchrun --nproc-per-node N -m gradscope ...`.

In a profile every rank works on its own sub-batches; when a decision is due, what they found is brought together on
the first rank with torch.distributed's collectives; it decides and tells the others. In training every rank has its
share of each batch, and features are gathered so that a loss sees all of it.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from gradscope.errors import Interrupted, RankError, UsageError

T = TypeVar("T")
TIMEOUT_SECONDS = 1800.0
TIMEOUT_NAME = "GRADSCOPE_RANK_TIMEOUT"


@dataclass(frozen=True)
class Ranks:
    """This process among `size` ones; every method is a collective call, and the identity for one process.

    All raise RankError when another rank is gone or does not answer. Tensors on a CUDA device are reduced
    there; everything else goes over the CPU, where a rank that is gone raises an error instead of a hang.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    group: Any = None  # of torch.distributed; None: the default one

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        count = torch.tensor([int(flag)])
        with _peers():
            dist.all_reduce(count, group=self.group)
        return bool(count.item())

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks on the first one, on the given tensor's device; what others get is of no use."""
        if self.size == 1:
            return tensor
        self.any(False)  # a rank that is gone is noticed here, not in nccl, which would end this process unsaved
        summed = tensor.to(self.device, copy=True)
        with _peers():
            dist.reduce(summed, 0, group=self.group)
        return summed.to(tensor.device)

    def gather(self, value: T) -> list[T]:
        """The value of every rank (anything that pickles), in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def collect(self, value: T) -> list[T]:
        """As `gather`, but on the first rank alone; the others get nothing."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.first else None
        with _peers():
            dist.gather_object(value, values, group=self.group)
        return values or []

    def gather_constant(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks one below the other, (R * B, ...), without gradient."""
        return tensor if self.size == 1 else self._gathered(tensor).flatten(0, 1)

    def gather_with_gradient(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, (R, ...), whose gradient reaches those of every rank.

        In the backward pass a rank's tensor gets the sum of what the losses of all ranks say about it.
        """
        if self.size == 1:
            return tensor[None]
        gathered: Tensor = _Gather.apply(tensor, self)  # type: ignore[no-untyped-call]
        return gathered

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, on all of them, without gradient."""
        if self.size == 1:
            return tensor
        summed = tensor.detach().clone()
        with _peers():
            dist.all_reduce(summed, group=self.group)
        return summed / self.size

    def mean_of(self, number: float) -> float:
        """The mean of a number over the ranks, on all of them."""
        return number if self.size == 1 else float(self.mean(torch.tensor(number, dtype=torch.float64)))

    def agree(self, what: str, numbers: Sequence[int], *, highest: int = 0) -> int:
        """The largest `highest` of any rank, after checking that all give the same `numbers`.

        One collective call of a few bytes over the CPU. Raises RankError, naming `what`, where they differ.
        """
        if self.size == 1:
            return highest
        extremes = torch.tensor([highest, *numbers, *(-number for number in numbers)])
        with _peers():
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group)
        most, high, low = extremes[0], extremes[1 : len(numbers) + 1], -extremes[len(numbers) + 1 :]
        if not torch.equal(low, high):
            raise RankError(
                f"the ranks disagree on {what}: from {low.tolist()} to {high.tolist()}; start all of them with the "
                "same settings and files"
            )
        return int(most)

    def same(self, what: str, value: object) -> None:
        """Raise RankError, naming `what` and the ranks, where the text of `value` differs from the first rank's."""
        digests = self.gather(hashlib.sha256(str(value).encode()).hexdigest())
        if others := [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise RankError(
                f"the ranks disagree on {what}: rank {', '.join(others)} of 0 to {self.size - 1} differs from rank 0; "
                "start all of them with the same settings and files"
            )

    def _gathered(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _peers():
            dist.all_gather(parts, tensor.detach().contiguous(), group=self.group)
        return torch.stack(parts)


class _Gather(torch.autograd.Function):
    """`gather_with_gradient`."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        context.ranks = ranks
        return ranks._gathered(tensor)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        with _peers():
            dist.all_reduce(summed, group=context.ranks.group)
        return summed[context.ranks.rank], None


ALONE = Ranks()


def current_ranks() -> Ranks:
    """The ranks of torch.distributed's default group where somebody else has initialised it, else one process alone.

    What is exchanged goes over the CPU: where the default group cannot do that, a gloo group of all ranks is made, so
    all of them have to call this.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    with _peers():
        group = None if "gloo" in dist.get_backend() else dist.new_group(backend="gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), group)


@contextmanager
def open_ranks(open_device: Callable[[], torch.device]) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, and this rank's device; one process alone when it started none.

    Of the errors inside, those of `open_device` included, the first one on any rank is raised there; the other
    ranks leave by SystemExit, without a word and with the exit code of theirs. `cuda` becomes the CUDA device of
    the local rank and its sums are nccl's, otherwise gloo's. A job whose ranks do not answer each other for 30
    minutes (environment variable GRADSCOPE_RANK_TIMEOUT, in seconds) ends with RankError. SIGTERM inside raises
    Interrupted on several ranks. Raises UsageError when there are fewer CUDA devices than ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        device = open_device()
        yield Ranks(device=device), device
        return
    # its functions take the group that they find at import for a default, and would keep that group's threads running
    # until the interpreter ends, which they can crash
    importlib.import_module("torch.distributed.nn.functional")
    with _peers("the ranks of this job cannot meet"):
        store, rank, size = next(iter(rendezvous("env://")))
    # ranks that torchrun starts once more meet at the store where the first ones met
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"gradscope, start {start}", store)  # type: ignore[attr-defined]
    with _one_voice(store):
        timeout = _timeout()
        store.set_timeout(timeout)
        device = _of_this_rank(open_device())
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with _peers("the ranks of this job cannot meet"):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        with _stop_at_sigterm():
            yield Ranks(rank, size, device), device
        dist.destroy_process_group()


def _timeout() -> datetime.timedelta:
    text = os.environ.get(TIMEOUT_NAME, str(TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{TIMEOUT_NAME}={text!r} is no number of seconds; set it to one above 0, or leave it out")
    return datetime.timedelta(seconds=seconds)


def _of_this_rank(device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise UsageError(
            f"more ranks than CUDA devices on this machine, which has {there}; use --nproc-per-node {there}, "
            "or --device cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def _one_voice(store: Any) -> Iterator[None]:
    """Let only the first error of the job through, on the rank where it came up; see `open_ranks`.

    An error ends the connections to the other ranks, so that they fail, too, at their next collective call.
    """
    try:
        yield
    except BaseException as error:
        if threading.current_thread() is threading.main_thread():
            # the launcher answers a failure with SIGTERM to all ranks; the message must still come out
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        first = _is_first(store)
        if dist.is_initialized() and dist.get_backend() == "gloo":  # nccl might wait for ranks that are gone
            dist.destroy_process_group()
        if first:
            raise
        raise SystemExit(getattr(error, "exit_code", 1)) from error


def _is_first(store: Any) -> bool:
    """Whether no rank has failed before; where the store itself is gone, nobody else can tell."""
    try:
        return bool(store.add("failures", 1) == 1)
    except RuntimeError:
        return True


@contextmanager
def _stop_at_sigterm() -> Iterator[None]:
    """Raise Interrupted at SIGTERM, unless what runs inside has a handler of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped; run the same command to continue", exit_code=128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, previous)


@contextmanager
def _peers(lacking: str = "") -> Iterator[None]:
    """Turn what torch.distributed raises when a peer is gone into one sentence, which `lacking` may begin."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo, nccl and the store have no common class of their own
        text = re.sub(r"^(\[[^\]]*\]\s*)+", "", str(error)) or type(error).__name__  # without gloo's source line
        late = "timed out" in text.lower() or "timeout" in text.lower()
        what = f"does not answer in time, which {TIMEOUT_NAME} sets" if late else "has ended before its time"
        raise RankError(
            f"{lacking or f'another rank of this job {what}'} ({text.splitlines()[0].split('. ')[0][:160]}); what is "
            "finished is saved, run the same command again to continue, on any number of ranks"
        ) from error

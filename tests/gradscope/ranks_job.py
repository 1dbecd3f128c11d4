"""Several ranks of `gradscope profile` without torchrun's start-up time, and tasks that get into trouble on one.

Ranks are forked from a server that has imported everything; they meet at a store of the test's process, as
ranks meet at torchrun's, and run the command line as a user would.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore

from gradscope import Checkpoint, Strategy
from gradscope.errors import TaskError
from tests.gradscope.tasks_for_tests import LineTask

PATIENCE = 240.0  # seconds that a job may take on a machine that does other things, too
TROUBLE = "TROUBLE_FOR_TESTS"  # kind:step:sub-batch
PRELOADED = (
    "gradscope.cli", "gradscope.profiler", "gradscope.tasks", "gradscope.trainer", "torch._dynamo",
    "torch.distributed.rendezvous", "h5netcdf",
)  # fmt: skip


class TroubledTask(LineTask):
    """LineTask, but for what the environment variable asks for at one sub-batch of one checkpoint."""

    def __init__(self) -> None:
        kind, step, number = os.environ.get(TROUBLE, "none:0:0").split(":")
        self.kind, self.step, self.number = kind, int(step), int(number)
        self.here = (-1, -1)

    def describe(self) -> dict[str, Any]:
        return dict(LineTask().describe())

    def load(self, checkpoint: Path) -> nn.Module:
        self.here = (int(checkpoint.stem.split("-")[1]), -1)
        return super().load(checkpoint)

    def sub_batches(self, size: int, seed: int, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        for row, batch in enumerate(super().sub_batches(size, seed, first, every)):
            self.here = (self.here[0], first + row * every)
            if self.here == (self.step, self.number):
                if self.kind == "end":
                    return
                self._get_into_trouble()
            yield batch

    def _get_into_trouble(self) -> None:
        if self.kind in ("SIGKILL", "SIGTERM", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, self.kind))
        elif self.kind == "raise":
            raise TaskError("sub-batch 5 cannot be read")
        elif self.kind == "hang":
            time.sleep(10 * PATIENCE)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        loss = super().loss(model, batch, strategy, generator)
        if self.here == (self.step, self.number):
            if self.kind == "strategy" and strategy == Strategy(keep="half", noise=2):
                raise RuntimeError("out of memory, say")
            if self.kind == "reference" and strategy == self.grid.reference:
                return loss * float("nan")
        return loss


class SampleTask(LineTask):
    """LineTask with independent samples, so that per-sample engines measure it."""

    def load(self, checkpoint: Path) -> nn.Module:
        coupled = super().load(checkpoint)
        return nn.Sequential(*(part for part in coupled if not isinstance(part, nn.BatchNorm1d | nn.Dropout)))

    def sample_losses(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        x, y = batch
        if strategy["keep"] == "half":
            x = x * torch.tensor([1.0, 1, 1, 0, 0, 0])
        x = x + strategy.number("noise") * torch.randn(x.shape, generator=generator)
        return (model(x).squeeze(1) - y).square()


class UnequalTask(SampleTask):
    """Its samples are independent on every rank but the first: no task should, a defect may."""

    def sample_losses(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        if os.environ["RANK"] == "0":
            raise NotImplementedError
        return super().sample_losses(model, batch, strategy, generator)


class OtherDataTask(LineTask):
    """LineTask, whose data are others on every rank but the first."""

    def describe(self) -> dict[str, Any]:
        return dict(LineTask().describe())

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return super().batches(size, seed + int(os.environ["RANK"]))


class FewerCheckpointsTask(LineTask):
    """LineTask, which on every rank but the first does not see the last checkpoint yet."""

    def checkpoints(self, folder: Path) -> Sequence[Checkpoint]:
        found = super().checkpoints(folder)
        return found if os.environ["RANK"] == "0" else found[:-1]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a rank ended: exit code (-9 for SIGKILL) and what it printed."""

    code: int
    stdout: str
    stderr: str


def run_ranks(count: int, arguments: Sequence[str], folder: Path, **environment: str) -> list[Ended]:
    """Run `gradscope ARGUMENTS` on `count` ranks and wait; a rank that then still hangs is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *PRELOADED])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", **environment,
    }  # fmt: skip
    started: list[BaseProcess] = []
    for rank in range(count):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank, args=(own, list(arguments), folder / f"rank-{rank}"))
        process.start()
        started.append(process)
    patience = time.monotonic() + PATIENCE
    ended = []
    for rank, process in enumerate(started):
        process.join(max(patience - time.monotonic(), 0))
        if process.exitcode is None or (environment.get(TROUBLE, "").startswith("hang") and rank == 0):
            for other in started:
                other.kill()
            process.join()
    for rank, process in enumerate(started):
        process.join()
        texts = [(folder / f"rank-{rank}.{name}").read_text() for name in ("stdout", "stderr")]
        ended.append(Ended(int(process.exitcode or 0), *texts))
    return ended


def _rank(environment: dict[str, str], arguments: list[str], output: Path) -> None:
    os.environ.update(environment)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.flush()
        os.dup2(os.open(output.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    torch.set_num_threads(1)
    sys.argv = ["gradscope", *arguments]
    from gradscope.cli import main

    main()

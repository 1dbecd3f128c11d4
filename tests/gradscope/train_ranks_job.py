"""Functions run on several ranks, forked like those of `ranks_job`, and what they give back.

A function is called as `function(ranks, *arguments)` inside `open_ranks`; errors end a rank as the command line
would end it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from gradscope.cli.run_settings import make_schedule
from gradscope.errors import GradscopeError, NonFiniteError
from gradscope.methods import Part
from gradscope.ranks import Ranks, open_ranks
from gradscope.stepper import Stepper
from gradscope.trainer import train
from schedulers import Strategy
from tests.gradscope import ranks_job
from tests.gradscope.small_methods import SmallSetting, gradients, make_method, make_views, seeded, small_setting

HANGS = 20.0  # seconds that a rank in trouble does not answer for


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a rank ended, its stderr, and what its function returned, None where it did not."""

    code: int
    stderr: str
    value: Any


def run_function(count: int, function: Callable[..., Any], folder: Path, *arguments: Any, **env: str) -> list[Answer]:
    """Call `function` on `count` ranks and wait; whoever hangs is killed, with exit code -9."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, ranks_job.__name__, *ranks_job.PRELOADED])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", **env,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(count):
        (folder / f"value-{rank}.pt").unlink(missing_ok=True)
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank, args=(own, folder, rank, function, arguments))
        process.start()
        started.append(process)
    patience, answers = time.monotonic() + ranks_job.PATIENCE, []
    for process in started:
        process.join(max(patience - time.monotonic(), 0))
        if process.exitcode is None:
            process.kill()
            process.join()
    for rank, process in enumerate(started):
        kept = folder / f"value-{rank}.pt"
        value = torch.load(kept, weights_only=False) if kept.exists() else None
        answers.append(Answer(int(process.exitcode or 0), (folder / f"rank-{rank}.stderr").read_text(), value))
    return answers


def _rank(env: dict[str, str], folder: Path, rank: int, function: Callable[..., Any], arguments: tuple[Any]) -> None:
    os.environ.update(env)
    sys.stderr.flush()
    os.dup2(os.open(folder / f"rank-{rank}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    torch.set_num_threads(1)
    try:
        with open_ranks(lambda: torch.device("cpu")) as (ranks, _):
            torch.save(function(ranks, *arguments), folder / f"value-{rank}.pt")
    except GradscopeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(70)


def one_step(ranks: Ranks, method: str, batch: int, strategies: list[Strategy], settings: Any) -> list[Any]:
    """For each strategy: the mean loss, the averaged gradient and all buffers after a step's forward passes."""
    found = []
    for strategy in strategies:
        model, views = make_method(method, **settings), make_views(method, batch)
        share = batch // ranks.size
        part = Part(ranks.rank * share, (ranks.rank + 1) * share, batch)
        model.train_on(ranks)
        own = [view[part.rows] for view in views]
        targets = model.targets(own, strategy)
        loss = model.loss(own, strategy, seeded(), targets=targets, part=part)
        mean = {name: ranks.mean(gradient) for name, gradient in gradients(model, loss).items()}
        model.after_step(0.5, targets)
        found.append((ranks.mean_of(float(loss.detach())), mean, dict(model.named_buffers())))
    return found


def gathered(ranks: Ranks) -> list[Tensor]:
    """A transposed tensor of every rank, by both ways of gathering."""
    own = (torch.arange(6.0).reshape(2, 3) + 10 * ranks.rank).T
    return [ranks.gather_constant(own), ranks.gather_with_gradient(own)]


class DoubleSetting(SmallSetting):
    """The small setting in float64, where several ranks and one differ by 1e-12 alone; `trouble` at a step."""

    trouble: str = ""
    at: int = -1

    def new_model(self) -> Any:
        return super().new_model().double()

    def finish(self, prepared: Any, device: torch.device) -> tuple[Tensor, ...]:
        views = tuple(view.double() for view in super().finish(prepared, device))
        object.__setattr__(self, "at", self.at - 1)
        if self.at == 0 and self.trouble.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.trouble))
        if self.at == 0 and self.trouble == "hang":
            time.sleep(HANGS)
        if self.at == 0 and self.trouble == "nan":
            views[0][0].fill_(float("nan"))
        return views


def double_setting(method: str, *, trouble: str = "", at: int = -1, norm: bool = True, **changes: Any) -> DoubleSetting:
    small = small_setting(method, **changes)
    setting = DoubleSetting(small.config, small.data, small.augmentations)
    for name, value in (("norm", norm), ("trouble", trouble), ("at", at)):
        object.__setattr__(setting, name, value)
    return setting


def train_double(
    ranks: Ranks, method: str, out: Path, schedules: list[str], trouble: dict[int, tuple[str, int]], changes: Any
) -> Any:
    """Train in float64; rank r takes the schedule `schedules[r]` (the last one where there are fewer)."""
    kind, at = trouble.get(ranks.rank, ("", -1))
    setting = double_setting(method, trouble=kind, at=at, **changes)
    text = schedules[min(ranks.rank, len(schedules) - 1)]
    result = train(setting, make_schedule(text, setting), out, ranks=ranks)
    return result.step, result.units, result.samples


def train_until_killed(ranks: Ranks, method: str, out: Path, delay: float, changes: Any) -> float:
    """Train until done, or until this process is killed after `delay` seconds; the seconds that it took."""
    if delay < math.inf:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    begun, setting = time.monotonic(), small_setting(method, **changes)
    train(setting, make_schedule("mixed", setting), out)
    return time.monotonic() - begun


def step_on_nan(ranks: Ranks, method: str) -> tuple[str, bool]:
    """A step for which the last rank's query is not finite: what it raises, and whether no parameter has moved."""
    setting = double_setting(method, norm=False)
    model = setting.new_model()
    stepper = Stepper(setting, model, device=torch.device("cpu"), ranks=ranks)
    strategy = setting.config.reference
    stepper.start([strategy])
    views = make_views(method, 16 // ranks.size)
    if ranks.rank == ranks.size - 1:
        views[0][0].fill_(math.nan)
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    try:
        stepper.step(0, 0.5, strategy, views)
        raised = ""
    except NonFiniteError as error:
        raised = str(error)
    after = [p for p in model.parameters() if p.requires_grad]
    return raised, all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


def train_killed_saving(ranks: Ranks, method: str, out: Path, number: int, changes: Any) -> None:
    """Train, but be killed in the midst of writing the checkpoint of that number, counted from 0."""
    save, saved = torch.save, itertools.count()

    def half(content: Any, stream: Any) -> None:
        save(content, stream)
        if next(saved) == number:
            stream.truncate(stream.tell() // 2)
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half  # type: ignore[assignment]  # of this process alone, which ends here
    setting = small_setting(method, **changes)
    train(setting, make_schedule("mixed", setting), out)

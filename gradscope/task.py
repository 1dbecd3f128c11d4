"""What a user writes to have their own model profiled."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.errors import CheckpointError, TaskError
from schedulers import Grid, Strategy


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file and its position in its run: `progress` in [0, 1], `step` in optimizer steps."""

    path: Path
    step: int
    progress: float


class Task(ABC):
    """A model, its data and its loss under every strategy of a grid.

    Four methods are to be written; the others have working defaults. The profiler calls
    `loss(model, batch, strategy, generator)` with the same batch for every strategy and differentiates it.

    Attributes: `grid` (axes, values, reference); `batch_size`, the K samples of a sub-batch, by default that
    of the training run; `frozen`, names of trainable parameters that the loss does not reach on purpose;
    `independent_terms`, False where the loss terms of one sub-batch share something random besides the model
    (negatives), so that per-sample estimates pair only terms of different sub-batches.
    """

    grid: Grid
    batch_size: int = 64
    frozen: Collection[str] = ()
    independent_terms: bool = True

    @abstractmethod
    def load(self, checkpoint: Path) -> nn.Module:
        """The model as it was at `checkpoint`, in the mode in which it trains."""

    @abstractmethod
    def batches(self, size: int, seed: int) -> Iterator[Any]:
        """Batches of `size` samples without end, the same ones for the same seed (augmented views included)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        """Mean loss of the batch under `strategy`, a scalar; random choices come from `generator`."""

    @abstractmethod
    def cost(self, strategy: Strategy) -> float:
        """Units per sample: forward passes of one reference sequence, a backward pass counting two."""

    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        """The loss term of every sample, (K,), whose mean is `loss`; writing it allows per-sample gradients.

        Term i may depend on sample i and on constants (keys, teacher outputs) that carry no gradient. Without
        it a sub-batch counts as one replicate, which is right for every loss.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no per-sample losses")

    def sub_batches(self, size: int, seed: int, first: int = 0, every: int = 1) -> Iterator[Any]:
        """Batches number `first`, `first + every`, ... of `batches(size, seed)`.

        The default makes all of them and drops those between; override it where making one is expensive and
        a profile runs on several ranks, each of which takes every N-th.
        """
        return itertools.islice(self.batches(size, seed), first, None, every)

    def shared_costs(self, strategy: Strategy) -> Mapping[str, float]:
        """The part of `cost(strategy)` that is spent once per sub-batch for all strategies naming the same key.

        For a loss that keeps such work (a momentum encoder's keys) for the next strategy of the same batch;
        it only makes the count of units right. Default: nothing is shared.
        """
        return {}

    def param_groups(self, model: nn.Module) -> Mapping[str, Sequence[str]]:
        """Names of the trainable parameters by group; default: by module, each numbered block apart."""
        groups: dict[str, list[str]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in set(self.frozen):
                groups.setdefault(_group_of(name), []).append(name)
        return groups

    def checkpoints(self, folder: Path) -> Sequence[Checkpoint]:
        """The checkpoints of a run, by progress; default: files by the last number in their name.

        Takes `*.pt`, `*.pth`, `*.ckpt`, `*.safetensors`; progress is that number over the largest one.
        Raises CheckpointError when there are none.
        """
        return numbered_checkpoints(folder)

    def second_moment(self, checkpoint: Path, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Adam's bias-corrected second moment per trainable parameter, or None to have it estimated."""
        return None

    def other_costs(self, strategy: Strategy) -> Mapping[str, float]:
        """Costs by further cost models (`paper`, `measured`), units per sample, where they are known."""
        return {}

    def tokens(self, strategy: Strategy) -> Mapping[str, int]:
        """Sequence lengths by name (`query`, `key`), where the model has any; shown beside the results."""
        return {}

    def describe(self) -> Mapping[str, Any]:
        """What identifies this task, as JSON values; a cell measured under another description is not reused.

        By default the name of the class and a digest of the source file that defines it. What the file imports
        is not seen: add it (a version, a configuration) where it may change.
        """
        try:
            source = Path(inspect.getfile(type(self))).read_text(encoding="utf-8")
        except (OSError, TypeError):
            source = ""
        return {"task": f"{type(self).__module__}:{type(self).__qualname__}", "source": _short_digest(source)}

    def training(self, folder: Path) -> Mapping[str, Any]:
        """How the checkpoints were trained: `schedule` (text), `strategies` (texts), `budget` (units), where known.

        `stages`, optional, are those of the schedule: [{"start", "end", "cost", "mixture"}, ...] with `mixture` as
        [[{axis: value}, weight], ...], what `gradscope.pilot.stages_json` makes of a schedule; from them the
        optimizer knows how the run spent.
        Stages are on the grid's axes and `budget` is a positive number, or a profile ends with TaskError.
        """
        return {}


def task_digest(task: Task) -> str:
    """Digest of everything that fixes a cell's number besides checkpoint, seed and K.

    The grid's values are not part of it: a grid may grow without its finished cells being measured again.
    """
    fixed = {"reference": str(task.grid.reference), "axes": list(task.grid.axes), **task.describe()}
    return _short_digest(json_of("describe", fixed, in_order=True))


def json_of(method: str, values: Mapping[str, Any], *, in_order: bool = False) -> str:
    """What a method of a task gives, as JSON, `in_order` of its keys. Raises TaskError where JSON cannot hold it."""
    try:
        return json.dumps(dict(values), sort_keys=in_order)
    except (TypeError, ValueError, RecursionError) as error:
        raise TaskError(f"the task's {method} must give what JSON can hold: {error}") from error


RESUME_FILE = "resume.pt"  # where a run that was stopped between checkpoints of progress stands
PATTERNS = ("*.pt", "*.pth", "*.ckpt", "*.safetensors")


def numberless(folder: Path) -> list[str]:
    """Names of the checkpoint files that `numbered_checkpoints` leaves out: no number tells when they were written."""
    names = {path.name for pattern in PATTERNS for path in folder.glob(pattern)} - {RESUME_FILE}
    return sorted(name for name in names if not re.search(r"\d", Path(name).stem))


def numbered_checkpoints(folder: Path, patterns: Sequence[str] = PATTERNS) -> list[Checkpoint]:
    """Checkpoint files of a folder by the number in their name, progress being that number over the largest.

    The number after `step`, `epoch`, `iter` or `checkpoint` counts, else the last one. Raises CheckpointError
    when there are none, or two with one number.
    """
    if not folder.is_dir():
        what = "a file" if folder.is_file() else "no such folder"
        raise CheckpointError(f"{folder}: {what}; give the folder that holds the checkpoints")
    steps: dict[int, Path] = {}
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        named = re.search(r"(?:step|epoch|iter|checkpoint)\D?(\d+)", path.stem)
        numbers = [named[1]] if named else re.findall(r"\d+", path.stem)
        if numbers and (other := steps.setdefault(int(numbers[-1]), path)) != path:
            raise CheckpointError(
                f"{folder}: {other.name} and {path.name} have the same number; override the task's `checkpoints`"
            )
    if not steps:
        there = numberless(folder)
        cure = f"{there[0]} has none: rename it" if there else f"train with --out {folder} first"
        raise CheckpointError(
            f"{folder}: no checkpoint found ({', '.join(patterns)} with a number in the name); {cure}"
        )
    last = max(steps) or 1
    return [Checkpoint(path=steps[step], step=step, progress=step / last) for step in sorted(steps)]


def _group_of(parameter_name: str) -> str:
    """`a.blocks.3.attn.weight` -> `a.blocks.3`, `head.0.weight` -> `head`, `a.b.c.weight` -> `a.b`."""
    parts = parameter_name.split(".")[:-1]
    numbered = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if numbered is not None:
        return ".".join(parts[: numbered + 1])
    if len(parts) > 1 and parts[-1].isdigit():
        parts = parts[:-1]
    return ".".join(parts[:2]) or parameter_name


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

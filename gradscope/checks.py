"""What a profile checks of a task before it measures anything: the errors name the culprit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradscope.engines import FlatParameters, SubBatchEngine
from gradscope.errors import GradscopeError, NonFiniteError, RankError, TaskError
from gradscope.ranks import Ranks
from gradscope.task import Checkpoint, Task
from gradscope.untouched import untouched

SAME = 1e-3  # relative difference below which two gradients count as one


def check_progress(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise TaskError unless the checkpoints lie at increasing progress in [0, 1]."""
    points = [checkpoint.progress for checkpoint in checkpoints]
    if any(not 0 <= point <= 1 for point in points) or any(a >= b for a, b in itertools.pairwise(points)):
        raise TaskError(
            f"checkpoints must lie at increasing progress in [0, 1], not at {', '.join(f'{p:g}' for p in points)}"
        )


def check_repeatable(task: Task, model: nn.Module, batch_size: int, seed: int) -> float:
    """Raise TaskError, naming the culprit, unless `batches` and `loss` repeat themselves for the same seed.

    Pairing every strategy with the reference on the same data rests on this. Costs two reference gradients;
    the model is left untouched. Returns the norm of the reference's gradient on the first batch, NaN where it has
    none.
    """
    with untouched(model):
        engine = SubBatchEngine(task, model, FlatParameters.of(task, model))
        found: list[tuple[object, Tensor]] = []
        for _ in range(2):
            batch = next(iter(task.batches(batch_size, seed)), None)
            if batch is None:
                raise TaskError(f"batches(size={batch_size}, seed={seed}) yields nothing")
            try:
                found.append((batch, engine.gradient(batch, task.grid.reference, seed=seed)))
            except (NonFiniteError, torch.OutOfMemoryError):
                return math.nan  # told, cell by cell, by the profile itself
            except GradscopeError:
                raise
            except (RuntimeError, ValueError, TypeError) as error:
                raise TaskError(f"the loss fails under the reference {task.grid.reference}: {reason(error)}") from error
    (first, g_P), (second, h_P) = found
    if torch.allclose(g_P, h_P, rtol=SAME, atol=1e-6 * float(g_P.abs().max())):
        return float(g_P.norm())
    if not _same(first, second):
        raise TaskError(f"batches(size={batch_size}, seed={seed}) gives other data when it is called again")
    raise TaskError(
        "the loss gives another gradient for the same batch, strategy and generator: draw everything random from "
        "the generator, and let nothing but parameters and buffers carry over from call to call"
    )


def check_same_data(ranks: Ranks, norm: float) -> None:
    """Raise RankError where `check_repeatable` found another gradient on one of the ranks."""
    norms = ranks.gather(norm)
    apart = [rank for rank, other in enumerate(norms) if abs(other - norms[0]) > SAME * abs(norms[0])]
    if apart:
        raise RankError(
            f"the ranks see different data: the gradient of the first batch has norm {norms[0]:.4g} on rank 0 and "
            f"{norms[apart[0]]:.4g} on rank {apart[0]}; `batches` has to give the same for the same seed everywhere"
        )


def reason(error: Exception) -> str:
    """One line that tells an error of somebody else's code."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)

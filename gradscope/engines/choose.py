"""Which engine measures a task: the one that was asked for, or the cheapest one that is exact for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradscope.engines._samples import losses_of, take
from gradscope.engines.contract import Engine
from gradscope.engines.coupling import check_uncoupled
from gradscope.engines.fast import FastPerSampleEngine
from gradscope.engines.flat import FlatParameters, seed_streams
from gradscope.engines.per_sample import PerSampleEngine
from gradscope.engines.subbatch import SubBatchEngine
from gradscope.errors import GradscopeError, NonFiniteError, TaskError, UsageError
from gradscope.estimators import EUCLIDEAN, Metrics
from gradscope.profile_options import ESTIMATORS
from gradscope.task import Task
from gradscope.untouched import untouched

SAMPLES = 8  # of the batch, on which a choice is tried


def choose_engine(
    task: Task,
    model: nn.Module,
    parameters: FlatParameters,
    metrics: Metrics = EUCLIDEAN,
    *,
    estimator: str = "auto",
    precision: str = "float32",
    batch: Any,
    seed: int,
) -> tuple[Engine, str]:
    """The engine for `estimator` and one sentence that says which it is and why.

    "auto" takes per-sample gradients by the fast path where the loss terms of `batch` have gradients of their
    own under every strategy, else whole sub-batches. Raises UsageError for an unknown name, TaskError when the
    engine asked for cannot measure the task. Costs passes over a few samples; the model is left untouched.
    """
    if estimator not in ESTIMATORS:
        raise UsageError(f"--estimator {estimator!r}: choose one of {', '.join(ESTIMATORS)}")
    arguments = (task, model, parameters, metrics, precision)
    subbatch = SubBatchEngine(*arguments)
    if estimator == "subbatch":
        return subbatch, "subbatch was asked for: gradients of whole sub-batches, right for every loss"
    kind = PerSampleEngine if estimator == "per-sample" else FastPerSampleEngine
    try:
        _check(task, model, batch, seed=seed)
        _try(kind(*arguments), task, model, batch, seed=seed)
    except TaskError as error:
        if estimator != "auto":
            raise TaskError(f"--estimator {estimator}: {error}") from error
        why = str(error).split("; ")[0]  # without the cure
        return subbatch, f"subbatch, gradients of whole sub-batches, because {why}"
    if estimator == "auto":
        return kind(*arguments), f"{kind.name}, because every loss term has a gradient of its own"
    return kind(*arguments), f"{kind.name} was asked for"


def _check(task: Task, model: nn.Module, batch: Any, *, seed: int) -> None:
    """Raise TaskError unless the task gives per-sample losses, uncoupled under all strategies, whose mean is `loss`."""
    reference, few = task.grid.reference, take(batch, slice(SAMPLES))
    with untouched(model), torch.no_grad():
        try:
            mean = losses_of(task, model, few, reference, seed=seed).double().mean()
        except NotImplementedError as error:
            raise TaskError("the task gives no per-sample losses (its `sample_losses` is not written)") from error
        except (GradscopeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise TaskError(f"sample_losses fails on the first {SAMPLES} samples of a batch: {_line(error)}") from error
        seed_streams(seed)
        loss = task.loss(model, few, reference, torch.Generator().manual_seed(seed)).double()
    for strategy in task.grid.strategies():
        with _cell_failures(strategy == reference):
            check_uncoupled(task, model, batch, strategy, seed=seed)
    if torch.isfinite(loss) and not torch.isclose(loss, mean, rtol=1e-3, atol=1e-6):
        raise TaskError(
            f"the mean of sample_losses is {mean.item():.6g} but the loss is {loss.item():.6g} on the same samples and "
            "seed; let `loss` be the mean of `sample_losses`, drawing in the same order"
        )


def _try(engine: Engine, task: Task, model: nn.Module, batch: Any, *, seed: int) -> None:
    """Let an engine of the same kind measure a few samples, so that it refuses now what it cannot measure."""
    few = take(batch, slice(SAMPLES))
    with untouched(model):
        try:
            z = engine.reference(few, seed=seed)
        except NonFiniteError:  # told, cell by cell, by the profile itself
            return
        for strategy in task.grid.strategies():
            with _cell_failures(False):
                engine.block(few, strategy, seed=seed, reference=z)


@contextmanager
def _cell_failures(matter: bool) -> Iterator[None]:
    """Let errors of a strategy's own pass that do not matter here: the profile tells them, cell by cell."""
    try:
        yield
    except TaskError:
        raise
    except Exception:
        if matter:
            raise


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"

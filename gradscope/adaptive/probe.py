"""One probe: the gradients of some strategies at the model as it is, on common images, and what that cost.

The engines, the estimators and the races are the profiler's. The model, its optimizer and all random streams are left
as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn

from gradscope.adaptive.loop_task import LoopTask
from gradscope.checks import reason
from gradscope.engines import derive_seed
from gradscope.engines._samples import take
from gradscope.errors import Interrupted, RankError, TaskError
from gradscope.estimators import ESTIMATES, Estimates
from gradscope.influence import influence_of
from gradscope.measuring import CheckpointMeasurement, Conditions, Look
from gradscope.races import Race
from gradscope.ranks import Ranks
from gradscope.task import Checkpoint, Task
from gradscope.untouched import untouched
from schedulers import MOMENTS, Measurement, ProbePlan, RaceRule, Strategy, get_criterion

ORDER = [ESTIMATES.index(name) for name in MOMENTS]


@dataclass
class Probe:
    """What a probe found, on the first rank, and what it cost in all; `error` says why nothing could be measured."""

    found: dict[Strategy, Estimates] = field(default_factory=dict)
    failures: dict[Strategy, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    engine: str = ""
    units: float = 0.0
    seconds: float = 0.0
    error: str = ""

    def measurement(self, metric_index: int) -> Measurement | None:
        """The moments in one metric with their influences, as the policy takes them; None where there are none."""
        known = {s: e for s, e in self.found.items() if np.isfinite(e.deleted_MWE).all()}
        if not known:
            return None
        blocks = max(e.blocks for e in known.values())
        moments = np.stack([e.total_WE[metric_index, ORDER] for e in known.values()])
        influence = np.stack([influence_of(e.deleted_MWE[:, :, ORDER], blocks)[metric_index] for e in known.values()])
        return Measurement(tuple(known), moments, influence, np.array([e.blocks for e in known.values()]))


@dataclass(frozen=True)
class Conduct:
    """How probes of a run are made. `criterion` and `metric` decide who may leave a probe early."""

    task: Task
    model: nn.Module
    ranks: Ranks
    sub_batch: int
    seed: int
    metrics: tuple[str, ...]
    metric: str
    criterion: str
    minimum: int
    costs: Mapping[Strategy, float]
    batch_size: int
    precision: str
    alone: Any = None  # a process group of this rank
    clock: Callable[[], float] = time.monotonic


def run_probe(
    conduct: Conduct,
    plan: ProbePlan,
    *,
    step: int,
    fraction: float,
    second_moment: Mapping[str, Tensor] | None,
    engine: str,
) -> Probe:
    """Measure what `plan` names. Never raises but for a signal or a rank that is gone: what fails is told.

    `second_moment`: Adam's, by parameter name, or None to have it estimated where a metric needs it. `engine`: the
    estimator, or "auto". On several ranks a collective call.
    """
    begun, task = conduct.clock(), conduct.task
    rule = RaceRule(min(conduct.minimum, plan.sub_batches), plan.sub_batches)
    conditions = Conditions(
        conduct.sub_batch,
        derive_seed("online probe", conduct.seed, step) % 2**31,
        conduct.metrics,
        engine,
        conduct.precision,
    )
    live = cast(Task, _Live(task, second_moment))
    here = Checkpoint(Path(f"step-{step}"), step, fraction)
    measurement = CheckpointMeasurement(live, here, conduct.model, conditions, conduct.ranks, tolerant=True)
    reference = task.grid.reference
    race = Race(
        rule,
        get_criterion(conduct.criterion),
        conduct.metrics.index(conduct.metric),
        conduct.costs,
        conduct.costs[reference],
        conduct.batch_size,
        plan.strategies,
    )
    probe = Probe()
    try:
        with _unsynchronised(conduct), closing(measurement.run(plan.strategies, rule.looks(), lambda m: None)) as looks:
            for look in looks:
                probe.failures.update(look.failures)
                probe.found.update(look.found)
                if conduct.ranks.first and look.found:
                    look.active = _staying(race, look, reference)
    except (Interrupted, RankError):
        raise
    except Exception as error:
        probe.error = reason(error)
    if not probe.found and probe.failures and not probe.error:
        probe.error = next(iter(probe.failures.values()))
    probe.units = measurement.units + measurement.units_elsewhere
    probe.groups = measurement.groups
    probe.engine = "" if measurement.engine is None else measurement.engine.name
    probe.seconds = conduct.clock() - begun
    return probe


def _staying(race: Race, look: Look, reference: Strategy) -> list[Strategy]:
    """Who is measured further after a look, the reference among them; nobody where the race is decided."""
    try:
        staying = race.open(look.found)
    except (ArithmeticError, ValueError):  # scores that cannot be compared: all go on
        return look.active
    return [s for s in look.active if s in staying or s == reference] if len(staying) > 1 else []


def alone_group(model: nn.Module, ranks: Ranks) -> Any:
    """A process group of this rank alone, for models with SyncBatchNorm; None where none is needed.

    All ranks must call it.
    """
    if ranks.size == 1 or not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return None
    groups = [distributed.new_group([rank]) for rank in range(ranks.size)]
    return groups[ranks.rank]


@contextmanager
def _unsynchronised(conduct: Conduct) -> Iterator[None]:
    """Nothing compiled anew, and statistics of SyncBatchNorm from a rank's own sub-batch, for a while."""
    synced = [m for m in conduct.model.modules() if isinstance(m, nn.SyncBatchNorm)] if conduct.alone else []
    before = [module.process_group for module in synced]
    for module in synced:
        module.process_group = conduct.alone
    try:
        with torch.compiler.set_stance("force_eager"):  # a probe's shapes are not worth graphs of their own
            yield
    finally:
        for module, group in zip(synced, before, strict=True):
            module.process_group = group


def refused(conduct: Conduct, samples: int, seed: int) -> tuple[dict[Strategy, str], float]:
    """The strategies whose loss raises an error on a few samples, and why; and the units that finding out cost.

    A loss that is not finite is no refusal. Passes without gradient; the model is left untouched. Raises TaskError
    where there is no batch.
    """
    task, model = conduct.task, conduct.model
    found, units = dict[Strategy, str](), 0.0
    with untouched(model), torch.no_grad(), _unsynchronised(conduct):
        try:
            batch = next(iter(task.batches(samples, seed)), None)
        except Exception as error:
            raise TaskError(f"batches(size={samples}, seed={seed}) fails: {reason(error)}") from error
        if batch is None:
            raise TaskError(f"batches(size={samples}, seed={seed}) yields nothing")
        few = take(batch, slice(samples))
        for strategy in task.grid.strategies():
            try:
                torch.manual_seed(seed)
                task.loss(model, few, strategy, torch.Generator().manual_seed(seed))
                units += samples * task.cost(strategy)
            except Exception as error:
                found[strategy] = reason(error)
    return found, units


def gives_sample_losses(task: Task) -> bool:
    """Whether a task has loss terms of its own for every sample, so that an engine is to be chosen."""
    if isinstance(task, LoopTask):
        return task.gives_sample_losses
    return type(task).sample_losses is not Task.sample_losses


class _Live:
    """A task whose model is being trained: its second moment is the optimizer's, not a file's."""

    def __init__(self, task: Task, second_moment: Mapping[str, Tensor] | None) -> None:
        self._task, self._second_moment = task, second_moment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def second_moment(self, checkpoint: Path, model: nn.Module) -> Mapping[str, Tensor] | None:
        return self._second_moment


def live_second_moment(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor] | None:
    """Adam's bias-corrected second moment v / (1 - beta2^t) by parameter name, from the optimizer's own state.

    None without an optimizer of Adam's kind, or where a trainable parameter has not been moved yet.
    """
    if optimizer is None:
        return None
    found: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state and "betas" in group:
                step = state.get("step", group.get("step"))  # some kinds count in the group
                if step is None:
                    return None
                correction = 1 - group["betas"][1] ** float(step)
                found[id(parameter)] = state["exp_avg_sq"] / correction
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(id(p) not in found for p in named.values()):
        return None
    return {name: found[id(p)] for name, p in named.items()}

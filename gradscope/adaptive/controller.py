"""The object that a training loop asks for its next strategy, and tells of every step."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradscope.adaptive.probe import (
    Conduct,
    Probe,
    alone_group,
    gives_sample_losses,
    live_second_moment,
    refused,
    run_probe,
)
from gradscope.checks import reason
from gradscope.errors import GradscopeError, InfeasibleError, Interrupted, RankError, TaskError, UsageError, WriteError
from gradscope.measuring import SECOND_MOMENT_REPLICATES
from gradscope.profile_options import ESTIMATORS
from gradscope.ranks import Ranks, current_ranks
from gradscope.task import Task
from schedulers import AdaptivePolicy, AdaptiveRule, Decision, Schedule, Strategy, Verdict, parse_count

VERSION = 2
CHOICE = 32  # samples of every strategy that choosing the engine takes, a little more than `engines.choose` does
SAMPLES = 8  # on which it is tried whether the model takes every strategy
Report = Callable[[str], None]

if TYPE_CHECKING:
    from gradscope.adaptive.record import ProbeRows


@dataclass(frozen=True)
class ProbeRecord:
    """One probe as it is told: `units` and `seconds` that it took, what it led to, and what failed in it.

    `scores` are those of the criterion, pooled over probes, `errors` one standard error of each; `advantage` and
    `standard_error` of `best` over what ran before, None where nothing was to decide. `sub_batches` is the most that
    any strategy was measured on.
    """

    step: int
    fraction: float
    units: float
    seconds: float
    strategies: int
    sub_batches: int
    best: str
    advantage: float | None
    standard_error: float | None
    switched: bool
    scores: dict[str, float]
    errors: dict[str, float]
    failures: dict[str, str]
    error: str


class AdaptiveController:
    """Chooses the strategy of every optimizer step of a loop, by what it measures while the loop runs.

        controller = AdaptiveController(task, model, optimizer, budget="2M", batch_size=64)
        while not controller.finished:
            strategy = controller.at(step)
            ...  # loss of the batch under `strategy`, loss.backward()
            controller.observe(step)
            optimizer.step()

    `task`: a `Task` (or `LoopTask`), whose `grid`, `batches`, `loss` and `cost` are used; `load` is not. `model`: the
    module that is trained, without a wrapper such as DistributedDataParallel. `optimizer`: for the metric "optimizer",
    which is the second moment of Adam's kind; for an optimizer without betas (SGD) it is "euclidean", and where there
    is no optimizer, or no second moment of every parameter, it is estimated, which costs passes. `budget` in units,
    also as 100M; `batch_size` samples of an optimizer step, over all ranks and accumulated passes. `ranks`: default
    those of torch.distributed, where it is
    initialised. `cube`: a file that gets the measurements, as `gradscope profile` writes them. `report`: is told of
    every probe and decision, in one line, on the first rank; by default the logger "gradscope" is, at level INFO.
    `precision`: "bf16" measures under autocast. `estimator`: the engine, as of `gradscope profile`; by default the
    first probe chooses one. `charge`: whether the budget pays for probes (off only to compare runs that are to be
    equal). `check`: whether it is tried at once, on a few samples, which strategies the model refuses.

    Steps are absolute, counted by the loop. Everything follows from seed, step and what was measured: a run that is
    continued from `state_dict` decides as it would have. Raises UsageError for values out of range and an
    optimizer of another model, InfeasibleError for a budget below one step, TaskError where the model refuses the
    reference.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        budget: float | str,
        batch_size: int,
        rule: AdaptiveRule | None = None,
        seed: int = 0,
        ranks: Ranks | None = None,
        cube: str | os.PathLike[str] | None = None,
        report: Report | None = None,
        precision: str = "float32",
        estimator: str = "auto",
        charge: bool = True,
        check: bool = True,
    ) -> None:
        rule = rule or AdaptiveRule()
        self.task, self.model, self.optimizer, self.charge = task, model, optimizer, charge
        self.ranks = current_ranks() if ranks is None else ranks
        self.report: Report = (report or logging.getLogger("gradscope").info) if self.ranks.first else _nobody
        if (apart := _apart(model, optimizer)) == "copy":
            raise UsageError(
                "the optimizer has none of the model's parameters but others like them: give the model that it trains, "
                "not a copy of that"
            )
        if apart:
            self.report("the optimizer has none of the model's parameters: its second moment is estimated by passes")
        strategies = task.grid.strategies()
        costs = {s: task.cost(s) for s in strategies}
        self.policy = AdaptivePolicy(
            task.grid,
            costs,
            budget=parse_count(budget),
            batch_size=batch_size,
            rule=rule,
            seed=seed,
            shared={s: task.shared_costs(s) for s in strategies},
        )
        self.step, self.samples = 0, 0
        self._spent = 0.0
        self.probe_seconds = 0.0  # of probes with all that belongs to them
        if estimator not in ESTIMATORS:
            raise UsageError(f"estimator={estimator!r}: choose one of {', '.join(ESTIMATORS)}")
        self._engine = estimator
        self.probes: list[ProbeRecord] = []
        self.cube = None if cube is None else Path(cube)
        self._rows: ProbeRows | None = None
        euclidean = optimizer is not None and "betas" not in optimizer.defaults
        metric = "euclidean" if euclidean else rule.metric
        self._conduct = Conduct(
            task,
            model,
            self.ranks,
            rule.sub_batch or batch_size,
            seed,
            ("euclidean",) if euclidean else ("euclidean", "optimizer"),
            metric,
            rule.criterion,
            rule.minimum,
            costs,
            batch_size,
            precision,
            alone_group(model, self.ranks),
        )
        if euclidean and rule.metric == "optimizer":
            self.report(f"{type(optimizer).__name__} keeps no second moment: gradients are compared as they are")
        smallest = batch_size * max(costs.values())
        if self.budget < smallest:
            raise InfeasibleError(
                f"budget {self.budget:,.0f} does not pay for one step of {batch_size} samples; the smallest that does "
                f"is {smallest:.0f}",
                smallest=smallest,
            )
        if check and len(strategies) > 1:
            self._leave_out_refused()
        self._tell_if_blind()

    @property
    def budget(self) -> float:
        """Units of the whole run."""
        return self.policy.budget

    @property
    def spent(self) -> float:
        """Units spent so far, on training and on probes."""
        return self._spent

    @property
    def remaining(self) -> float:
        return max(self.budget - self.spent, 0.0)

    @property
    def fraction(self) -> float:
        """Spent share of the budget, in [0, 1]; what a learning rate should follow."""
        return min(self.spent / self.budget, 1.0)

    @property
    def probe_units(self) -> float:
        """Units spent on probes."""
        return self.policy.probe_units

    @property
    def finished(self) -> bool:
        """Whether the budget does not pay for the next step."""
        return self.spent + self.cost(self.step) > self.budget

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return self.policy.decisions

    def at(self, step: int) -> Strategy:
        """The strategy of an optimizer step: for a past one what was used, for the next one what is to be."""
        return self.policy.at(step)

    def cost(self, step: int) -> float:
        """Units that a step of the whole batch costs."""
        return self.policy.batch_size * self.policy.costs[self.at(step)]

    def observe(self, step: int, *, samples: int | None = None) -> None:
        """Note that optimizer step `step` has its gradient: once per step, after backward(), before zero_grad().

        Charges the step, makes a probe when one is due, and decides; what is decided holds from the next step on.
        `samples`: of this step over all ranks, the same number on each, where it is not the whole batch. A probe that
        fails is told and changes nothing. Raises UsageError where there is no gradient yet, and for a step out of
        order.
        """
        if step != self.step:
            raise UsageError(
                f"observe(step={step}): the next optimizer step is {self.step}; call it once for every optimizer step, "
                "in order, and load the controller's state with the model's when a run is continued"
            )
        if all(p.grad is None for p in self.model.parameters() if p.requires_grad):
            raise UsageError(
                f"observe(step={step}): no parameter has a gradient; call it after loss.backward() and before "
                "optimizer.zero_grad()"
            )
        if samples is not None and not 0 < samples <= self.policy.batch_size:
            raise UsageError(f"samples={samples} of a step with a batch of {self.policy.batch_size}")
        count = self.policy.batch_size if samples is None else samples
        self._spent += count * self.policy.costs[self.at(step)]
        self.samples += count
        self.step = step + 1
        self.policy.advance(step, self.spent)
        if self.policy.plan(self.spent) is not None:
            self._probe(step)
        if self.finished and self.probes:
            self.write_cube()

    def _probe(self, step: int) -> None:
        """Make the probe that is due, and decide."""
        self.ranks.agree("the step of a probe", (step,))
        moment, choice = None, 0.0
        if self._engine == "auto" and gives_sample_losses(self.task):  # trying per-sample gradients is to be paid, too
            choice = CHOICE * math.fsum(self.policy.costs.values()) * self.ranks.size
        set_up = choice
        if "optimizer" in self._conduct.metrics:
            moment = live_second_moment(self.model, self.optimizer)
            if moment is None:
                sub_batch = self._conduct.sub_batch
                each = SECOND_MOMENT_REPLICATES * sub_batch * self.policy.costs[self.task.grid.reference]
                set_up += each * self.ranks.size  # every rank estimates it
        plan = self.policy.plan(self.spent, set_up=set_up)
        if plan is None:
            return
        begun = self._conduct.clock()
        probe = run_probe(
            self._conduct, plan, step=step, fraction=self.fraction, second_moment=moment, engine=self._engine
        )
        probe.units += choice
        self._take(step, probe)
        self.probe_seconds += self._conduct.clock() - begun

    def schedule(self) -> Schedule:
        """What was run up to now, as a schedule; its last stage lasts to the end of the budget."""
        return self.policy.schedule(self.spent)

    def write_cube(self, *, must: bool = False) -> None:
        """Write all measurements to the file `cube`, on the first rank.

        Done by itself from time to time and when the budget is spent; before a checkpoint is saved it keeps both
        together. A file that cannot be written is told and changes nothing; with `must` a WriteError is raised.
        """
        if self.cube is not None and self.ranks.first:
            rows = self._rows_of(self.cube)
            self._write(lambda: rows.save(self), must=must)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decisions depend on, as plain values; `torch.load(weights_only=True)` and JSON keep it."""
        return {
            "version": VERSION,
            "step": self.step,
            "spent": self.spent,
            "samples": self.samples,
            "probe_seconds": self.probe_seconds,
            "engine": self._engine,
            "probes": [dataclasses.asdict(record) for record in self.probes],
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Continue from a state; model and optimizer must be those of the same step.

        Raises UsageError for a state of another task, budget, batch, seed or rule (unless not `strict`), GradscopeError
        for one that is damaged or of another version.
        """
        try:
            if int(state["version"]) != VERSION:
                how = "newer" if int(state["version"]) > VERSION else "older"
                raise GradscopeError(
                    f"the controller's state is of version {state['version']}, {how} than {VERSION}: go on with the "
                    "gradscope that wrote it"
                )
            records = [ProbeRecord(**record) for record in state["probes"]]
            step, samples, engine = int(state["step"]), int(state["samples"]), str(state["engine"])
            spent, seconds = float(state["spent"]), float(state["probe_seconds"])
            policy = state["policy"]
        except (KeyError, TypeError, ValueError) as error:
            raise GradscopeError(f"the controller's state is damaged ({type(error).__name__}: {error})") from error
        self.policy.load_state_dict(policy, strict=strict)
        self.step, self.samples, self._engine, self.probes = step, samples, engine, records
        self._rows = None
        self._spent, self.probe_seconds = spent, seconds

    def _take(self, step: int, probe: Probe) -> None:
        """Let the first rank decide, tell the others, write it down."""
        if probe.engine:
            self._engine = probe.engine
        if self.charge:
            self._spent += probe.units
        record = None
        if self.ranks.first:
            found = probe.measurement(self._conduct.metrics.index(self._conduct.metric))
            verdict = self.policy.tell(step, self.spent, probe.units, found, probe.failures)
            record = self._record_of(step, probe, verdict)
        if self.ranks.size > 1:
            # what later decisions rest on is the first rank's, to the last bit
            state, self._spent, self._engine, record = self.ranks.gather(
                (self.policy.state_dict(), self._spent, self._engine, record)
            )[0]
            self.policy.load_state_dict(state)
        assert record is not None
        self.probes.append(record)
        self.report(_told(record, self.policy))
        if self.cube is not None and self.ranks.first and probe.found:
            rows = self._rows_of(self.cube)
            self._write(lambda: rows.add(self, step, probe))

    def _record_of(self, step: int, probe: Probe, verdict: Verdict) -> ProbeRecord:
        return ProbeRecord(
            step,
            self.fraction,
            probe.units,
            round(probe.seconds, 3),
            len(probe.found),
            max((found.blocks for found in probe.found.values()), default=0),
            "" if verdict.best is None else str(verdict.best),
            verdict.advantage,
            verdict.standard_error,
            verdict.switched,
            {str(s): score for s, score in verdict.scores.items()},
            {str(s): error for s, error in verdict.errors.items()},
            {str(s): why for s, why in probe.failures.items()},
            probe.error,
        )

    def _write(self, action: Callable[[], None], *, must: bool = False) -> None:
        try:
            action()
        except (Interrupted, RankError):
            raise
        except Exception as error:  # whatever it is, no training dies of it
            if must and isinstance(error, WriteError):
                raise
            self.report(f"{self.cube} could not be written ({reason(error)}); training goes on")

    def _rows_of(self, path: Path) -> ProbeRows:
        if self._rows is None:
            from gradscope.adaptive.record import ProbeRows  # needs xarray

            self._rows = ProbeRows(path)
        return self._rows

    def _tell_if_blind(self) -> None:
        policy = self.policy
        if len(policy.strategies) < 2:
            self.report(f"there is one strategy only, {policy.strategies[0]}: nothing to choose, and no probes")
        if len(policy.strategies) < 2 or not policy.rule.overhead:
            return
        cap = policy.rule.overhead * self.budget
        if policy.planner.plan(policy.candidates, None, cap - policy.probe_units, 0.0) is None:
            pair = sorted(policy.strategies, key=policy.costs.__getitem__)[0], self.task.grid.reference
            least = policy.planner.units(pair, policy.rule.minimum) + policy.probe_units
            self.report(
                f"{policy.rule.overhead:.3g} of the budget ({cap:,.0f} units) pays for no probe, which takes "
                f"{least:,.0f} or more with what trying the strategies cost: they stay mixed; raise overhead to "
                f"{_rounded_up(least / self.budget)} or the budget, or take fewer strategies or a smaller sub_batch"
            )

    def _leave_out_refused(self) -> None:
        """Find out, on a few samples, what the model refuses, so that no training step ever tries it."""
        cap = self.policy.rule.overhead * self.budget
        expected = SAMPLES * math.fsum(self.policy.costs.values())
        if expected > cap:
            if cap:
                self.report("what the model refuses was not tried out: the cap on probes does not pay for it")
            return
        problem, found, units = "", dict[Strategy, str](), 0.0
        try:
            found, units = refused(self._conduct, SAMPLES, 0)
        except TaskError as error:
            problem = str(error)
        parts = self.ranks.gather((problem, found, units))
        if problem := next((part[0] for part in parts if part[0]), ""):
            raise TaskError(problem)
        everywhere = {s: why for part in parts for s, why in part[1].items()}
        units = max(part[2] for part in parts)  # paid for once, so that a run is the same on any number of ranks
        reference = self.task.grid.reference
        if reference in everywhere:
            raise TaskError(f"the model refuses the reference {reference}: {everywhere[reference]}")
        for strategy, why in everywhere.items():
            self.policy.leave_out(strategy, why)
            self.report(f"{strategy} is left out, the model refuses it: {why}")
        self.policy.probe_units += units
        if self.charge:
            self._spent += units


def _apart(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> str:
    """Empty where the optimizer has parameters of the model, "copy" where its own look the same, "other" otherwise."""
    if optimizer is None:
        return ""
    trained = [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]]
    own = [p for p in model.parameters() if p.requires_grad]
    if {id(p) for p in trained} & {id(p) for p in own}:
        return ""
    looks = [sorted((tuple(p.shape), str(p.dtype)) for p in group) for group in (trained, own)]
    return "copy" if looks[0] == looks[1] else "other"  # master copies of another precision, shards


def _nobody(text: str) -> None:
    """Tell nobody."""


def _told(record: ProbeRecord, policy: AdaptivePolicy) -> str:
    """A probe in one line."""
    head = f"probe at {record.fraction:.1%}: "
    if record.error and not record.strategies:
        return f"{head}nothing could be measured ({record.error}); what ran goes on"
    text = f"{record.strategies} strategies on up to {record.sub_batches} sub-batches, {record.units:,.0f} units"
    now = "all mixed" if policy.incumbent is None else str(policy.incumbent)
    text += f"; {'now' if record.switched else 'still'} {now}"
    if record.best and not record.switched and record.best != now and record.advantage is not None:
        text += f" ({record.best} leads by {record.advantage:.3g} +- {record.standard_error:.2g})"
    if record.failures:
        text += f"; failed: {', '.join(record.failures)}"
    return head + text


def _rounded_up(share: float) -> str:
    """A share in two digits that is not below it."""
    digits = 1 - math.floor(math.log10(share))
    return f"{math.ceil(share * 10**digits) / 10**digits:.{max(digits, 0)}f}"

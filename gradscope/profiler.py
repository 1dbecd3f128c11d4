"""The profile: gradient moments of every strategy at every checkpoint, cell by cell, into a cube.

A cell is one (checkpoint, strategy). Cells of a checkpoint are measured in groups that share the
reference's gradients; finished groups are written within seconds, and whenever the profile is stopped. A
cell's number is a function of the checkpoint, the strategy, the seed, K and the samples alone: the order of
cells and any interruption leave it as it is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import xarray as xr
from torch import Tensor, nn

from gradscope.checks import check_progress, check_repeatable, reason
from gradscope.cube import DONE, FAILED, groups_of, new_cube, new_groups, open_cube, put_cell, save_cube
from gradscope.engines import FlatParameters, SubBatchEngine, derive_seed
from gradscope.errors import CubeError, NonFiniteError, TaskError, UsageError
from gradscope.estimators import (
    Estimates,
    GradientStream,
    Metrics,
    PairedSums,
    Sketch,
    estimate,
    optimizer_weights,
    second_moment_from,
)
from gradscope.files import check_writable, file_digest
from gradscope.merge import copy_cells
from gradscope.signals import StopFlag
from gradscope.task import Checkpoint, Task, task_digest
from gradscope.untouched import untouched
from schedulers import Strategy
from schedulers.schedule import library_version

METRICS = ("euclidean", "optimizer")
REPLICATES = 16
SECOND_MOMENT_REPLICATES = 4
SAVE_SECONDS = 5.0
Report = Callable[[float, str], None]  # (fraction of the cells' work done, one line of news)


@dataclass(frozen=True)
class ProfileOptions:
    """How much to measure and how.

    `samples` per cell, rounded up to whole sub-batches of K, default 16 of them; `batch_size` is K, default
    the task's; `group_size` strategies are measured side by side, each group computing the reference's
    gradients once (memory: two gradients per strategy); `order` is the order in which a checkpoint's
    strategies are taken.
    """

    samples: int | None = None
    batch_size: int | None = None
    seed: int = 0
    metrics: tuple[str, ...] = METRICS
    group_size: int = 16
    order: Callable[[Sequence[Strategy]], Sequence[Strategy]] | None = None

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(f"unknown metric {name!r}; the metrics are {', '.join(METRICS)}")
        if self.group_size < 1:
            raise UsageError(f"group_size is {self.group_size}; it must be at least 1")

    def replicates(self, batch_size: int) -> int:
        """Sub-batches of `batch_size` samples per cell. Raises UsageError when too few for standard errors."""
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; a sub-batch needs at least one sample")
        count = REPLICATES if self.samples is None else -(-self.samples // batch_size)
        if count < 3:
            raise UsageError(
                f"samples={self.samples} make {count} sub-batches of {batch_size}; "
                f"standard errors need at least 3: use --samples {3 * batch_size} or more"
            )
        return count


@dataclass
class ProfileSummary:
    """What one call of `profile` did: cells measured, reused and failed, and the units it spent."""

    measured: int = 0
    reused: int = 0
    units: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


def profile(
    task: Task,
    folder: Path,
    out: Path,
    *,
    options: ProfileOptions | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> tuple[xr.DataTree, ProfileSummary]:
    """Measure every cell of the task's grid at every checkpoint of `folder` into the cube file `out`.

    Cells that `out` already holds, measured in the same way, are kept; `overwrite` starts anew. A cell whose
    loss fails or is not finite is marked failed and the profile goes on. Raises CheckpointError, TaskError,
    CubeError when `out` is another profile's, UsageError for options out of range, Interrupted on a signal.
    """
    options = options or ProfileOptions()
    checkpoints = task.checkpoints(folder)
    return _Profile(task, folder, checkpoints, out, options, overwrite, report or (lambda fraction, text: None)).run()


def expected_work(
    task: Task, folder: Path, out: Path, options: ProfileOptions, overwrite: bool = False
) -> tuple[int, float]:
    """Cells that `profile` would measure with these arguments, and the units they cost. Raises what it would."""
    planned = _Profile(task, folder, task.checkpoints(folder), out, options, overwrite, lambda fraction, text: None)
    return planned.expected_work()


class _Profile:
    """One profile in memory: which cells are wanted, which are there, and where they go."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        checkpoints: Sequence[Checkpoint],
        out: Path,
        options: ProfileOptions,
        overwrite: bool,
        report: Report,
    ) -> None:
        self.task, self.checkpoints, self.out, self.options, self.report = task, checkpoints, out, options, report
        self.batch_size = task.batch_size if options.batch_size is None else options.batch_size
        self.replicates = options.replicates(self.batch_size)
        check_progress(checkpoints)
        check_writable(out)
        self.digests = [file_digest(checkpoint.path) for checkpoint in checkpoints]
        self.summary = ProfileSummary()
        self.cube = self._empty_cube(folder)
        self.units_before = 0.0
        self.groups: xr.Dataset | None = None
        if out.exists() and not overwrite:
            self._take_over(open_cube(out))

    def run(self) -> tuple[xr.DataTree, ProfileSummary]:
        """Measure what is wanted and not there; written at most every SAVE_SECONDS and however the loop ends."""
        wanted = [(t, strategies) for t in range(len(self.checkpoints)) if (strategies := self._pending(t))]
        total = sum(self.task.cost(s) for _, strategies in wanted for s in strategies) or 1.0
        self.summary.reused = int((self.cube["status"] == DONE).sum())
        finished, saved, size = 0.0, time.monotonic(), self.options.group_size
        try:
            with StopFlag() as stop:
                for t, strategies in wanted:
                    model = self.task.load(self.checkpoints[t].path)
                    if t == wanted[0][0]:
                        check_repeatable(self.task, model, self.batch_size, self.options.seed)
                    for group in (strategies[i : i + size] for i in range(0, len(strategies), size)):
                        work = sum(self.task.cost(s) for s in group)

                        def news(m: int, done: float = finished, work: float = work, t: int = t) -> None:
                            stop.raise_if_set("stopped; finished cells are saved, run the same command to continue")
                            text = f"progress {self.checkpoints[t].progress:.2f}  sub-batch {m}/{self.replicates}"
                            self.report((done + work * m / self.replicates) / total, text)

                        self._measure(t, model, group, news)
                        finished += work
                        if time.monotonic() - saved > SAVE_SECONDS:
                            self._save()
                            saved = time.monotonic()
                stop.raise_if_set("stopped after the last cell; this profile is complete")
        finally:
            if self.summary.measured or self.summary.failures or not wanted:
                self._save()
        return xr.DataTree.from_dict(
            {"/": self.cube, **({} if self.groups is None else {"/param_groups": self.groups})}
        ), self.summary

    def _measure(self, t: int, model: nn.Module, strategies: Sequence[Strategy], news: Callable[[int], None]) -> None:
        checkpoint, grid = self.checkpoints[t], self.task.grid
        with untouched(model):
            found, failures, names = self._moments(checkpoint, model, strategies, news)
        if self.groups is None:
            self.groups = new_groups(self.cube, names)
        elif [str(name) for name in self.groups["param_group"].values] != list(names):
            raise TaskError(f"{checkpoint.path.name}: its parameter groups differ from those of the other checkpoints")
        for strategy in strategies:
            index = (t, *grid.position(strategy))
            if strategy in found:
                put_cell(self.cube, self.groups, index, found[strategy], batch_size=self.batch_size, key=self._key(t))
                self.summary.measured += 1
            else:
                if self.cube["status"].values[index] != DONE:  # an earlier measurement of fewer samples stays
                    self.cube["status"].values[index] = FAILED
                    self.cube["cell_key"].values[index] = self._key(t)
                self.summary.failures[f"progress={checkpoint.progress:g},{strategy}"] = failures[strategy]
        self.cube.attrs["failures_json"] = json.dumps(self.summary.failures)

    def _moments(
        self, checkpoint: Checkpoint, model: nn.Module, strategies: Sequence[Strategy], news: Callable[[int], None]
    ) -> tuple[dict[Strategy, Estimates], dict[Strategy, str], tuple[str, ...]]:
        """Estimates, or the reason of failure, of each strategy, and the names of the parameter groups."""
        task, reference = self.task, self.task.grid.reference
        parameters = FlatParameters.of(task, model)
        engine = SubBatchEngine(task, model, parameters)

        def gradient(batch: object, strategy: Strategy, m: int) -> Tensor:
            self.summary.units += self.batch_size * task.cost(strategy)
            return engine.gradient(batch, strategy, seed=derive_seed(self.options.seed, checkpoint.step, m, strategy))

        failures: dict[Strategy, str] = {}
        names = parameters.layout.names
        try:
            metrics = self._metrics(checkpoint, model, parameters, gradient)
            sketch = Sketch(parameters.layout, seed=derive_seed("sketch", self.options.seed), device=parameters.device)
            z_stream = GradientStream(parameters.layout, metrics, sketch)
            streams = {
                s: z_stream if s == reference else GradientStream(parameters.layout, metrics, sketch)
                for s in strategies
            }
            paired = {s: PairedSums(parameters.layout, metrics) for s in strategies}
            batches = task.batches(self.batch_size, self.options.seed)
            for m in range(self.replicates):
                news(m)
                batch = next(batches)
                z_P = gradient(batch, reference, m)
                z_stream.add(z_P)
                for strategy in [s for s in strategies if s not in failures]:
                    try:
                        g_P = z_P if strategy == reference else gradient(batch, strategy, m)
                    except (NonFiniteError, RuntimeError, ValueError) as error:
                        failures[strategy] = reason(error)
                        continue
                    if strategy != reference:
                        streams[strategy].add(g_P)
                    paired[strategy].add(g_P, z_P)
        except StopIteration:
            raise TaskError(
                f"batches(size={self.batch_size}) ended before {self.replicates} sub-batches; lower "
                "--samples or make it endless"
            ) from None
        except (NonFiniteError, torch.OutOfMemoryError) as error:
            return {}, {s: f"reference: {reason(error)}" for s in strategies}, names
        found = {
            s: estimate(streams[s], z_stream, paired[s], batch_size=self.batch_size)
            for s in strategies
            if s not in failures
        }
        return found, failures, names

    def _metrics(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        parameters: FlatParameters,
        gradient: Callable[[object, Strategy, int], Tensor],
    ) -> Metrics:
        """Each metric's weights; Adam's second moment is the checkpoint's, else estimated from a few sub-batches."""
        weights: dict[str, Tensor | None] = {}
        for name in self.options.metrics:
            if name == "euclidean":
                weights[name] = None
                continue
            known = self.task.second_moment(checkpoint.path, model)
            if known is None:
                # other sub-batches than those of the estimates, which would otherwise not be unbiased
                batches = self.task.batches(self.batch_size, derive_seed("metric", self.options.seed) % 2**31)
                first = [
                    gradient(batch, self.task.grid.reference, -1 - m)
                    for m, batch in zip(range(SECOND_MOMENT_REPLICATES), batches, strict=False)
                ]
                weights[name] = optimizer_weights(second_moment_from(first, parameters.layout))
            else:
                missing = [n for n in parameters.names if n not in known]
                if missing:
                    raise TaskError(f"second_moment gives nothing for parameter {missing[0]!r}")
                weights[name] = optimizer_weights(parameters.flatten(dict(known)))
        return Metrics(weights)

    def _pending(self, t: int) -> list[Strategy]:
        """Strategies of checkpoint t whose cell is not there with this key and at least as many samples."""
        grid = self.task.grid
        enough = self.replicates * self.batch_size
        strategies = [
            s
            for s in grid.strategies()
            if not (
                self.cube["status"].values[at := (t, *grid.position(s))] == DONE
                and self.cube["cell_key"].values[at] == self._key(t)
                and self.cube["n_samples"].values[at] >= enough
            )
        ]
        return list(self.options.order(strategies)) if self.options.order else strategies

    def expected_work(self) -> tuple[int, float]:
        """Cells wanted, and their units, the reference's gradients of every group included."""
        reference, size = self.task.grid.reference, self.options.group_size
        cells, cost = 0, 0.0
        for t in range(len(self.checkpoints)):
            strategies = self._pending(t)
            cells += len(strategies)
            for group in (strategies[i : i + size] for i in range(0, len(strategies), size)):
                cost += sum(self.task.cost(s) for s in {*group, reference})
        return cells, cost * self.replicates * self.batch_size

    def _key(self, t: int) -> str:
        return f"{self.digests[t][:16]}-{task_digest(self.task)}-{self.options.seed}-{self.batch_size}"

    def _empty_cube(self, folder: Path) -> xr.Dataset:
        task, grid = self.task, self.task.grid
        strategies = grid.strategies()
        costs: dict[str, dict[Strategy, float]] = {"tokens": {s: task.cost(s) for s in strategies}}
        tokens: dict[str, dict[Strategy, int]] = {}
        for strategy in strategies:
            for model, value in task.other_costs(strategy).items():
                costs.setdefault(model, {})[strategy] = value
            for name, length in task.tokens(strategy).items():
                tokens.setdefault(name, {})[strategy] = length
        described = task.describe()
        return new_cube(
            grid,
            progress=[checkpoint.progress for checkpoint in self.checkpoints],
            steps=[checkpoint.step for checkpoint in self.checkpoints],
            names=[checkpoint.path.name for checkpoint in self.checkpoints],
            digests=self.digests,
            metrics=self.options.metrics,
            costs=costs,
            tokens=tokens,
            attributes={
                "Conventions": "CF-1.11",
                "title": "Cost-adjusted bias and variance of accelerated gradients",
                "source": "gradscope profile",
                "references": "Accelerating Augmentation Invariance Pretraining, NeurIPS 2024",
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "creation_library": "gradscope",
                "creation_library_version": library_version(),
                "creation_library_language": "Python",
                "history": f"{datetime.now(UTC):%Y-%m-%d} gradscope {' '.join(sys.argv[1:2])}".rstrip(),
                "task_digest": task_digest(task),
                "config_json": json.dumps(described, sort_keys=True),
                "training_json": json.dumps(dict(task.training(folder))),
                "failures_json": "{}",
                "batch_size": self.batch_size,
                "beta": self.batch_size * task.cost(grid.reference),
                "seed": self.options.seed,
                "engine": SubBatchEngine.name,
                "torch_version": str(torch.__version__),
                "device_name": _device_name(task),
            },
        )

    def _take_over(self, old: xr.DataTree) -> None:
        """Keep the cells of an existing file, after checking that it is the same profile."""
        changed = [
            name
            for name in ("task_digest", "seed", "batch_size", "reference", "beta")
            if old.attrs.get(name) != self.cube.attrs[name]
        ]
        if [str(m) for m in old.to_dataset()["metric"].values] != list(self.options.metrics):
            changed.append("metrics")
        if changed:
            raise CubeError(
                f"{self.out}: holds another profile (another {', '.join(changed)}); use --overwrite to "
                "start anew, or another --out"
            )
        child = groups_of(old)
        if child is not None:
            self.groups = new_groups(self.cube, [str(name) for name in child["param_group"].values])
        try:
            copy_cells(old, self.cube, self.groups)
        except CubeError as error:
            raise CubeError(f"{self.out}: {error}; use --overwrite to start anew, or another --out") from error
        self.units_before = float(old.attrs.get("units", 0.0))
        self.cube.attrs["created_at"] = old.attrs.get("created_at", self.cube.attrs["created_at"])

    def _save(self) -> None:
        self.cube.attrs["units"] = self.units_before + self.summary.units
        save_cube(self.cube, self.groups, self.out)


def _device_name(task: Task) -> str:
    device = getattr(task, "device", None)
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "cpu"

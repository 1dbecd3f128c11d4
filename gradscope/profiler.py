"""The profile: gradient moments of every strategy at every checkpoint, cell by cell, into a cube.

A cell is one (checkpoint, strategy). With racing the strategies of a checkpoint are measured side by side and
leave one after the other, as soon as it is known that they are not the best; afterwards the cells between
which the best strategy changes are measured further, where their errors leave open at what progress. With a
fixed allocation every cell gets the same number of samples. Finished cells are written within seconds, and
whenever the profile is stopped. Neither the order of cells nor any interruption changes a number.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import xarray as xr
from torch import nn

from gradscope.checks import check_progress, check_repeatable, check_same_data, reason
from gradscope.cube import open_cube
from gradscope.engines import SubBatchEngine
from gradscope.errors import GradscopeError, TaskError
from gradscope.files import check_writable, file_digest
from gradscope.locks import sole_writer
from gradscope.measuring import CheckpointMeasurement, Conditions, Look
from gradscope.profile_cube import ProfileCube
from gradscope.profile_options import ProfileOptions
from gradscope.profile_plan import Job, Plan
from gradscope.races import Entry
from gradscope.ranks import ALONE, Ranks
from gradscope.signals import StopFlag
from gradscope.task import Checkpoint, Task, numberless, task_digest
from schedulers import format_count

Report = Callable[[float, str], None]  # (fraction of the work done, one line of news)


@dataclass
class ProfileSummary:
    """What one call of `profile` did: cells measured, reused and failed, the units it spent, the engine and why."""

    measured: int = 0
    reused: int = 0
    units: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)
    engine: str = ""
    engine_reason: str = ""


def profile(
    task: Task,
    folder: Path,
    out: Path,
    *,
    options: ProfileOptions | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    ranks: Ranks = ALONE,
    command: str = "",
    tell: Callable[[str], None] | None = None,
) -> tuple[xr.DataTree, ProfileSummary]:
    """Measure every cell of the task's grid at every checkpoint of `folder` into the cube file `out`.

    Cells that `out` already holds, measured in the same way, are kept; `overwrite` starts anew. A cell whose
    loss fails or is not finite is marked failed and the profile goes on. With several `ranks` each works on its
    own sub-batches; only the first one reads and writes `out`, and only its cube is complete. `command`: the command
    line to remember in the cube (attribute `profile_command`), "" keeps what `out` remembers. `tell` gets a line on
    what is going to be measured and what it can cost, before that is spent. Raises CheckpointError, TaskError,
    CubeError when `out` is another profile's, UsageError for options out of range, Interrupted on a signal, BusyError
    while another process writes `out`, RankError when another rank is gone.
    """
    options = options or ProfileOptions()
    checkpoints = task.checkpoints(folder)
    nothing: Report = lambda fraction, text: None  # noqa: E731
    with sole_writer(out) if ranks.first else nullcontext():
        planned = _Profile(task, folder, checkpoints, out, options, overwrite, report or nothing, ranks, command)
        if tell is not None and ranks.first:
            for line in planned.news():
                tell(line)
        return planned.run()


def expected_work(
    task: Task, folder: Path, out: Path, options: ProfileOptions, overwrite: bool = False
) -> tuple[int, float, float]:
    """Cells that `profile` would measure with these arguments, and the fewest and most units they can cost.

    The two differ by what racing saves. Raises what `profile` would.
    """
    nothing: Report = lambda fraction, text: None  # noqa: E731
    planned = _Profile(task, folder, task.checkpoints(folder), out, options, overwrite, nothing, ALONE)
    return planned.plan.expected_work(planned.chosen)


def told_units(least: float, most: float) -> str:
    """`30K to 1.2M units`, `about 30K units` where racing saves nothing."""
    span = f"{format_count(least)} to {format_count(most)}" if least < most else f"about {format_count(most)}"
    return f"{span} units"


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
        ranks: Ranks,
        command: str = "",
    ) -> None:
        self.task, self.checkpoints, self.out, self.options, self.report = task, checkpoints, out, options, report
        self.folder = folder
        self.ranks = ranks
        self.batch_size = task.batch_size if options.batch_size is None else options.batch_size
        self.rule = options.rule(self.batch_size)
        self.conditions = Conditions(
            self.batch_size, options.seed, options.metrics, options.estimator, options.precision
        )
        check_progress(checkpoints)
        self.chosen = options.chosen(len(checkpoints))
        options.check_only(task.grid)
        self.summary = ProfileSummary()
        digests = [file_digest(checkpoint.path) for checkpoint in checkpoints]
        ranks.same(
            "the checkpoints", [(c.step, c.progress, digest) for c, digest in zip(checkpoints, digests, strict=True)]
        )
        ranks.same("the task", (task_digest(task), task.grid.strategies()))
        ranks.same("the options", (options, self.batch_size))
        least = self.rule.minimum * self.batch_size
        self.cells = ProfileCube(
            task, folder, checkpoints, digests, self.conditions, out, least, self.rule.maximum, command
        )
        self.plan = Plan(task, options, self.rule, self.batch_size, self.cells)
        self.checked, self.shown, self.engine_source = False, 0.0, ""
        if ranks.first:
            check_writable(out)
            if out.exists() and not overwrite:
                engine = self.cells.take_over(open_cube(out))
                if engine != "auto":
                    self.conditions = replace(self.conditions, estimator=engine)
                    self.engine_source = f"as in the cells that {out} holds"
        self.conditions = ranks.gather(self.conditions)[0]

    def news(self) -> list[str]:
        """What is going to be measured, and which files are not read."""
        cells, least, most = self.plan.expected_work(self.chosen)
        there, news = self.cells.done_count, list[str]()
        taken = {checkpoint.path.name for checkpoint in self.checkpoints}
        if left := [name for name in numberless(self.folder) if name not in taken]:
            news.append(f"{self.folder}: left out, as there is no number in their names: {', '.join(left)}")
        if cells:
            further = f"; the cube holds {there:,} of {self.cells.cube['status'].size:,} already" if there else ""
            news.append(f"{cells:,} cells to measure for {told_units(least, most)} besides the set-up{further}")
        return news

    def run(self) -> tuple[xr.DataTree, ProfileSummary]:
        """Measure what is wanted and not there; written at most every SAVE_SECONDS and however the loop ends."""
        self.summary.reused = self.cells.done_count
        idle = True
        with StopFlag() as stop:  # also while saving: a launcher's second signal must not cut that off
            try:
                for job in self._jobs():
                    idle = False
                    self._measure(job, stop)
            finally:
                self.summary.reused -= len(self.cells.rewritten)
                self.summary.failures = self.cells.failures
                if self.ranks.first and (
                    self.cells.book.entries or self.summary.measured or self.summary.failures or idle
                ):
                    self.cells.save(self.summary.units)
            stop.raise_if_set("stopped after the last cell; this profile is complete")
        return self.cells.tree, self.summary

    def _jobs(self) -> Iterator[Job]:
        """What to measure, checkpoint by checkpoint, then at the boundaries; the first rank plans for all."""
        tried: set[object] = set()
        for t in self.chosen:
            tried.clear()
            while job := self.ranks.gather(self.plan.next_job(t, tried))[0]:
                tried |= job.marks
                yield job
        tried.clear()
        while self._all_there and (job := self.ranks.gather(self.plan.boundary_job(tried))[0]):
            tried |= job.marks
            yield job

    @property
    def _all_there(self) -> bool:
        """Whether boundaries are to be measured: a gap between some of the checkpoints would be another one."""
        return self.options.racing and len(self.chosen) == len(self.checkpoints)

    def _measure(self, job: Job, stop: StopFlag) -> None:
        checkpoint = self.checkpoints[job.t]
        model = self._load(checkpoint.path)
        if not self.checked:
            self.checked = True
            norm = check_repeatable(self.task, model, self.batch_size, self.options.seed)
            check_same_data(self.ranks, norm)
        measurement = CheckpointMeasurement(
            self.task, checkpoint, model, self.conditions, self.ranks, self.options.accumulators
        )
        active = list(job.strategies)

        def step(m: int) -> None:
            if self.ranks.any(stop.signal is not None):
                stop.signal = stop.signal or signal.SIGTERM
                stop.raise_if_set("stopped; finished cells are saved, run the same command for the others")
            share = (self.chosen.index(job.t) + m / job.looks[-1]) / len(self.chosen)
            text = f"progress {checkpoint.progress:.2f}  sub-batch {m}/{job.looks[-1]}  {len(active)} strategies"
            self.shown = max(self.shown, share)  # boundary cells come back to earlier checkpoints
            self.report(self.shown, text)
            if self.ranks.first:
                self.cells.save_when_due(self.summary.units + measurement.units + measurement.units_elsewhere)

        try:
            with closing(measurement.run(job.strategies, job.looks, step)) as looks:  # restores the model at once
                for look in looks:
                    self._note_engine(measurement)
                    if self.ranks.first:
                        self._take(job, look, measurement)
                    active = look.active
        finally:
            self.summary.units += measurement.units + measurement.units_elsewhere

    def _load(self, path: Path) -> nn.Module:
        try:
            return self.task.load(path)
        except (GradscopeError, OSError):
            raise
        except Exception as error:
            raise TaskError(f"{path}: the task's load failed on it: {reason(error)}") from error

    def _take(self, job: Job, look: Look, measurement: CheckpointMeasurement) -> None:
        """Put what is finished into the cube; whoever goes on stays in `look.active`."""
        cells = self.cells
        cells.check_groups(measurement.groups, job.t)
        last, finished = look.blocks == job.looks[-1], list(look.active)
        if job.race:
            still_open = job.race.open(look.found)
            cells.note(job.t, Entry.of(job.race, look.blocks, still_open))
            if len(still_open) > 1 and not last:
                finished = [s for s in look.active if s not in still_open]
        for strategy in finished:
            cells.put(job.t, strategy, look.found[strategy])
        if finished and look.reference is not None and self.options.only is None:
            cells.put(
                job.t, self.task.grid.reference, look.reference
            )  # all share its |G|^2, the better known the better
        self.summary.measured = len(cells.written)
        for strategy, why in look.failures.items():
            cells.fail(job.t, strategy, why)
        look.active = [s for s in look.active if s not in finished]

    def _note_engine(self, measurement: CheckpointMeasurement) -> None:
        engine = measurement.engine
        if engine is None or self.summary.engine:
            return
        self.summary.engine = engine.name
        self.summary.engine_reason = self.engine_source or measurement.engine_reason
        self.cells.note_engine(
            engine.name, engine.parameters.device, whole_sub_batches=isinstance(engine, SubBatchEngine)
        )
        self.conditions = replace(self.conditions, estimator=engine.name)

"""The profile: gradient moments of every strategy at every checkpoint, cell by cell, into a cube.

A cell is one (checkpoint, strategy). With racing the strategies of a checkpoint are measured side by side and
leave one after the other, as soon as it is known that they are not the best; afterwards the cells between
which the best strategy changes are measured further, where their errors leave open at what progress. With a
fixed allocation every cell gets the same number of samples. Finished cells are written within seconds, and
whenever the profile is stopped. Neither the order of cells nor any interruption changes a number.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import xarray as xr

from gradscope.checks import check_progress, check_repeatable
from gradscope.cube import (
    DONE,
    FAILED,
    groups_of,
    new_groups,
    open_cube,
    profile_of,
    put_cell,
    save_cube,
    variable_name,
)
from gradscope.engines import SubBatchEngine
from gradscope.errors import CubeError, TaskError
from gradscope.estimators import Estimates
from gradscope.files import check_writable, file_digest
from gradscope.measuring import CheckpointMeasurement, Conditions, Look, unshared_cost
from gradscope.merge import copy_cells
from gradscope.profile_cube import empty_cube
from gradscope.profile_options import ProfileOptions
from gradscope.races import Race, RaceBook
from gradscope.ranks import ALONE, Ranks
from gradscope.signals import StopFlag
from gradscope.task import Checkpoint, Task, task_digest
from schedulers import Strategy, boundary_cells, get_criterion

SAVE_SECONDS = 5.0
TERMS = ("gradient of one sample's loss term, given constants", "gradient of the mean loss of a sub-batch of K samples")
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
) -> tuple[xr.DataTree, ProfileSummary]:
    """Measure every cell of the task's grid at every checkpoint of `folder` into the cube file `out`.

    Cells that `out` already holds, measured in the same way, are kept; `overwrite` starts anew. A cell whose
    loss fails or is not finite is marked failed and the profile goes on. With several `ranks` each works on its
    own sub-batches; only the first one reads and writes `out`, and only its cube is complete. Raises
    CheckpointError, TaskError, CubeError when `out` is another profile's, UsageError for options out of range,
    Interrupted on a signal, RankError when another rank is gone.
    """
    options = options or ProfileOptions()
    checkpoints = task.checkpoints(folder)
    nothing: Report = lambda fraction, text: None  # noqa: E731
    return _Profile(task, folder, checkpoints, out, options, overwrite, report or nothing, ranks).run()


def expected_work(
    task: Task, folder: Path, out: Path, options: ProfileOptions, overwrite: bool = False
) -> tuple[int, float, float]:
    """Cells that `profile` would measure with these arguments, and the fewest and most units they can cost.

    The two differ by what racing saves. Raises what `profile` would.
    """
    nothing: Report = lambda fraction, text: None  # noqa: E731
    return _Profile(task, folder, task.checkpoints(folder), out, options, overwrite, nothing, ALONE).expected_work()


@dataclass(frozen=True)
class _Job:
    """Strategies to measure at checkpoint t, the sub-batches at which to look, the race if it is one."""

    t: int
    strategies: tuple[Strategy, ...]
    looks: tuple[int, ...]
    race: Race | None


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
    ) -> None:
        self.task, self.checkpoints, self.out, self.options, self.report = task, checkpoints, out, options, report
        self.ranks = ranks
        self.batch_size = task.batch_size if options.batch_size is None else options.batch_size
        self.rule = options.rule(self.batch_size)
        self.conditions = Conditions(
            self.batch_size, options.seed, options.metrics, options.estimator, options.precision
        )
        check_progress(checkpoints)
        self.chosen = options.chosen(len(checkpoints))
        self.summary = ProfileSummary()
        self.digests = [file_digest(checkpoint.path) for checkpoint in checkpoints]
        self.cube = empty_cube(task, folder, checkpoints, self.digests, self.conditions)
        self.book = RaceBook()
        self.units_before, self.saved, self.unsaved = 0.0, time.monotonic(), False
        self.groups: xr.Dataset | None = None
        self.checked = False
        if ranks.first:
            check_writable(out)
            if out.exists() and not overwrite:
                self._take_over(open_cube(out))
        self.conditions = ranks.gather(self.conditions)[0]

    def run(self) -> tuple[xr.DataTree, ProfileSummary]:
        """Measure what is wanted and not there; written at most every SAVE_SECONDS and however the loop ends."""
        self.summary.reused = int((self.cube["status"] == DONE).sum())
        idle = True
        with StopFlag() as stop:  # also while saving: a launcher's second signal must not cut that off
            try:
                for job in self._jobs():
                    idle = False
                    self._measure(job, stop)
            finally:
                if self.summary.measured or self.summary.failures or idle:
                    self._save()
            stop.raise_if_set("stopped after the last cell; this profile is complete")
        return xr.DataTree.from_dict(
            {"/": self.cube, **({} if self.groups is None else {"/param_groups": self.groups})}
        ), self.summary

    def _jobs(self) -> Iterator[_Job]:
        """What to measure, checkpoint by checkpoint, then at the boundaries; the first rank plans for all."""
        for t in self.chosen:
            tried: set[Strategy] = set()
            while job := self.ranks.gather(self._next_job(t, tried))[0]:
                tried |= set(job.strategies)
                yield job
        all_there = len(self.chosen) == len(self.checkpoints)
        while self.options.racing and all_there and (job := self.ranks.gather(self._boundary_job())[0]):
            yield job

    def _next_job(self, t: int, tried: set[Strategy]) -> _Job | None:
        """The next cells to measure at checkpoint t that were not tried before in this call."""
        missing = [s for s in self._ordered() if s not in tried and not self._done(t, s)]
        if not self.options.racing:
            enough = self.rule.maximum * self.batch_size
            wanted = [s for s in self._ordered() if s not in tried and not self._done(t, s, enough)]
            group = tuple(wanted[: self.options.group_size])
            return _Job(t, group, (self.rule.maximum,), None) if group else None
        digest = self.digests[t]
        raced = self.book.cells(digest)
        cut_off = [s for s in missing if str(s) in raced and self.cube["status"].values[self._at(t, s)] != FAILED]
        if cut_off:
            return self._race(t, cut_off, self.book.checked(digest))
        if not raced:
            missing = [s for s in self._ordered() if not self._done(t, s, self.rule.maximum * self.batch_size)]
            missing = [s for s in missing if s not in tried]
        if missing:
            best = self._best(t)
            return self._race(t, [*missing, *([best] if best is not None and best not in missing else [])], 0)
        open_still = [s for s in self._ordered() if str(s) in self.book.still_open(digest) and s not in tried]
        if open_still and self.book.checked(digest) < self.rule.maximum:
            return self._race(t, open_still, self.book.checked(digest))
        return None

    def _race(self, t: int, strategies: Sequence[Strategy], floor: int) -> _Job:
        task, reference = self.task, self.task.grid.reference
        race = Race(
            self.rule,
            get_criterion(self.options.criterion),
            self.options.metrics.index(self.options.race_metric),
            {s: task.cost(s) for s in task.grid.strategies()},
            task.cost(reference),
            self.batch_size,
            tuple(strategies),
            floor,
        )
        return _Job(t, race.cells, tuple(race.looks()), race)

    def _boundary_job(self) -> _Job | None:
        """The cells of one checkpoint whose errors leave open where the best strategy changes, at twice the samples."""
        if not bool((self.cube["status"] == DONE).any()):
            return None
        strategies, most = self.task.grid.strategies(), self.rule.maximum * self.batch_size
        cells = boundary_cells(
            profile_of(self.cube, metric=self.options.race_metric),
            self.options.criterion,
            tolerance=self.rule.tolerance,
        )
        cells = [(t, c) for t, c in cells if self._samples(t, strategies[c]) < most]
        if not cells:
            return None
        t = cells[0][0]
        here = tuple(strategies[c] for u, c in cells if u == t)
        blocks = 2 * min(self._samples(t, s) for s in here) // self.batch_size
        return _Job(t, here, (min(max(blocks, self.rule.minimum), self.rule.maximum),), None)

    def _measure(self, job: _Job, stop: StopFlag) -> None:
        checkpoint = self.checkpoints[job.t]
        model = self.task.load(checkpoint.path)
        if not self.checked:
            self.checked = True
            check_repeatable(self.task, model, self.batch_size, self.options.seed)
        measurement = CheckpointMeasurement(
            self.task, checkpoint, model, self.conditions, self.ranks, self.options.accumulators
        )
        active = list(job.strategies)

        def step(m: int) -> None:
            if self.ranks.any(stop.signal is not None):
                stop.signal = stop.signal or signal.SIGTERM
                stop.raise_if_set("stopped; finished cells are saved, run the same command to continue")
            share = (self.chosen.index(job.t) + m / job.looks[-1]) / len(self.chosen)
            text = f"progress {checkpoint.progress:.2f}  sub-batch {m}/{job.looks[-1]}  {len(active)} strategies"
            self.report(share, text)
            self._save_when_due()

        try:
            for look in measurement.run(job.strategies, job.looks, step):
                self._note_engine(measurement)
                if self.ranks.first:
                    self._take(job, look, measurement)
                active = look.active
        finally:
            self.summary.units += measurement.units + measurement.units_elsewhere

    def _take(self, job: _Job, look: Look, measurement: CheckpointMeasurement) -> None:
        """Put what is finished into the cube; whoever goes on stays in `look.active`."""
        self._check_groups(measurement.groups, job.t)
        last, finished = look.blocks == job.looks[-1], list(look.active)
        if job.race:
            still_open = job.race.open(look.found)
            self.book.note(self.digests[job.t], job.race.cells, look.blocks, still_open)
            if len(still_open) > 1 and not last:
                finished = [s for s in look.active if s not in still_open]
        for strategy in finished:
            self._put(job.t, strategy, look.found[strategy])
        for strategy, why in look.failures.items():
            self._fail(job.t, strategy, why)
        look.active = [s for s in look.active if s not in finished]
        self.unsaved = True
        self._save_when_due()

    def _put(self, t: int, strategy: Strategy, found: Estimates) -> None:
        assert self.groups is not None
        if not self._done(t, strategy, found.samples):
            put_cell(self.cube, self.groups, self._at(t, strategy), found, key=self._key(t))
        self.summary.measured += 1

    def _fail(self, t: int, strategy: Strategy, why: str) -> None:
        if self.cube["status"].values[self._at(t, strategy)] != DONE:  # an earlier measurement of fewer samples stays
            self.cube["status"].values[self._at(t, strategy)] = FAILED
            self.cube["cell_key"].values[self._at(t, strategy)] = self._key(t)
        self.summary.failures[f"progress={self.checkpoints[t].progress:g},{strategy}"] = why
        self.cube.attrs["failures_json"] = json.dumps(self.summary.failures)

    def expected_work(self) -> tuple[int, float, float]:
        """Cells wanted, and the least and most units they cost, the reference's gradients included."""
        cells, least, most = 0, 0.0, 0.0
        for t in self.chosen:
            tried: set[Strategy] = set()
            while job := self._next_job(t, tried):
                tried |= set(job.strategies)
                cells += len(job.strategies)
                shared = set[str]()
                cost = sum(
                    unshared_cost(self.task, s, shared)
                    for s in dict.fromkeys([self.task.grid.reference, *job.strategies])
                )
                least += cost * job.looks[0] * self.batch_size
                most += cost * job.looks[-1] * self.batch_size
        return cells, least, most

    def _ordered(self) -> list[Strategy]:
        strategies = list(self.task.grid.strategies())
        return list(self.options.order(strategies)) if self.options.order else strategies

    def _at(self, t: int, strategy: Strategy) -> tuple[int, ...]:
        return (t, *self.task.grid.position(strategy))

    def _samples(self, t: int, strategy: Strategy) -> int:
        return int(self.cube["n_samples"].values[self._at(t, strategy)])

    def _done(self, t: int, strategy: Strategy, samples: int = 0) -> bool:
        """Whether the cell is there, measured in this way with at least that many samples."""
        at = self._at(t, strategy)
        least = max(samples, self.rule.minimum * self.batch_size)
        return bool(
            self.cube["status"].values[at] == DONE
            and self.cube["cell_key"].values[at] == self._key(t)
            and self.cube["n_samples"].values[at] >= least
        )

    def _best(self, t: int) -> Strategy | None:
        """The best finished strategy of a checkpoint, for others to race against."""
        criterion = get_criterion(self.options.criterion)
        score = self.cube[variable_name(criterion.name)].sel(metric=self.options.race_metric).values[t]
        done = [s for s in self._ordered() if self._done(t, s) and math.isfinite(score[self.task.grid.position(s)])]
        sign = 1 if criterion.lower_is_better else -1
        return min(done, key=lambda s: sign * float(score[self.task.grid.position(s)]), default=None)

    def _key(self, t: int) -> str:
        return f"{self.digests[t][:16]}-{task_digest(self.task)}-{self.options.seed}-{self.batch_size}"

    def _note_engine(self, measurement: CheckpointMeasurement) -> None:
        if measurement.engine is None or self.summary.engine:
            return
        self.summary.engine, self.summary.engine_reason = measurement.engine.name, measurement.engine_reason
        self.cube.attrs["engine"] = measurement.engine.name
        self.cube.attrs["term"] = TERMS[measurement.engine.name == SubBatchEngine.name]
        self.conditions = replace(self.conditions, estimator=measurement.engine.name)

    def _check_groups(self, names: Sequence[str], t: int) -> None:
        if self.groups is None:
            self.groups = new_groups(self.cube, names)
        elif [str(name) for name in self.groups["param_group"].values] != list(names):
            raise TaskError(
                f"{self.checkpoints[t].path.name}: its parameter groups differ from those of the other checkpoints"
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
        engine = old.attrs.get("engine") or "auto"
        if self.options.estimator not in ("auto", engine) and engine != "auto":
            changed.append(f"estimator, {engine}")
        if old.attrs.get("precision", "float32") != self.options.precision:
            changed.append("precision")
        if changed:
            raise CubeError(
                f"{self.out}: holds another profile (another {', '.join(changed)}); use --overwrite to "
                "start anew, or another --out"
            )
        if engine != "auto":
            self.conditions = replace(self.conditions, estimator=engine)
            self.cube.attrs["engine"] = engine
        child = groups_of(old)
        if child is not None:
            self.groups = new_groups(self.cube, [str(name) for name in child["param_group"].values])
        try:
            copy_cells(old, self.cube, self.groups)
        except CubeError as error:
            raise CubeError(f"{self.out}: {error}; use --overwrite to start anew, or another --out") from error
        self.book = RaceBook.read(old.attrs.get("races_json", "{}"))
        self.units_before = float(old.attrs.get("units", 0.0))
        self.cube.attrs["created_at"] = old.attrs.get("created_at", self.cube.attrs["created_at"])

    def _save_when_due(self) -> None:
        if self.unsaved and time.monotonic() - self.saved > SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        if not self.ranks.first:
            return
        self.cube.attrs["units"] = self.units_before + self.summary.units
        self.cube.attrs["races_json"] = self.book.text()
        save_cube(self.cube, self.groups, self.out)
        self.saved, self.unsaved = time.monotonic(), False

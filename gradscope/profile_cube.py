"""The cube that a profile fills: empty with its labels, costs and provenance, then cell by cell, and its file.

Only the first rank of a distributed profile has cells in it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import xarray as xr

from gradscope.cube import (
    DONE,
    FAILED,
    failed_names,
    groups_of,
    new_cube,
    new_groups,
    profile_of,
    put_cell,
    save_cube,
    set_replicates,
)
from gradscope.cube.names import check_text
from gradscope.cube_costs import keep_costs
from gradscope.errors import CubeError, TaskError
from gradscope.estimators import Estimates
from gradscope.files import Saves
from gradscope.influence import MOST_REPLICATES, common_replicates
from gradscope.measuring import Conditions
from gradscope.merge import copy_cells
from gradscope.pilot import read_training
from gradscope.races import Entry, RaceBook
from gradscope.task import Checkpoint, Task, json_of, task_digest
from schedulers import Criterion, ScheduleError, Strategy
from schedulers.schedule import library_version

SAVE_SECONDS = 5.0
SAVE_SHARE = 50  # a profile spends at most a 50th of its time on writing
TERMS = {True: "gradient of the mean loss of a sub-batch of K samples", False: "gradient of one sample's loss term"}


class ProfileCube:
    """Cells by (checkpoint number, strategy), what is remembered of the races, and the file `out`.

    `least`: samples below which a finished cell does not count. `most`: sub-batches that a cell can get, which fixes
    the replicates of `influence`. `command`: the command line that fixes what a cell is, for people to use again.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        checkpoints: Sequence[Checkpoint],
        digests: Sequence[str],
        given: Conditions,
        out: Path,
        least: int,
        most: int,
        command: str = "",
    ) -> None:
        self.task, self.checkpoints, self.digests, self.given = task, checkpoints, digests, given
        self.out, self.least = out, least
        self.cube = empty_cube(task, folder, checkpoints, digests, given, min(most, MOST_REPLICATES))
        check_text("profile_command", command)
        self.cube.attrs["profile_command"] = command
        self.groups: xr.Dataset | None = None
        self.book = RaceBook()
        self.units_before, self.failures = 0.0, dict[str, str]()
        self.written: set[tuple[int, ...]] = set()  # cells of this call, and those of them that were there before
        self.rewritten: set[tuple[int, ...]] = set()
        self._unsaved, self._saved, self._save_seconds = False, time.monotonic(), 0.0
        self._saves = Saves()
        self._task_digest = task_digest(task)

    @property
    def tree(self) -> xr.DataTree:
        return xr.DataTree.from_dict(
            {"/": self.cube, **({} if self.groups is None else {"/param_groups": self.groups})}
        )

    @property
    def done_count(self) -> int:
        return int((self.cube["status"] == DONE).sum())

    def samples(self, t: int, strategy: Strategy) -> int:
        return int(self.cube["n_samples"].values[self._at(t, strategy)])

    def done(self, t: int, strategy: Strategy, samples: int = 0) -> bool:
        """Whether the cell is there, measured in this way with at least that many samples."""
        at = self._at(t, strategy)
        return bool(
            self.cube["status"].values[at] == DONE
            and self.cube["cell_key"].values[at] == self._key(t)
            and self.cube["n_samples"].values[at] >= max(samples, self.least)
        )

    def there(self, t: int, strategy: Strategy) -> bool:
        """Whether the cell is done, or failed under these very conditions."""
        at = self._at(t, strategy)
        failed = self.cube["status"].values[at] == FAILED and self.cube["cell_key"].values[at] == self._key(t)
        return bool(failed) or self.done(t, strategy)

    def row(self, t: int) -> str:
        """Which checkpoint, for the book of races."""
        return f"{self.digests[t][:16]}:{self.checkpoints[t].step}"

    def note(self, t: int, entry: Entry) -> None:
        """Remember a race after a look."""
        self.book.note(self.row(t), entry)
        self._unsaved = True

    def best(self, t: int, strategies: Sequence[Strategy], criterion: Criterion, metric: str) -> Strategy | None:
        """The best finished one of `strategies` at a checkpoint."""
        done = [s for s in strategies if self.done(t, s)]
        if not done:
            return None
        profile = profile_of(self.cube, metric=metric)  # all over the reference's own |G|^2
        score_C = profile.scores(criterion, profile.progress[t : t + 1])[0][0]
        names = profile.grid.strategies()
        worth = {s: float(score_C[names.index(s)]) for s in done}
        sign = 1 if criterion.lower_is_better else -1
        return min((s for s in worth if math.isfinite(worth[s])), key=lambda s: sign * worth[s], default=None)

    def put(self, t: int, strategy: Strategy, found: Estimates) -> None:
        """A finished cell; one that is there with as many samples stays."""
        assert self.groups is not None
        if self.done(t, strategy, found.samples):
            return
        at = self._at(t, strategy)
        if self.cube["status"].values[at] == DONE and at not in self.written:
            self.rewritten.add(at)
        self.written.add(at)
        put_cell(self.cube, self.groups, self._at(t, strategy), found, key=self._key(t))
        self._note_failure(t, strategy, None)

    def fail(self, t: int, strategy: Strategy, why: str) -> None:
        """A failed cell; an earlier measurement of fewer samples stays, and is all that is told where it is of now."""
        if self._at(t, strategy) in self.written:
            return
        if self.cube["status"].values[self._at(t, strategy)] != DONE:
            self.cube["status"].values[self._at(t, strategy)] = FAILED
            self.cube["cell_key"].values[self._at(t, strategy)] = self._key(t)
        self._note_failure(t, strategy, why)

    def note_engine(self, name: str, device: torch.device, *, whole_sub_batches: bool) -> None:
        self.cube.attrs["engine"], self.cube.attrs["term"] = name, TERMS[whole_sub_batches]
        if device.type == "cuda":
            self.cube.attrs["device_name"] = torch.cuda.get_device_name(device)

    def check_groups(self, names: Sequence[str], t: int) -> None:
        """Make the group's dataset, or raise TaskError when a checkpoint has other parameter groups."""
        if self.groups is None:
            self.groups = new_groups(self.cube, names)
        elif [str(name) for name in self.groups["param_group"].values] != list(names):
            raise TaskError(
                f"{self.checkpoints[t].path.name}: its parameter groups differ from those of the other checkpoints"
            )

    def take_over(self, old: xr.DataTree) -> str:
        """Keep the cells of an existing file; returns its engine, or "auto".

        Raises CubeError when it is another profile's.
        """
        changed = [
            name
            for name in ("task_digest", "seed", "batch_size", "reference", "beta")
            if old.attrs.get(name) != self.cube.attrs[name]
        ]
        if [str(m) for m in old.to_dataset()["metric"].values] != list(self.given.metrics):
            changed.append("metrics")
        engine = str(old.attrs.get("engine") or "auto")
        if self.given.estimator not in ("auto", engine) and engine != "auto":
            changed.append(f"estimator, {engine}")
        if old.attrs.get("precision", "float32") != self.given.precision:
            changed.append("precision")
        if changed:
            raise CubeError(
                f"{self.out}: holds another profile (another {', '.join(changed)}); use --overwrite to "
                "start anew, or another --out"
            )
        for name in ("engine", "term", "created_at"):
            self.cube.attrs[name] = old.attrs.get(name, self.cube.attrs[name])
        self.cube.attrs["profile_command"] = self.cube.attrs["profile_command"] or old.attrs.get("profile_command", "")
        replicates = common_replicates([old.to_dataset()], self.cube.sizes["replicate"])
        if replicates != self.cube.sizes["replicate"]:
            set_replicates(self.cube, replicates)
        child = groups_of(old)
        if child is not None:
            self.groups = new_groups(self.cube, [str(name) for name in child["param_group"].values])
        try:
            copy_cells(old, self.cube, self.groups)
        except CubeError as error:
            raise CubeError(f"{self.out}: {error}; use --overwrite to start anew, or another --out") from error
        keep_costs(old.dataset, self.cube)
        self.book = RaceBook.read(old.attrs.get("races_json", "{}"))
        self.failures = {
            name: why
            for name, why in json.loads(old.attrs.get("failures_json", "{}")).items()
            if name in failed_names(self.cube)
        }
        self.cube.attrs["failures_json"] = json.dumps(self.failures)
        self.units_before = float(old.attrs.get("units", 0.0))
        return engine

    def save_when_due(self, units: float) -> None:
        """Save what is not saved, at most every SAVE_SECONDS; `units` spent by this profile so far.

        One that cannot be written is told, and made up for by the next. Raises WriteError when none could for long.
        """
        pause = max(SAVE_SECONDS, SAVE_SHARE * self._save_seconds)
        if self._unsaved and time.monotonic() - self._saved > pause:
            self._saves.attempt(lambda: self.save(units))
            self._saved = time.monotonic()

    def save(self, units: float) -> None:
        """Write the file. Raises WriteError where that cannot be."""
        started = time.monotonic()
        self.cube.attrs["units"] = self.units_before + units
        self.cube.attrs["races_json"] = self.book.text()
        save_cube(self.cube, self.groups, self.out)
        self._unsaved, self._saved = False, time.monotonic()
        self._save_seconds = self._saved - started

    def _note_failure(self, t: int, strategy: Strategy, why: str | None) -> None:
        name = f"progress={self.checkpoints[t].progress:g},{strategy}"
        self.failures.pop(name, None)
        if why is not None:
            self.failures[name] = why
        self.cube.attrs["failures_json"] = json.dumps(self.failures)
        self._unsaved = True

    def _at(self, t: int, strategy: Strategy) -> tuple[int, ...]:
        return (t, *self.task.grid.position(strategy))

    def _key(self, t: int) -> str:
        return f"{self.digests[t][:16]}-{self._task_digest}-{self.given.seed}-{self.given.batch_size}"


def empty_cube(
    task: Task,
    folder: Path,
    checkpoints: Sequence[Checkpoint],
    digests: Sequence[str],
    given: Conditions,
    replicates: int,
) -> xr.Dataset:
    """Every cell of `task.grid` at every checkpoint, pending; `digests` are those of the checkpoint files.

    Raises TaskError when the task's `training` gives stages that make no schedule on the grid's axes, or a budget that
    is no positive number.
    """
    grid = task.grid
    strategies = grid.strategies()
    costs: dict[str, dict[Strategy, float]] = {"tokens": {s: task.cost(s) for s in strategies}}
    tokens: dict[str, dict[Strategy, int]] = {}
    for strategy in strategies:
        for model, value in task.other_costs(strategy).items():
            costs.setdefault(model, {})[strategy] = value
        for name, length in task.tokens(strategy).items():
            tokens.setdefault(name, {})[strategy] = length
    described = task.describe()
    try:
        training = json_of("training", task.training(folder))
        read_training(json.loads(training), grid)
    except ScheduleError as error:
        raise TaskError(f"training: {error}; leave out its `stages` or `budget` where they are not known") from error
    return new_cube(
        grid,
        progress=[checkpoint.progress for checkpoint in checkpoints],
        steps=[checkpoint.step for checkpoint in checkpoints],
        names=[checkpoint.path.name for checkpoint in checkpoints],
        digests=digests,
        metrics=given.metrics,
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
            "config_json": json_of("describe", described, in_order=True),
            "training_json": training,
            "failures_json": "{}",
            "batch_size": given.batch_size,
            "beta": given.batch_size * task.cost(grid.reference),
            "seed": given.seed,
            "engine": "",
            "term": "",
            "precision": given.precision,
            "races_json": "{}",
            "torch_version": str(torch.__version__),
            "device_name": "cpu",
        },
        replicates=replicates,
    )

"""Measure, break off, resume, grow, copy, merge, in any order: finished cells stay and have the right numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from gradscope import ProfileOptions, merge_cubes, open_cube, profile, save_cube
from gradscope.cube import DONE, FAILED, PENDING, digest_of, failed_names, grid_of
from gradscope.errors import CubeError, Interrupted
from schedulers import Grid, Strategy
from tests.gradscope.tasks_for_tests import LineTask, make_checkpoints

BATCH, SEED = 8, 3
STEPS = (0, 3, 7)  # of checkpoints, each as likely to be there; the last one that is sets the progress of all
GRID = Grid({"keep": ("all", "half"), "noise": (0, 2)}, Strategy(keep="all", noise=0))
STRATEGIES = GRID.strategies()
ESTIMATES = ("bias_sq", "bias_sq_plugin", "variance", "norm_sq", "inner", "norm_sq_ref", "moment_cov", "n_samples")


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


class BreakingTask(LineTask):
    """LineTask on a smaller grid, whose loss calls `fault` at its call number `at`."""

    grid = GRID

    def __init__(self, at: int = -1, fault: Callable[[], None] | None = None) -> None:
        self.left, self.fault = at, fault

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        self.left -= 1
        if self.left == -1 and self.fault is not None:
            self.fault()
        return super().loss(model, batch, strategy, generator)

    def describe(self) -> dict[str, Any]:
        return {"task": "lines"}


def fixed(samples: int = 24, **changes: Any) -> ProfileOptions:
    return ProfileOptions(samples=samples, allocation="fixed", seed=SEED, **changes)


@cache
def oracle(samples: int) -> dict[tuple[int, Strategy], dict[str, Any]]:
    """By (step, strategy) the numbers of profiles that nothing interrupts, with all checkpoints."""
    with tempfile.TemporaryDirectory() as place:
        folder = make_checkpoints(Path(place) / "ckpt_dir", STEPS)
        tree, _ = profile(BreakingTask(), folder, Path(place) / "cube.nc", options=fixed(samples))
    return numbers(tree.to_dataset())


def numbers(cube: xr.Dataset) -> dict[tuple[int, Strategy], dict[str, Any]]:
    """The estimates of the finished cells by (step, strategy)."""
    grid, found = grid_of(cube), {}
    for t, step in enumerate(cube["step"].values):
        for strategy in grid.strategies():
            at = (t, *grid.position(strategy))
            if cube["status"].values[at] == DONE:
                found[int(step), strategy] = {name: cube[name].values[at].tolist() for name in ESTIMATES}
    return found


@cache
def whole(steps: tuple[int, ...], samples: int) -> str:
    """The digest of the cube of these checkpoints that nothing interrupts."""
    with tempfile.TemporaryDirectory() as place:
        folder = make_checkpoints(Path(place) / "ckpt_dir", steps)
        tree, _ = profile(BreakingTask(), folder, Path(place) / "cube.nc", options=fixed(samples))
    return digest_of(tree.to_dataset())


def _raise(error: BaseException) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


FAULTS: dict[str, Callable[[], None]] = {
    "loss fails": _raise(RuntimeError("out of memory, say")),
    "Ctrl-C": _raise(KeyboardInterrupt()),
    "killed": _raise(Killed()),
    "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
    "SIGINT": lambda: signal.raise_signal(signal.SIGINT),
}
few = st.lists(st.sampled_from(STRATEGIES), min_size=1, max_size=3, unique=True)


@contextmanager
def saving_fails(at: int, error: BaseException) -> Iterator[None]:
    """Renaming a finished file raises `error` at its call number `at`."""
    rename, left = os.replace, at

    def replaced(*paths: Any) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise error
        rename(*paths)

    with mock.patch("gradscope.files.os.replace", replaced):
        yield


class Resuming(RuleBasedStateMachine):
    """One folder of checkpoints, one cube of it, and copies and parts that are merged into it."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.folder, self.out = self.place / "ckpt_dir", self.place / "cube.nc"
        self.others: list[Path] = []
        self.known: dict[tuple[int, Strategy], int] = {}
        self.no_sync = mock.patch("gradscope.files.os.fsync", lambda descriptor: None)  # nothing cuts the power
        self.no_sync.start()

    @initialize(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=2, unique=True))
    def train(self, steps: list[int]) -> None:
        make_checkpoints(self.folder, tuple(steps))

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(step for step in STEPS if (self.folder / f"step-{step}.pt").exists())

    def chosen(self, numbers: list[int]) -> tuple[int, ...] | None:
        return tuple(sorted({number % len(self.steps) for number in numbers})) or None

    def measure(self, task: LineTask, options: ProfileOptions, out: Path | None = None, *, often: bool = False) -> None:
        """Profile into `out`, the machine's cube by default, which is written at the end or as `often` as can be."""
        seconds = mock.patch("gradscope.profile_cube.SAVE_SECONDS", 0.0 if often else 1e9)
        share = mock.patch("gradscope.profile_cube.SAVE_SHARE", 0.0)
        with seconds, share:
            profile(task, self.folder, out or self.out, options=options)

    @rule(numbers=st.lists(st.integers(0, 3), max_size=2), samples=st.sampled_from([24, 32]))
    def measure_checkpoints(self, numbers: list[int], samples: int) -> None:
        self.measure(BreakingTask(), fixed(samples, checkpoints=self.chosen(numbers)))

    @rule(only=few, samples=st.sampled_from([24, 32]), numbers=st.lists(st.integers(0, 3), max_size=2))
    def measure_strategies(self, only: list[Strategy], samples: int, numbers: list[int]) -> None:
        self.measure(BreakingTask(), fixed(samples, only=tuple(only), checkpoints=self.chosen(numbers)))

    @rule(at=st.integers(0, 50), name=st.sampled_from(sorted(FAULTS)), size=st.sampled_from([2, 16]))
    def break_in_a_loss(self, at: int, name: str, size: int) -> None:
        task = BreakingTask(at, FAULTS[name])
        try:
            self.measure(task, fixed(32, group_size=size), often=size == 2)
        except (Killed, KeyboardInterrupt, Interrupted):
            assert name != "loss fails"
        else:
            assert task.left >= 0 or name == "loss fails"
        if name == "loss fails" and task.left < 0 and FAILED in open_cube(self.out)["status"].values:
            assert "out of memory, say" in open_cube(self.out).attrs["failures_json"]

    @rule(at=st.integers(0, 8), kind=st.sampled_from(["killed", "disk full"]))
    def break_in_saving(self, at: int, kind: str) -> None:
        before = self.out.read_bytes() if self.out.exists() else b""
        error = Killed() if kind == "killed" else OSError(28, "No space left on device")
        try:
            with saving_fails(at, error):
                self.measure(BreakingTask(), fixed(24, group_size=2), often=True)
        except Killed:
            assert kind == "killed"
        except Exception as told:
            assert kind == "disk full" and "No space left on device" in str(told)
        assert at > 0 or before == (self.out.read_bytes() if self.out.exists() else b"")

    @rule(step=st.sampled_from(STEPS))
    def train_on(self, step: int) -> None:
        make_checkpoints(self.folder, (step,))

    @rule()
    def leave_a_temporary_file(self) -> None:
        (self.place / ".cube.nc.1.tmp").write_bytes(b"half of a cu")

    @precondition(lambda self: self.out.exists())
    @rule()
    def copy(self) -> None:
        self.others.append(self.place / f"copy-{len(self.others)}.nc")
        shutil.copy(self.out, self.others[-1])

    @rule(numbers=st.lists(st.integers(0, 3), min_size=1, max_size=2), only=few | st.none())
    def measure_a_part(self, numbers: list[int], only: list[Strategy] | None) -> None:
        self.others.append(self.place / f"part-{len(self.others)}.nc")
        options = fixed(24, checkpoints=self.chosen(numbers), only=None if only is None else tuple(only))
        self.measure(BreakingTask(), options, self.others[-1])

    @precondition(lambda self: self.out.exists() and self.others)
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        paths = data.draw(st.permutations([self.out, data.draw(st.sampled_from(self.others))]))
        trees = [open_cube(path) for path in paths]
        try:
            cube, groups = merge_cubes(trees)
        except CubeError as error:
            assert "different checkpoints at progress" in str(error)
            return
        parts = [numbers(tree.to_dataset()) for tree in trees]
        for cell in parts[0].keys() | parts[1].keys():
            most = max(part[cell]["n_samples"] for part in parts if cell in part)
            assert numbers(cube)[cell]["n_samples"] == most
        save_cube(cube, groups, self.out)

    @invariant()
    def finished_cells_stay_and_are_right(self) -> None:
        if not self.out.exists():
            assert not self.known
            return
        cube = open_cube(self.out).to_dataset()
        found = numbers(cube)
        for (step, strategy), values in found.items():
            assert values == oracle(values["n_samples"])[step, strategy]
        for cell, samples in self.known.items():
            assert found[cell]["n_samples"] >= samples
        self.known = {cell: values["n_samples"] for cell, values in found.items()}
        status, keys = cube["status"].values, cube["cell_key"].values
        assert ((status == PENDING) == (keys == "")).all()
        for t, digest in enumerate(cube["checkpoint_sha256"].values):
            assert all(key.startswith(digest[:16]) for key in keys[t].ravel() if key)
        assert (cube["n_samples"].values[status != DONE] == 0).all()
        assert failed_names(cube) <= json.loads(cube.attrs["failures_json"]).keys()
        assert np.isfinite(cube["bias_sq"].values[status == DONE]).all()
        assert np.isnan(cube["bias_sq"].values[status != DONE]).all()

    def teardown(self) -> None:
        try:
            if self.steps:
                self.measure(BreakingTask(), fixed(32))
                self.finished_cells_stay_and_are_right()
                assert digest_of(open_cube(self.out).to_dataset()) == whole(self.steps, 32)
        finally:
            self.no_sync.stop()
            shutil.rmtree(self.place)


@pytest.mark.parametrize(("count", "rules"), [(2, 6), pytest.param(300, 12, marks=pytest.mark.slow)])
def test_whatever_happens_finished_cells_stay_and_the_cube_becomes_whole(count: int, rules: int) -> None:
    run_state_machine_as_test(
        Resuming,
        settings=settings(
            max_examples=count, stateful_step_count=rules, derandomize=True, deadline=None, database=None
        ),
    )

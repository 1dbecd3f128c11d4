"""SIGKILL at random moments of profiling, training, optimizing and plotting: nothing lost, nothing half written."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradscope import ProfileOptions, open_cube, profile, profile_of
from gradscope.checkpoints import list_steps, load_checkpoint
from gradscope.cli.run_settings import make_schedule
from gradscope.cube import DONE
from gradscope.report import write_report
from gradscope.task import RESUME_FILE
from gradscope.trainer import read_log, train
from schedulers import load_schedule, optimize, save_schedule
from tests.gradscope.cube_samples import sample_cube, sample_runs, sample_schedule
from tests.gradscope.small_methods import small_setting
from tests.gradscope.tasks_for_tests import LineTask, make_checkpoints
from tests.gradscope.test_profiler import assert_identical

COUNTS = [4, pytest.param(100, marks=pytest.mark.slow)]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not fork with a GPU's threads")


def started(job: Callable[[], Any]) -> int:
    """The number of a forked process that runs `job`."""
    with warnings.catch_warnings():  # threads of other tests do not concern the child
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    return child


def lasts(job: Callable[[], Any]) -> float:
    """The seconds that `job` takes."""
    begun = time.monotonic()
    _, status = os.waitpid(started(job), 0)
    assert status == 0
    return time.monotonic() - begun


def kill(job: Callable[[], Any], after: float) -> None:
    """Start `job` and kill it `after` seconds, if it has not ended well by then."""
    child = started(job)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)  # one that has ended still waits for its parent
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)


@pytest.mark.parametrize("count", COUNTS)
def test_a_profile_keeps_every_finished_cell(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradscope.profile_cube.SAVE_SECONDS", 0.0)  # written after every cell
    monkeypatch.setattr("gradscope.profile_cube.SAVE_SHARE", 0.0)
    folder, options = make_checkpoints(tmp_path / "ckpt_dir"), ProfileOptions(samples=80, allocation="fixed", seed=3)
    out, rng, cells, finished = tmp_path / "cube.nc", np.random.default_rng(5), 0, 0

    def job(path: Path = out) -> None:
        profile(LineTask(), folder, path, options=options)

    seconds = lasts(lambda: job(tmp_path / "whole.nc"))
    whole = open_cube(tmp_path / "whole.nc")
    for _ in range(count):
        kill(job, rng.uniform(0, seconds))
        if not out.exists():
            assert cells == 0
            continue
        found = open_cube(out)
        done = found["status"] == DONE
        assert int(done.sum()) >= cells
        for name in ("bias_sq", "variance", "norm_sq_ref", "moment_cov", "n_samples"):
            assert found[name].where(done).equals(whole[name].where(done))
        cells = int(done.sum())
        if done.all():
            out.unlink()
            cells, finished = 0, finished + 1
    job()
    assert_identical(open_cube(out), whole)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "ckpt_dir", "cube.nc", "whole.nc", ".cube.nc.lock", ".whole.nc.lock", *leftovers(tmp_path),
    }  # fmt: skip
    print(f"{count} kills within {seconds:.2f} s each; {finished} times a profile was complete")


def leftovers(folder: Path) -> list[str]:
    """Names of hidden files that a killed process was still writing; nothing reads them."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name.endswith(".tmp")]


@pytest.mark.parametrize("count", COUNTS)
def test_a_training_run_keeps_every_checkpoint(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradscope.trainer.SAVE_SECONDS", 0.0)  # written after every step
    monkeypatch.setattr("gradscope.trainer.SAVE_SHARE", 0.0)
    setting, rng, step = small_setting("mocov3", evaluations=(), budget=600.0), np.random.default_rng(6), 0
    out = tmp_path / "run"

    def job(path: Path = out) -> None:
        train(setting, make_schedule("mixed", setting), path)

    seconds = lasts(lambda: job(tmp_path / "whole"))
    whole = [load_checkpoint(path) for path in list_steps(tmp_path / "whole")]
    runs = 0
    for _ in range(count):
        kill(job, rng.uniform(0, seconds))
        there = [*list_steps(out), *([out / RESUME_FILE] if (out / RESUME_FILE).exists() else [])]
        now = max((load_checkpoint(path)["step"] for path in there), default=0)
        assert now >= step
        if (out / "log.jsonl").exists():
            read_log(out)
        step = now
        if step == whole[-1]["step"] and not (out / RESUME_FILE).exists():
            out, step, runs = tmp_path / f"run-{runs}", 0, runs + 1
    job(out)
    found = [load_checkpoint(path) for path in list_steps(out)]
    assert [one["step"] for one in found] == [one["step"] for one in whole]
    for ours, theirs in zip(found, whole, strict=True):
        assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())
    assert not leftovers(out)
    print(f"{count} kills within {seconds:.2f} s each; {runs} times a run was complete")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("what", ["optimize", "plot"])
def test_what_is_written_is_the_old_file_or_the_new(what: str, count: int, tmp_path: Path) -> None:
    cube, rng = sample_cube(), np.random.default_rng(7)
    schedule, runs = sample_schedule(cube), sample_runs(rows=60)
    out, folder = tmp_path / "out", make_checkpoints(tmp_path / "ckpt_dir")
    lasts(lambda: profile(LineTask(), folder, tmp_path / "cube.nc", options=ProfileOptions(samples=40)))
    measured = profile_of(open_cube(tmp_path / "cube.nc").dataset)

    def job(path: Path = out) -> None:
        if what == "optimize":
            save_schedule(optimize(measured, 2e6), path)
        else:
            write_report(path, cube=cube, schedule=schedule, runs=runs)

    seconds = lasts(lambda: job(tmp_path / "whole"))
    whole = (tmp_path / "whole").read_bytes()
    seen = 0
    for number in range(count):
        if number % 2 == 0:
            out.write_bytes(b"old")
        kill(job, rng.uniform(0, 1.2 * seconds))
        assert out.read_bytes() in (b"old", whole)
        seen += out.read_bytes() == whole
    job()
    assert out.read_bytes() == whole
    if what == "optimize":
        load_schedule(out)
    print(f"{count} kills within {seconds:.2f} s each; {seen} times the new file was there")

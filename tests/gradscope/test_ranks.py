"""Several ranks measure what one does; whatever becomes of one of them, the job ends and nothing finished is lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from gradscope import ProfileOptions, open_cube, profile
from gradscope.cube import DONE, FAILED, PENDING
from gradscope.signals import StopFlag
from gradscope.tasks import PretrainTask
from tests.gradscope.ranks_job import PATIENCE, TROUBLE, Ended, run_ranks
from tests.gradscope.tasks_for_tests import LineTask, make_checkpoints

ROOT = Path(__file__).parents[2]
SEVEN = ProfileOptions(samples=56, allocation="fixed", seed=3)  # sub-batches of 8: neither 2 nor 3 ranks divide them
FIXED = ("--samples", "56", "--samples-per-cell", "fixed", "--seed", "3")
RACING = ("--samples", "120", "--criterion", "ca-mse", "--metric", "euclidean", "--tolerance", "0.1", "--seed", "3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoints(tmp_path / "ckpt_dir")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    """What one rank measures undisturbed."""
    path = tmp_path_factory.mktemp("whole")
    return profile(LineTask(), make_checkpoints(path / "ckpt_dir"), path / "cube.nc", options=SEVEN)[0]


def measure(
    count: int, folder: Path, out: Path, *arguments: str, task: str = "TroubledTask", **env: str
) -> list[Ended]:
    named = () if task == "bundled" else ("--task", f"tests.gradscope.ranks_job:{task}")
    return run_ranks(count, ["profile", str(folder), "-o", str(out), *named, *arguments], out.parent, **env)


def assert_done(ended: list[Ended], code: int = 0) -> None:
    """The first rank gave the result once, the others said nothing at all."""
    assert [rank.code for rank in ended] == [code] + [0] * (len(ended) - 1), ended
    assert json.loads(ended[0].stdout)["cube"]
    assert [rank.stdout + rank.stderr for rank in ended[1:]] == [""] * (len(ended) - 1)


def the_message(ended: list[Ended]) -> str:
    """What the ranks that failed said: one line, from one of them, and nothing on stdout."""
    assert [rank.stdout for rank in ended] == [""] * len(ended)
    lines = [line for rank in ended for line in rank.stderr.splitlines() if "profile  " not in line]
    assert len(lines) == 1, ended
    return lines[0]


def assert_agree(first: xr.DataTree, second: xr.DataTree) -> None:
    """Equal to 1e-6 of the value; next to zero, where float64 sums cancel, to 1e-9 of its standard error."""
    children = [(tree.to_dataset(), tree["param_groups"].to_dataset()) for tree in (first, second)]
    for a, b in zip(*children, strict=True):
        for name in map(str, a.data_vars):
            if name == "moment_cov":  # its diagonal is in the `_se`
                continue
            if a[name].dtype.kind != "f":
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)
                continue
            error = np.abs(a[name] - b[name]).values
            allowed = 1e-6 * np.abs(a[name]).values
            if f"{name}_se" in a:
                allowed = np.fmax(allowed, 1e-9 * a[f"{name}_se"].values)
            np.testing.assert_array_equal(np.isnan(a[name]), np.isnan(b[name]), err_msg=name)
            assert not (error > allowed).any(), (name, np.nanmax(error / allowed))


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_measure_what_one_measures(folder: Path, tmp_path: Path, whole: xr.DataTree, count: int) -> None:
    assert_done(measure(count, folder, tmp_path / "cube.nc", *FIXED, "--json"))
    assert_agree(whole, open_cube(tmp_path / "cube.nc"))


@pytest.mark.parametrize(
    "arguments",
    [
        (*RACING, "--estimator", "per-sample"),
        pytest.param((*RACING, "--estimator", "subbatch"), marks=pytest.mark.slow),
        pytest.param((*FIXED, "--estimator", "per-sample-fast"), marks=pytest.mark.slow),
        pytest.param((*FIXED, "--estimator", "auto", "--precision", "bf16"), marks=pytest.mark.slow),
    ],
    ids=["racing per-sample", "racing", "per-sample-fast", "auto in bf16"],
)
def test_every_way_of_measuring_is_the_same_on_two_ranks(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    for count in (1, 2):
        assert_done(measure(count, folder, tmp_path / f"{count}.nc", *arguments, "--json", task="SampleTask"))
    cubes = [open_cube(tmp_path / f"{count}.nc") for count in (1, 2)]
    assert_agree(*cubes)
    assert (len(np.unique(cubes[0]["n_samples"])) > 1) == ("fixed" not in arguments)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--samples", "112", "--samples-per-cell", "fixed"), ("--samples", "256")])
def test_two_ranks_measure_the_bundled_task(small_run: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    for count in (1, 2):
        assert_done(measure(count, small_run, tmp_path / f"{count}.nc", *arguments, "--json", task="bundled"))
    assert_agree(open_cube(tmp_path / "1.nc"), open_cube(tmp_path / "2.nc"))


@pytest.mark.parametrize("others", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job_and_other_ranks_complete_it(
    folder: Path, tmp_path: Path, whole: xr.DataTree, others: int
) -> None:
    out = tmp_path / "cube.nc"
    ended = measure(2, folder, out, *FIXED, "--quiet", **{TROUBLE: "SIGKILL:5:5"})
    assert [rank.code for rank in ended] == [1, -signal.SIGKILL]
    message = the_message(ended)
    assert message.startswith("error: another rank of this job has ended before its time (")
    assert message.endswith("what is finished is saved, run the same command again to continue, on any number of ranks")
    left = open_cube(out)["status"]
    assert (left.isel(progress=0) == DONE).all() and (left.isel(progress=slice(1, None)) == PENDING).all()
    assert_done(ended := measure(others, folder, out, *FIXED, "--json"))
    assert (json.loads(ended[0].stdout)["reused"], json.loads(ended[0].stdout)["measured"]) == (6, 12)
    assert_agree(whole, open_cube(out))


@pytest.mark.slow
def test_the_first_rank_may_be_the_killed_one(folder: Path, tmp_path: Path, whole: xr.DataTree) -> None:
    out = tmp_path / "cube.nc"
    ended = measure(3, folder, out, *FIXED, "--quiet", **{TROUBLE: "SIGKILL:10:3"})
    assert [rank.code for rank in ended] == [-signal.SIGKILL, 1, 1]
    assert "has ended before its time" in the_message(ended)
    assert_done(measure(2, folder, out, *FIXED, "--json"))
    assert_agree(whole, open_cube(out))


def test_a_rank_that_hangs_ends_the_job_in_time(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cube.nc"
    ended = measure(2, folder, out, *FIXED, "-q", GRADSCOPE_RANK_TIMEOUT="8", **{TROUBLE: "hang:5:5"})
    assert ended[0].code == 1
    assert "does not answer in time, which GRADSCOPE_RANK_TIMEOUT sets" in the_message(ended)
    assert (open_cube(out)["status"].isel(progress=0) == DONE).all()


@pytest.mark.parametrize(
    ("kind", "codes", "message"),
    [
        ("raise", [1, 1], "error: sub-batch 5 cannot be read"),
        ("end", [1, 1], "error: batches(size=8) ended before 7 sub-batches; ask for fewer samples or make it endless"),
        (
            "SIGTERM",
            [143, 143],
            "error: stopped; finished cells are saved, run the same command for the others",
        ),
    ],
)
def test_what_stops_one_rank_stops_all_and_is_told_once(
    folder: Path, tmp_path: Path, whole: xr.DataTree, kind: str, codes: list[int], message: str
) -> None:
    out = tmp_path / "cube.nc"
    ended = measure(2, folder, out, *FIXED, "-q", **{TROUBLE: f"{kind}:5:5"})
    assert [rank.code for rank in ended] == codes and the_message(ended) == message
    assert (open_cube(out)["status"].isel(progress=0) == DONE).all()
    profile(LineTask(), folder, out, options=SEVEN)
    assert_agree(whole, open_cube(out))


@pytest.mark.parametrize("kind", ["strategy", "reference"])
def test_what_fails_on_one_rank_is_marked_as_on_one_rank(folder: Path, tmp_path: Path, kind: str) -> None:
    for count in (1, 2):
        ended = measure(count, folder, tmp_path / f"{count}.nc", *FIXED, "--json", **{TROUBLE: f"{kind}:5:5"})
        assert_done(ended, code=4)
    one, two = (open_cube(tmp_path / f"{count}.nc") for count in (1, 2))
    assert_agree(one, two)
    assert one.attrs["failures_json"] == two.attrs["failures_json"]
    assert int((one["status"] == FAILED).sum()) == {"strategy": 1, "reference": 6}[kind]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--metric", "x"), 2, "error: unknown metric 'x'"),
        (("--seed", "4"), 1, "holds another profile (another seed)"),
        (("--task", "tests.gradscope.ranks_job:UnequalTask", "-o", "other.nc"), 1, "error: the ranks chose different"),
    ],
)
def test_wrong_use_is_told_once(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    profile(LineTask(), folder, tmp_path / "cube.nc", options=dataclasses.replace(SEVEN, checkpoints=(0,)))
    before = (tmp_path / "cube.nc").read_bytes()
    given = [str(tmp_path / text) if text.endswith(".nc") else text for text in arguments]
    ended = measure(2, folder, tmp_path / "cube.nc", "-q", *FIXED, *given)
    assert [rank.code for rank in ended] == [code, code] and message in the_message(ended)
    assert (tmp_path / "cube.nc").read_bytes() == before


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("OtherDataTask", "error: the ranks see different data: the gradient of the first batch has norm"),
        ("FewerCheckpointsTask", "error: the ranks disagree on the checkpoints: rank 1 of 0 to 1 differs from rank 0;"),
    ],
)
def test_ranks_that_see_different_files_end_at_once(folder: Path, tmp_path: Path, task: str, message: str) -> None:
    ended = measure(2, folder, tmp_path / "cube.nc", *FIXED, "-q", task=task)
    assert [rank.code for rank in ended] == [1, 1] and the_message(ended).startswith(message)


def torchrun(count: int, folder: Path, out: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "gradscope", "profile", str(folder), "-o", str(out)]
    command += ["--task", "tests.gradscope.ranks_job:TroubledTask", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_torchrun_with_a_killed_rank_and_once_more(folder: Path, tmp_path: Path, whole: xr.DataTree) -> None:
    out = tmp_path / "cube.nc"
    first = torchrun(2, folder, out, *FIXED, "--quiet", **{TROUBLE: "SIGKILL:5:5"})
    stdout, stderr = first.communicate(timeout=PATIENCE)
    assert first.returncode != 0 and stdout == ""
    assert stderr.count("error: another rank of this job has ended before its time") == 1, stderr
    assert (open_cube(out)["status"].isel(progress=0) == DONE).all()
    again = torchrun(2, folder, out, *FIXED, "--json")
    stdout, stderr = again.communicate(timeout=PATIENCE)
    assert (again.returncode, stderr) == (0, "")
    assert json.loads(stdout)["reused"] == 6
    assert_agree(whole, open_cube(out))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux tells them")
def test_the_threads_of_a_job_end_with_it(tmp_path: Path) -> None:
    """One that outlives the interpreter can crash it; what a rank imports in between must not keep them."""
    program = """
import os
import torch
from gradscope.ranks import open_ranks

def threads():
    return len(os.listdir("/proc/self/task"))

with open_ranks(lambda: torch.device("cpu")) as (ranks, _):
    import torch._dynamo
    assert ranks.gather(ranks.rank) == [0, 1]
    inside = threads()
print(f"{inside > 1} {threads()}\\n", end="")  # one write, which the other rank's cannot split
"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "program.py").write_text(program)
    ended = subprocess.run(
        [*command, str(tmp_path / "program.py")], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "True 1\n" * 2), ended


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_stops_the_ranks(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    job = torchrun(2, folder, tmp_path / "cube.nc", "--samples", "40000", "--samples-per-cell", "fixed")
    assert job.stderr is not None
    told = [next(job.stderr)]  # the first line of progress
    job.send_signal(number)
    stdout, stderr = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0 and stdout == "" and "sub-batch" in told[0]
    assert stderr.count("error: stopped; finished cells are saved, run the same command for the others") == 1, stderr


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_once_more(folder: Path, tmp_path: Path) -> None:
    """With --max-restarts the job goes on by itself, until the rank is killed at the same place again."""
    job = torchrun(2, folder, tmp_path / "cube.nc", *FIXED, PET_MAX_RESTARTS="1", **{TROUBLE: "SIGKILL:5:5"})
    _, stderr = job.communicate(timeout=PATIENCE)
    assert stderr.count("error: another rank of this job has ended before its time") == 2, stderr


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ranks_on_two_gpus_measure_what_one_measures(folder: Path, tmp_path: Path, whole: xr.DataTree) -> None:
    job = torchrun(2, folder, tmp_path / "cube.nc", *FIXED, "--json", "--device", "cuda")
    stdout, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0 and json.loads(stdout)["measured"] == 18
    assert_agree(whole, open_cube(tmp_path / "cube.nc"))


def test_only_a_second_sigint_interrupts_at_once() -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_bundled_tasks_ranks_share_its_batches(small_run: Path) -> None:
    task = PretrainTask.from_folder(small_run)
    count = 2 * len(task.setting.data.train_images) // 48 + 1  # into the third epoch
    every = list(itertools.islice(task.batches(48, 7), count))
    for size in (2, 3):
        for rank in range(size):
            own = list(itertools.islice(task.sub_batches(48, 7, rank, size), len(every[rank::size])))
            for ours, theirs in zip(own, every[rank::size], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(every[0][0], every[1][0])

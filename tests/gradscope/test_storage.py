"""Full disks and read-only folders: what was finished stays, one clear error, nothing left behind, and it goes on."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gradscope.files
from gradscope import ProfileOptions, open_cube, profile
from gradscope.checkpoints import list_steps, load_checkpoint, save_checkpoint
from gradscope.cli import main
from gradscope.cli.run_settings import make_schedule
from gradscope.cube import DONE, groups_of, save_cube
from gradscope.errors import WriteError
from gradscope.files import Saves, alive, check_writable, write_atomically, write_text
from gradscope.locks import sole_writer
from gradscope.profiler import ProfileSummary
from gradscope.runlog import LOG_FILE, RunLog
from gradscope.task import RESUME_FILE
from gradscope.trainer import read_log, train
from schedulers import AdaptiveRule, save_schedule
from tests.gradscope.cube_samples import sample_cube, sample_schedule, tree_of
from tests.gradscope.small_methods import small_setting
from tests.gradscope.tasks_for_tests import LineTask, make_checkpoints
from tests.gradscope.test_kills import started
from tests.gradscope.test_profiler import assert_identical

COUNTS = [5, pytest.param(200, marks=pytest.mark.slow)]
FULL = r"cannot be written \(No space left on device\); choose a folder with room"
OPTIONS = ProfileOptions(samples=40, allocation="fixed", seed=3)
ONLINE = AdaptiveRule(overhead=0.4, minimum=3, maximum=4, sub_batch=8, dwell=0.0, exploration=0.3, confidence=0.0)
Call = Callable[..., tuple[int, str, str]]
no_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not fork with a GPU's threads")


def write_cube(path: Path) -> None:
    cube = sample_cube()
    save_cube(cube, groups_of(tree_of(cube)), path)


def write_checkpoint(path: Path) -> None:
    names = ("config", "schedule", "optimizer", "parameter_names", "step", "units", "samples", "seconds")
    weights = {"a": torch.zeros(3000), "b": torch.arange(800)}
    save_checkpoint(path, {name: 1 for name in names} | {"model": weights, "rng": torch.zeros(8)})


def write_schedule(path: Path) -> None:
    save_schedule(sample_schedule(sample_cube()), path)


def write_page(path: Path) -> None:
    write_text(path, "<p>a report</p>\n" * 2000)


WRITERS = {"cube": write_cube, "checkpoint": write_checkpoint, "schedule": write_schedule, "text": write_page}


def limited(job: Callable[[], Any], size: int) -> str:
    """What a forked process says of `job` when no file of it can get longer than `size` bytes."""
    read, write = os.pipe()

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            job()
            os.write(write, b"written")
        except WriteError as error:
            os.write(write, str(error).encode())

    pid = started(child)
    os.close(write)
    with open(read, encoding="utf-8") as said:
        text = said.read()
    assert os.waitpid(pid, 0)[1] == 0, f"the process died at {size} bytes: {text}"
    return text


@no_fork
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_fills_up_at_any_byte_leaves_the_old_file(kind: str, count: int, tmp_path: Path) -> None:
    path, write = tmp_path / "out", WRITERS[kind]
    write(path)
    size = path.stat().st_size
    path.write_bytes(b"old")
    for limit in sorted({round(i * (size - 1) / (count - 1)) for i in range(count)}):
        said = limited(lambda: write(path), limit)
        assert said.startswith(f"{path}: cannot be written (File too large); choose a folder with room"), (limit, said)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["out"]
    assert limited(lambda: write(path), size) == "written" and path.stat().st_size == size


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system, as `disk("size=1m")`; its folder. Skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command line in a folder: (exit code, stdout, stderr)."""

    def run(folder: Path, *words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["gradscope", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


PROFILE = ("profile", "ckpt_dir", "--task", "tests.gradscope.tasks_for_tests:LineTask", "--samples", 40, "-q")


def fill(folder: Path, left: int = 0) -> Path:
    """Take all room of a file system but `left` bytes; removing the returned file gives it back."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(4096)) == 4096:
            pass
    os.truncate(path, max(path.stat().st_size - left, 0))
    return path


def test_a_profile_on_a_full_disk_is_one_error_and_goes_on_when_there_is_room(
    disk: Callable[..., Path], command: Call, tmp_path: Path
) -> None:
    folder = disk("size=1m")
    make_checkpoints(folder / "ckpt_dir")
    ballast = fill(folder, left=16384)  # enough to begin
    code, out, err = command(folder, *PROFILE)
    assert (code, out) == (1, "") and err == (
        "error: cube.nc: cannot be written (No space left on device); choose a folder with room, or make room and run "
        "the same command again\n"
    )
    assert sorted(os.listdir(folder)) == [".cube.nc.lock", "ballast", "ckpt_dir"]
    ballast.unlink()
    assert command(folder, *PROFILE)[0] == 0
    make_checkpoints(tmp_path / "ckpt_dir")
    assert command(tmp_path, *PROFILE)[0] == 0
    assert_identical(open_cube(folder / "cube.nc"), open_cube(tmp_path / "cube.nc"))
    before = (folder / "cube.nc").read_bytes()
    fill(folder)
    for words in (PROFILE, ("merge", "cube.nc", "cube.nc", "-o", "cube.nc"), ("plot",)):
        code, _, err = command(folder, *words)
        assert code == 1 and "No space left on device" in err and err.count("\n") == 1, words
    assert (folder / "cube.nc").read_bytes() == before
    assert sorted(os.listdir(folder)) == [".cube.nc.lock", "ballast", "ckpt_dir", "cube.nc"]


def test_a_folder_that_is_read_only_is_one_error(disk: Callable[..., Path], command: Call) -> None:
    folder = disk("size=1m")
    make_checkpoints(folder / "ckpt_dir")
    measure(folder / "ckpt_dir", folder / "cube.nc")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    cost_words = ("cost", "ckpt_dir", "--task", PROFILE[3], "--cube", "cube.nc", "-q")
    train_words = ("train", "--budget", "1K", "--out", "run", "-q", "--json")
    for words in (PROFILE, train_words, (*train_words, "--schedule", "online"), ("plot",), cost_words):
        code, out, err = command(folder, *words)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert "cannot be written (Read-only file system); choose a folder you may write to" in err


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, Path], bool]) -> list[Path]:
    """Make renames fail with ENOSPC where `fails(number of the rename, target)` says so; the targets so far."""
    replace, targets = os.replace, list[Path]()

    def full(source: Path, target: Path) -> None:
        targets.append(Path(target))
        if fails(len(targets), Path(target)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    return targets


def saved_always(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("profile_cube", "trainer", "adaptive.record"):
        monkeypatch.setattr(f"gradscope.{name}.SAVE_SECONDS", 0.0)
        monkeypatch.setattr(f"gradscope.{name}.SAVE_SHARE", 0.0)


def measure(folder: Path, out: Path) -> ProfileSummary:
    return profile(LineTask(), folder, out, options=OPTIONS)[1]


def test_a_profile_survives_saves_that_fail_along_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_always(monkeypatch)
    folder = make_checkpoints(tmp_path / "ckpt_dir", (0, 5))
    measure(folder, tmp_path / "whole.nc")
    with monkeypatch.context() as patch:
        targets = failing(patch, lambda number, target: target.name == "cube.nc" and number % 3)
        patch.setattr(gradscope.files, "PATIENCE", 1e9)
        with contextlib.suppress(WriteError):  # the last save may be one that fails
            measure(folder, tmp_path / "cube.nc")
    told = capsys.readouterr().err
    assert len(targets) >= 4 and f"cube.nc: {FULL[:17]}" in told and "going on" in told and "saved again" in told
    measure(folder, tmp_path / "cube.nc")
    assert_identical(open_cube(tmp_path / "cube.nc"), open_cube(tmp_path / "whole.nc"))


def test_a_profile_stops_when_no_save_works_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_always(monkeypatch)
    folder = make_checkpoints(tmp_path / "ckpt_dir", (0, 5))
    measure(folder, tmp_path / "whole.nc")
    with monkeypatch.context() as patch:
        failing(patch, lambda number, target: number > 2)  # the probe and one save work
        patch.setattr(gradscope.files, "PATIENCE", 0.0)
        with pytest.raises(WriteError, match=f"cube.nc: {FULL}"):
            measure(folder, tmp_path / "cube.nc")
    done = int((open_cube(tmp_path / "cube.nc")["status"] == DONE).sum())
    assert 0 < done < 12
    assert measure(folder, tmp_path / "cube.nc").reused == done
    assert_identical(open_cube(tmp_path / "cube.nc"), open_cube(tmp_path / "whole.nc"))


def assert_same_run(out: Path, whole: Path) -> None:
    found, wanted = ([load_checkpoint(path) for path in list_steps(folder)] for folder in (out, whole))
    assert [one["step"] for one in found] == [one["step"] for one in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())
    names = ("step", "units", "samples", "loss", "probe", "probe_units")
    rows = [[{name: row.get(name) for name in names} for row in read_log(folder)] for folder in (out, whole)]
    assert rows[0] == rows[1]
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}
    if (whole / "cube.nc").exists():
        assert open_cube(out / "cube.nc")["bias_sq"].equals(open_cube(whole / "cube.nc")["bias_sq"])


@pytest.fixture
def run_to(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Trains a small model into a folder; the mixed one saves after every step."""
    if request.param == "mixed":  # a cube with every step takes long
        saved_always(monkeypatch)
    setting = small_setting("mocov3", budget=1200.0, checkpoints=(0.0, 0.3, 0.6, 1.0))

    def run(out: Path) -> None:
        train(setting, ONLINE if request.param == "online" else make_schedule("mixed", setting), out)

    return run


@pytest.mark.parametrize("run_to", ["mixed"], indirect=True)
def test_training_makes_up_for_saves_that_fail_along_the_way(
    run_to: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_to(tmp_path / "whole")
    last = list_steps(tmp_path / "whole")[-1].name
    with monkeypatch.context() as patch:  # nothing can be written from the first step on until near the end
        begun = ("step-00000000.pt", last, "schedule.json", "followed.json", "config.toml", ".log.jsonl.probe")
        there = tmp_path / "run" / "step-00000000.pt"
        targets = failing(patch, lambda number, target: target.name not in begun and there.exists() and number < 30)
        run_to(tmp_path / "run")
    told = capsys.readouterr().err
    assert len(targets) > 30 and "going on" in told and "saved again" in told
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("run_to", ["mixed", pytest.param("online", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("count", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_training_that_a_full_disk_ends_is_continued(
    count: int, run_to: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradscope.files, "PATIENCE", 0.0)
    with monkeypatch.context() as patch:
        targets = failing(patch, lambda number, target: False)
        run_to(tmp_path / "whole")
        total = len(targets)
    for place in {1 + round((i + 1) * (total - 1) / (count + 1)) for i in range(count)} | {total}:
        out = tmp_path / f"run-{place}"
        with monkeypatch.context() as patch:
            failing(patch, lambda number, target, place=place: number >= place)
            with pytest.raises(WriteError, match=FULL):
                run_to(out)
        assert not [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
        for path in [*list_steps(out), *out.glob(RESUME_FILE)]:
            load_checkpoint(path)
        run_to(out)
        assert_same_run(out, tmp_path / "whole")


def test_saves_may_fail_for_a_while(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now, saves = [0.0], Saves()
    monkeypatch.setattr("gradscope.files.time.monotonic", lambda: now[0])

    def full() -> None:
        raise WriteError.of("cube.nc", OSError(errno.ENOSPC, "No space left on device"))

    assert not saves.attempt(full)
    now[0] = gradscope.files.PATIENCE - 1
    assert not saves.attempt(full) and saves.attempt(lambda: None) and saves.attempt(lambda: None)
    assert capsys.readouterr().err.count("\n") == 3  # two warnings, one all-clear
    now[0] += 1e6
    assert not saves.attempt(full)  # a new trouble has its own time
    now[0] += gradscope.files.PATIENCE
    with pytest.raises(WriteError):
        saves.attempt(full)


def test_left_overs_of_killed_processes_are_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    mine, path = gradscope.files._host(), tmp_path / "a[1].json"
    stale, other = f".{path.name}.{mine}.{dead.pid}.tmp", f".{path.name}.00000000.{dead.pid}.tmp"
    writing, foreign = f".{path.name}.{mine}.{os.getppid()}.tmp", ".a.json.tmp"
    for name in (stale, other, writing, foreign, f".{path.name}.7.tmp"):
        (tmp_path / name).touch()
    write_text(path, "new")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, other, writing, foreign, f".{path.name}.7.tmp"}
    with sole_writer(path):  # nobody else writes it: all are left-overs
        assert {p.name for p in tmp_path.iterdir()} == {path.name, foreign, f".{path.name}.lock"}
    assert alive(os.getpid()) and not alive(dead.pid) and not alive(1 << 80)


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path) -> None:
    def broken(temporary: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "out", broken)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_known_before_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    check_writable(tmp_path / "cube.nc")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=FULL):
        check_writable(tmp_path / "cube.nc")
    assert not list(tmp_path.iterdir())


full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")


@full_device
def test_standard_output_on_a_full_disk_is_an_error(tmp_path: Path) -> None:
    write_schedule(tmp_path / "schedule.json")
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "gradscope", "show", str(tmp_path / "schedule.json")]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: standard output: cannot be written (No space left")
    assert done.stderr.count("\n") == 1


def test_lines_on_a_full_disk_are_lost_and_stop_nothing(tmp_path: Path, command: Call) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_checkpoints(tmp_path / "ckpt_dir")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", told := Full())
        code, out, _ = command(tmp_path, *(word for word in PROFILE if word != "-q"))
    assert code == 0 and "18 cells measured" in out and "18 cells to measure" in told.getvalue()


def test_event_files_that_cannot_be_written_do_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Events:
        def add_scalar(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gradscope.runlog._writer", lambda: lambda folder: Events())
    log = RunLog(tmp_path, tensorboard=True)
    for step in range(3):
        log.add({"step": step, "loss": 1.0})
    log.write()
    log.close()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "tensorboard: cannot be written (No space" in told and LOG_FILE in told
    assert len(read_log(tmp_path)) == 3

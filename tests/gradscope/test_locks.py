"""Two processes on one output: the second is refused and told who the first one is; nobody is told of the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradscope.errors import BusyError, GradscopeError
from gradscope.locks import sole_writer

HOLD = """
import sys, time
from pathlib import Path
from gradscope.locks import sole_writer
with sole_writer(Path(sys.argv[1]), folder=bool(int(sys.argv[2]))):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the output `out`, as a folder where the parameter says so."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out"), str(int(request.param))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def enter(output: Path, *, folder: bool) -> None:
    with sole_writer(output, folder=folder):
        pass


@pytest.mark.parametrize(("holder", "folder"), [(False, False), (True, True)], indirect=["holder"])
def test_the_second_process_is_refused_and_told_who_the_first_is(
    holder: subprocess.Popen[str], folder: bool, tmp_path: Path
) -> None:
    with pytest.raises(BusyError, match=rf"out: is being written by process {holder.pid} on \S+ since 20.*; wait"):
        enter(tmp_path / "out", folder=folder)
    with pytest.raises(BusyError, match=str(holder.pid)):  # the first attempt has not taken the name away
        enter(tmp_path / "out", folder=folder)
    enter(tmp_path / "other", folder=folder)


@pytest.mark.parametrize("holder", [False], indirect=True)
def test_the_lock_goes_with_its_process_however_that_ends(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / ".out.lock").read_text())["pid"] == holder.pid  # and yet:
    enter(tmp_path / "out", folder=False)


def test_it_can_be_taken_again_and_is_released_by_an_error(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "cube.nc"
    with pytest.raises(ZeroDivisionError), sole_writer(output):
        raise ZeroDivisionError
    for _ in range(2):
        enter(output, folder=False)
    assert [path.name for path in output.parent.iterdir()] == [".cube.nc.lock"]


def test_one_process_cannot_write_an_output_twice(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "cube.nc"), pytest.raises(BusyError, match=str(os.getpid())):
        enter(tmp_path / "cube.nc", folder=False)


def test_a_lock_file_without_a_name_is_told_as_such(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "cube.nc"):
        for text in ("", "{}", "[1]", '{"pid": "x"}'):
            (tmp_path / ".cube.nc.lock").write_text(text)
            with pytest.raises(BusyError, match=r"another process \(see .*\.cube\.nc\.lock\)"):
                enter(tmp_path / "cube.nc", folder=False)


def test_a_left_over_of_a_dead_process_is_explained(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    with sole_writer(tmp_path / "cube.nc"):
        path = tmp_path / ".cube.nc.lock"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": dead.pid}))
        with pytest.raises(BusyError, match=r"which is gone: .*\.cube\.nc\.lock is a left-over that may be removed"):
            enter(tmp_path / "cube.nc", folder=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(GradscopeError, match="cannot be written"):
        enter(closed / "cube.nc", folder=False)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GradscopeError, match="cannot be written"):
        enter(tmp_path / "file" / "cube.nc", folder=False)

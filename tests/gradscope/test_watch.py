"""`gradscope plot --watch`: the report follows the files it is made from, and ends as a page that stays as it is."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from gradscope.cube import save_cube
from gradscope.errors import CubeError, GradscopeError, Interrupted, UsageError
from gradscope.watch import Sources, make_report, watch_report
from schedulers import Strategy, constant_schedule, save_schedule
from tests.gradscope.cube_samples import sample_cube, sample_runs, sample_schedule

REPORT = Path("report.html")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def store(cube: xr.Dataset, path: str = "cube.nc") -> None:
    save_cube(cube, None, Path(path))


def log_run(folder: str, rows: int) -> None:
    run = Path(folder)
    run.mkdir(exist_ok=True)
    (run / "step-000001.pt").touch()
    lines = (json.dumps(row) for row in sample_runs(rows=rows)["schedule"])
    (run / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))


def watched(steps: list[Callable[[], object]], number: int = signal.SIGINT) -> tuple[dict[str, Any], list[str]]:
    """Watch while the steps are done, each after the page of the one before; then send the signal: facts, messages."""
    told: list[str] = []
    pages: list[str] = []

    over = threading.Event()

    def user() -> None:
        wait(lambda: bool(told), over)
        for step in steps:
            before = (page(), len(told))
            step()
            wait(lambda before=before: (page(), len(told)) != before, over)  # type: ignore[misc]
            pages.append(page())
        if not over.is_set():
            os.kill(os.getpid(), number)

    def page() -> str:
        return REPORT.read_text(encoding="utf-8") if REPORT.is_file() else ""

    helper = threading.Thread(target=user)
    helper.start()
    try:
        facts = watch_report(Sources(Path("cube.nc")), REPORT, title="t", every=1, say=told.append)
    finally:
        over.set()
        helper.join()
    assert all('data-refresh="1"' in text for text in pages if text)
    return facts, told


def wait(done: Callable[[], bool], over: threading.Event) -> None:
    """Until something is done, or all is over, which an alarm sees to in the end."""
    for _ in range(6000):
        if done() or over.is_set():
            return
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_report_follows_its_files() -> None:
    cube = sample_cube()
    started = cube.copy()
    started["status"] = cube["status"] * 0
    begun = [
        lambda: log_run("run", 40),
        lambda: store(started.map(lambda v: v.where(False) if "metric" in v.dims else v, keep_attrs=True)),
        lambda: store(cube),
        lambda: Path("schedule.json").write_text(sample_schedule(cube).to_json()),
    ]
    facts, told = watched(begun)
    assert told[0] == "cube.nc: not there yet; waiting"
    assert told[1].startswith("report.html: written, without cube.nc, not there yet; it loads itself again every 1 s")
    assert told[2].startswith("report.html: written; it loads itself again every 1 s") and len(told) == 3
    assert facts["profile"]["cells"]["measured"] == 42 and facts["schedule"]["budget"] == 4e6
    assert facts["results"][0]["run"] == "run"
    last = REPORT.read_text(encoding="utf-8")
    assert "data-refresh=" not in last and "The schedule" in last


def test_a_file_that_cannot_be_read_yet_is_read_later() -> None:
    Path("cube.nc").write_bytes(b"half of a cube")
    _, told = watched([lambda: store(sample_cube())])
    assert "cube.nc: cannot be read as a cube" in told[0] and told[0].endswith("looking again")
    assert len(told) == 2


def test_sigterm_writes_the_last_page_and_says_so() -> None:
    store(sample_cube())
    with pytest.raises(Interrupted, match=r"report\.html is written") as stop:
        watched([lambda: log_run("run", 40)], signal.SIGTERM)
    assert stop.value.exit_code == 143
    assert "data-refresh=" not in REPORT.read_text(encoding="utf-8")


def test_a_file_that_is_damaged_at_the_end_leaves_what_was_last_read() -> None:
    store(sample_cube())
    facts, told = watched([lambda: Path("cube.nc").write_bytes(b"x")])
    assert facts["profile"]["cells"]["measured"] == 42
    assert told[-2].endswith("looking again") and told[-1].endswith("the report shows what was last read")
    assert "data-refresh=" not in REPORT.read_text(encoding="utf-8")


def test_sigterm_ends_with_143_even_where_a_file_is_damaged() -> None:
    store(sample_cube())
    with pytest.raises(Interrupted) as stop:
        watched([lambda: Path("cube.nc").write_bytes(b"x")], signal.SIGTERM)
    assert stop.value.exit_code == 143 and "data-refresh=" not in REPORT.read_text(encoding="utf-8")


def test_files_that_were_named_and_are_not_there_are_told() -> None:
    store(sample_cube())
    told: list[str] = []
    sources = Sources(Path("cube.nc"), schedule=Path("typo.json"), runs=[Path("typo")])

    def say(news: str) -> None:
        told.append(news)
        os.kill(os.getpid(), signal.SIGINT)

    facts = watch_report(sources, REPORT, title="t", every=1, say=say)
    assert told[0].startswith("report.html: written, without typo.json, typo/log.jsonl, not there yet;")
    assert "schedule" not in facts


@pytest.mark.parametrize("row", ['{"units": null}', '{"units": 1, "samples": "x"}', "[1]", "{"])
def test_a_row_that_is_none_is_told_with_its_file(row: str) -> None:
    log_run("run", 40)
    with (Path("run") / "log.jsonl").open("a") as log:
        log.write(row)
    with pytest.raises(UsageError, match=r"run/log\.jsonl: not a training log"):
        Sources(Path("cube.nc")).read(unfinished=True)


def test_nothing_to_show_until_the_end_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing came to show"):
        watched([])
    assert not REPORT.exists()


@pytest.mark.parametrize("every", [0.0, -1.0, float("nan"), float("inf"), 1e6])
def test_an_interval_out_of_range_is_refused(every: float) -> None:
    with pytest.raises(UsageError, match="from 1 second to a day"):
        watch_report(Sources(Path("cube.nc")), REPORT, title="t", every=every, say=print)


def test_a_report_made_once_needs_its_cube() -> None:
    log_run("run", 40)
    with pytest.raises(CubeError, match="no such cube"):
        make_report(Sources(Path("cube.nc")), REPORT, title="t")
    store(sample_cube())
    with pytest.raises(GradscopeError):
        make_report(Sources(Path("cube.nc"), schedule=Path("none.json")), REPORT, title="t")


def test_runs_are_found_in_the_working_folder_and_beside_it() -> None:
    log_run("b", 40)
    log_run("a", 40)
    log_run(".", 40)
    Path("c").mkdir()
    (Path("c") / "log.jsonl").touch()  # no checkpoint: not of a training
    sources = Sources(Path("cube.nc"))
    assert sources.run_folders() == [Path(), Path("a"), Path("b")]
    assert list(sources.read(unfinished=True)["runs"]) == [Path.cwd().name, "a", "b"]
    assert Sources(Path("cube.nc"), runs=[Path("b")]).run_folders() == [Path("b")]


def test_two_runs_of_one_name_are_told_apart() -> None:
    for parent in ("x", "y"):
        Path(parent).mkdir()
        log_run(f"{parent}/run", 40)
    runs = Sources(Path("cube.nc"), runs=[Path("x/run"), Path("y/run")]).read(unfinished=True)["runs"]
    assert list(runs) == ["x/run", "y/run"]


def test_the_schedules_that_runs_followed_are_found_where_they_can_be_read() -> None:
    for folder in (".", "a", "b", "c"):
        log_run(folder, 40)
    for folder in (".", "a"):
        save_schedule(constant_schedule(Strategy(patch=2), 4.0), Path(folder) / "followed.json")
    Path("b", "followed.json").write_text("{}")
    followed = Sources(Path("cube.nc")).read(unfinished=True)["followed"]
    assert list(followed) == [Path.cwd().name, "a"]

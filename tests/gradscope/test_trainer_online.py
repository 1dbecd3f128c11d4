"""`gradscope train --schedule online`: its budget, what it writes, kills and resumes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from gradscope.checkpoints import list_checkpoints, load_checkpoint
from gradscope.cli import main
from gradscope.cli.run_settings import make_schedule
from gradscope.cube import DONE, open_cube
from gradscope.data import ImageData
from gradscope.errors import CheckpointError, InfeasibleError, Interrupted
from gradscope.progress import Progress
from gradscope.tasks import PretrainTask
from gradscope.trainer import RunOptions, TrainResult, read_log, train
from schedulers import AdaptiveRule, Strategy, load_schedule
from tests.gradscope.small_methods import SmallSetting, small_setting
from tests.gradscope.train_ranks_job import run_function

ONLINE = AdaptiveRule(overhead=0.4, minimum=3, maximum=4, sub_batch=8, dwell=0.0, exploration=0.3, confidence=0.0)
TEXT = f"online:{ONLINE}"
FROZEN = dataclasses.replace(ONLINE, frozen=True, finish=0.0)
SAVED = (0.1, 0.3)  # few, since a cube is written with each
REFERENCE = Strategy(patch=4, dropout=0)
ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow


def setting_of(method: str = "mocov3", **changes: Any) -> SmallSetting:
    return small_setting(method, **{"budget": 2000.0, "checkpoints": SAVED, **changes})


def run(out: Path, rule: AdaptiveRule = ONLINE, setting: SmallSetting | None = None, **options: Any) -> TrainResult:
    return train(setting or setting_of(), rule, out, **options)


def last(out: Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(out)[-1].path)


def told_apart(content: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Of a checkpoint: the online state, the log and the counts, without seconds."""
    online = json.loads(json.dumps(content["online"]))
    del online["probe_seconds"]
    for record in online["probes"]:
        del record["seconds"]
    timeless = ("seconds", "samples_per_second", "probe_seconds")
    rows = [{k: v for k, v in row.items() if k not in timeless} for row in json.loads(content["log"])]
    return online, rows, [content[name] for name in ("step", "units", "samples", "schedule")]


def assert_same_moments(first: dict[str, Any], second: dict[str, Any]) -> None:
    for i, kept in first["optimizer"]["state"].items():
        for name, value in kept.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["optimizer"]["state"][i][name])), name


def assert_same_run(first: Path, second: Path) -> None:
    a, b = last(first), last(second)
    for mine, other in zip(told_apart(a), told_apart(b), strict=True):
        assert mine == other
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    for i, kept in a["optimizer"]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(b["optimizer"]["state"][i][k])) for k, v in kept.items()
        )
    schedules = [(out / "schedule.json").read_text() for out in (first, second)]
    assert schedules[0] == schedules[1]
    for group in ("/", "/param_groups"):
        x, y = (open_cube(out / "cube.nc")[group].to_dataset() for out in (first, second))
        xr.testing.assert_identical(x.drop_attrs(), y.drop_attrs())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult, list[str]]:
    """A run of the online mode: its folder, its result, and what it told."""
    out, told = tmp_path_factory.mktemp("finished") / "run", list[str]()
    return out, run(out, tell=told.append), told


def test_it_ends_within_a_step_of_the_budget_with_probes_charged(finished: tuple[Path, TrainResult, list[str]]) -> None:
    out, result, _ = finished
    costs = {str(s): 16 * setting_of().cost(s) for s in PretrainTask(setting_of()).grid.strategies()}
    content = last(out)
    online = content["online"]
    assert 2000 - max(costs.values()) < result.units <= 2000
    steps = math.fsum(costs[row["strategy"]] for row in read_log(out) if "strategy" in row)
    assert sum("strategy" in row for row in read_log(out)) == result.step  # a row for every step of a short run
    assert result.units == pytest.approx(steps + online["policy"]["probe_units"], rel=1e-12)
    assert online["spent"] == pytest.approx(result.units, rel=1e-12) and online["step"] == result.step
    assert 0.2 * 2000 < online["policy"]["probe_units"] <= 0.4 * 2000
    assert result.samples == 16 * result.step


def test_it_decides_and_finishes_on_the_reference(finished: tuple[Path, TrainResult, list[str]]) -> None:
    out = finished[0]
    decisions = last(out)["online"]["policy"]["decisions"]
    assert [d["why"] for d in decisions][:2] == ["start", "first"] and decisions[-1]["why"] == "finish"
    rows = [row for row in read_log(out) if "strategy" in row]
    assert {row["strategy"] for row in rows if row["fraction"] > 0.95} == {str(REFERENCE)}
    assert len({row["strategy"] for row in rows}) > 2


def test_the_log_has_a_row_for_every_probe(finished: tuple[Path, TrainResult, list[str]]) -> None:
    out, _, told = finished
    rows, records = [row for row in read_log(out) if "probe" in row], last(out)["online"]["probes"]
    assert len(rows) == len(records) >= 2
    for row, record in zip(rows, records, strict=True):
        assert row["step"] == record["step"] + 1 and row["probe_units"] == record["units"]
        assert row["fraction"] == pytest.approx(record["fraction"], rel=1e-12)
        assert row["best"] == record["best"] and row["scores"] == record["scores"] and row["failures"] == {}
        assert "loss" not in row and row["probe_seconds"] > 0
    assert sum(line.startswith("probe at") for line in told) == len(rows)
    switched = [record for record in records if record["switched"]]
    assert switched and all(row["probe"] for row in rows[records.index(switched[0]) :])


def test_the_cube_holds_every_probe(finished: tuple[Path, TrainResult, list[str]]) -> None:
    out = finished[0]
    cube, records = open_cube(out / "cube.nc").to_dataset(), last(out)["online"]["probes"]
    assert list(cube["step"].values) == [r["step"] for r in records]
    assert cube.sizes["patch"] == cube.sizes["dropout"] == 2 and cube.attrs["source"] == "gradscope online"
    assert int((cube["status"] == DONE).sum()) == sum(r["strategies"] for r in records)
    assert cube.attrs["units"] == pytest.approx(last(out)["online"]["policy"]["probe_units"])


def test_the_schedule_is_what_ran_and_runs_again(finished: tuple[Path, TrainResult, list[str]], tmp_path: Path) -> None:
    out = finished[0]
    schedule = load_schedule(out / "schedule.json")
    decisions = last(out)["online"]["policy"]["decisions"]
    assert [stage.start for stage in schedule.stages] == [d["fraction"] for d in decisions]
    assert schedule.budget == 2000 and schedule.batch_size == 16
    setting, before = setting_of(budget=900.0), 0.0
    result = train(setting, make_schedule(str(out / "schedule.json"), setting), tmp_path / "again")
    assert 900 - 64 < result.units <= 900
    for row in read_log(tmp_path / "again"):
        if "strategy" in row:
            assert row["strategy"] == str(schedule.draw(before, seed=0, step=row["step"] - 1))
            before = row["fraction"]


def test_it_can_be_profiled_as_any_run(finished: tuple[Path, TrainResult, list[str]]) -> None:
    task = PretrainTask(setting_of())
    training = task.training(finished[0])
    assert training["budget"] == 2000 and len(training["strategies"]) == 4
    assert [s["start"] for s in training["stages"]] == [
        d["fraction"] for d in last(finished[0])["online"]["policy"]["decisions"]
    ]


def test_a_finished_run_is_not_touched_again(finished: tuple[Path, TrainResult, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    before = {path.name: path.read_bytes() for path in out.glob("step-*.pt")}
    assert run(out) == dataclasses.replace(finished[1], out=out)
    assert {path.name: path.read_bytes() for path in out.glob("step-*.pt")} == before
    assert_same_run(finished[0], out)


@pytest.mark.parametrize("method", ["mocov3", pytest.param("simclr", marks=pytest.mark.slow), "dino"])
def test_training_is_the_same_bit_by_bit_with_probes_and_without(method: str, tmp_path: Path) -> None:
    """Decisions frozen and probes not charged: momentum encoder, centre, BatchNorm, moments, random streams."""
    for name, overhead in (("on", 0.9), ("off", 0.0)):
        rule = dataclasses.replace(FROZEN, overhead=overhead)
        setting = setting_of(method, budget=1300.0 if method == "dino" else 500.0, checkpoints=())
        torch.manual_seed(7)  # of the stream that nothing in training draws from
        run(tmp_path / name, rule, setting, options=RunOptions(charge_probes=False))
    on, off = last(tmp_path / "on"), last(tmp_path / "off")
    assert len(on["online"]["probes"]) >= 1 and not off["online"]["probes"]
    assert not any(p["failures"] or p["error"] for p in on["online"]["probes"])
    assert on["step"] == off["step"] > 5 and on["units"] == off["units"] and torch.equal(on["rng"], off["rng"])
    assert all(torch.equal(value, off["model"][name]) for name, value in on["model"].items())
    for i, kept in on["optimizer"]["state"].items():
        for k, v in kept.items():
            assert torch.equal(torch.as_tensor(v), torch.as_tensor(off["optimizer"]["state"][i][k]))
    rows = [
        [(r["step"], r["loss"], r["strategy"]) for r in read_log(tmp_path / n) if "loss" in r] for n in ("on", "off")
    ]
    assert rows[0] == rows[1]


# --- stops


@pytest.mark.parametrize(
    ("probe", "after"), [(1, 1), *(pytest.param(*at, marks=SLOW) for at in ((0, 0), (0, 1), (-1, 4)))]
)
def test_a_stopped_run_continues_as_if_it_had_not(
    probe: int, after: int, finished: tuple[Path, TrainResult, list[str]], tmp_path: Path
) -> None:
    """Stopped before the step of a probe, just after it, or some steps later."""
    out, count = tmp_path / "part", [0]
    at = last(finished[0])["online"]["probes"][probe]["step"] + after

    def stop(fraction: float, text: str) -> None:
        count[0] += "loss" in text
        if count[0] == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted) as stopped:
        run(out, report=stop)
    assert stopped.value.exit_code == 130
    kept = load_checkpoint(out / "resume.pt")
    assert kept["step"] == at and json.dumps(kept["online"], allow_nan=False)
    run(out)
    assert_same_run(finished[0], out)
    assert not (out / "resume.pt").exists()


def killed(ranks: Any, out: Path, at: int, during: str) -> None:
    """Train, but be killed by kill -9 at step `at`: before its step, in the midst of its probe, or writing a file."""
    from gradscope.adaptive import controller
    from gradscope.measuring import CheckpointMeasurement
    from gradscope.stepper import Stepper

    def end(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if during == "step":
        real = Stepper.step
        Stepper.step = lambda self, step, *rest: end() if step == at else real(self, step, *rest)  # type: ignore[method-assign]
    elif during == "probe":
        measure, count = CheckpointMeasurement._sub_batch, [0]

        def sub_batch(self: Any, *arguments: Any) -> str:
            count[0] += 1
            return end() if count[0] == at else measure(self, *arguments)

        CheckpointMeasurement._sub_batch = sub_batch  # type: ignore[method-assign]
    else:
        take, probes = controller.AdaptiveController._take, [0]

        def after(self: Any, *arguments: Any) -> None:
            take(self, *arguments)
            probes[0] += 1
            if probes[0] == at:
                end()

        controller.AdaptiveController._take = after  # type: ignore[method-assign]
    run(out)


@pytest.mark.parametrize(
    ("at", "during"),
    [
        pytest.param(30, "step", marks=pytest.mark.slow),
        (5, "probe"),
        pytest.param(2, "decision", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_as_if_it_had_not(
    at: int, during: str, finished: tuple[Path, TrainResult, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "part"
    (answer,) = run_function(1, killed, tmp_path / "job", out, at, during)
    assert answer.code == -signal.SIGKILL, answer
    saved = list_checkpoints(out)
    assert saved and saved[-1].step < last(finished[0])["step"]
    run(out)
    assert_same_run(finished[0], out)


# --- what is refused


def test_the_folder_of_another_run_is_refused(finished: tuple[Path, TrainResult, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "step-00000000.pt").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"other rule.*or choose another --out"):
        run(out, dataclasses.replace(ONLINE, exploration=0.2))
    with pytest.raises(CheckpointError, match="holds a run with another schedule; choose another --out"):
        train(setting_of(), make_schedule("mixed", setting_of()), out)
    with pytest.raises(CheckpointError, match="another seed"):
        run(out, setting=setting_of(seed=3))
    train(setting_of(budget=300.0), make_schedule("mixed", setting_of()), tmp_path / "mixed")
    with pytest.raises(CheckpointError, match="holds a run with another schedule; choose another --out"):
        run(tmp_path / "mixed", setting=setting_of(budget=300.0))


def test_a_budget_below_one_step_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="the smallest that does is 64") as error:
        run(tmp_path / "run", setting=setting_of(budget=60.0))
    assert error.value.exit_code == 3


def test_a_cube_that_cannot_be_written_is_told_and_the_run_is_complete(tmp_path: Path) -> None:
    out, told = tmp_path / "run", list[str]()
    out.mkdir()
    (out / "cube.nc").mkdir()
    result = run(out, tell=told.append)
    assert 2000 - 64 < result.units <= 2000 and load_schedule(out / "schedule.json").budget == 2000
    assert any("cube.nc" in line and "could not be written" in line for line in told)
    assert not (out / "resume.pt").exists()


def test_a_probe_without_end_of_trouble_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trouble(self: Any, *_: Any) -> str:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("gradscope.measuring.CheckpointMeasurement._sub_batch", trouble)
    told: list[str] = []
    result = run(tmp_path / "run", tell=told.append)
    rows = [row for row in read_log(tmp_path / "run") if "probe" in row]
    assert 2000 - 64 < result.units <= 2000 and len(rows) == 3
    assert all("out of memory" in row["error"] and row["probe"] == "" for row in rows)
    assert not (tmp_path / "run" / "cube.nc").exists() and (tmp_path / "run" / "schedule.json").exists()


# --- the command line


Run = Callable[..., tuple[int, str, str]]
QUICK = (
    "train", "--budget", 700, "--batch-size", 16, "--patch", 4, "--grid", "patch=4,7;dropout=0,0.5", "--set",
    "head_hidden=16", "--set", "evaluations=()", "--set", "checkpoints=()",
)  # fmt: skip
CHEAP = "online:overhead=0.6,minimum=3,maximum=3,sub_batch=4,dwell=0.0,confidence=0"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GRADSCOPE")]:
        monkeypatch.delenv(name)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_train_plot_optimize_and_train_again(command: Run, small_data: ImageData) -> None:
    """What the online mode writes is what the other commands take."""
    code, out, err = command(*QUICK, "--schedule", CHEAP, "--out", "x")
    assert code == 0, err
    assert "probe at" in err and "strategies on up to 3 sub-batches" in err
    assert {p.name for p in Path("x").iterdir()} >= {"cube.nc", "schedule.json", "log.jsonl", "config.toml"}
    code, out, err = command("optimize", "x/cube.nc", "--budget", 700, "--out", "next.json", "--json")
    assert code == 0, err
    assert load_schedule("next.json").budget == 700 and load_schedule("next.json").batch_size == 16  # not the probes' 4
    code, out, err = command("plot", "x/cube.nc", "--schedule", "x/schedule.json", "--out", "report.html")
    assert code == 0, err
    page = Path("report.html").read_text()
    assert "online" in page and "patch=7" in page
    assert command("show", "x/cube.nc")[0] == 0 and command("show", "x/schedule.json")[0] == 0
    code, out, err = command(*QUICK, "--schedule", "x/schedule.json", "--out", "again", "--json")
    assert code == 0, err
    assert json.loads(out)["units"] <= 700


def test_json_tells_what_was_decided_and_what_that_took(command: Run, small_data: ImageData) -> None:
    code, out, err = command(*QUICK, "--schedule", CHEAP, "--out", "x", "--json")
    assert code == 0, err
    facts, online = json.loads(out)["online"], last(Path("x"))["online"]
    assert facts["probes"] == len(online["probes"]) > 0 and facts["probe_units"] == online["policy"]["probe_units"]
    assert facts["schedule"] == "x/schedule.json" and facts["probe_seconds"] > 0
    assert [(s["start"], s["end"], s["mixture"]) for s in facts["stages"]] == [
        (s.start, s.end, {str(c): weight for c, weight in s.mixture}) for s in load_schedule("x/schedule.json").stages
    ]
    code, out, _ = command(*QUICK, "--out", "y", "--json")
    assert code == 0 and "online" not in json.loads(out)


@SLOW
def test_the_saved_settings_give_the_same_run_again(command: Run, small_data: ImageData) -> None:
    assert command(*QUICK, "--schedule", CHEAP, "--out", "x", "--quiet")[0] == 0
    code, out, err = command("--config", "x/config.toml", "train", "--out", "y", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == last(Path("x"))["step"] and "probe at" not in err
    assert told_apart(last(Path("x"))) == told_apart(last(Path("y")))
    assert (Path("x") / "config.toml").read_text() == (Path("y") / "config.toml").read_text()


def test_online_alone_is_the_default_rule(command: Run, small_data: ImageData) -> None:
    code, _, err = command(*QUICK, "--schedule", "online", "--out", "x")
    assert code == 0, err
    online = last(Path("x"))["online"]
    assert json.loads(online["policy"]["settings"])["rule"] == dataclasses.asdict(AdaptiveRule())
    assert not online["probes"] and "pays for no probe" in " ".join(err.split())  # 21 units of 700


def test_a_grid_of_one_trains_online_without_a_probe(command: Run, small_data: ImageData) -> None:
    words = [*QUICK[:7], "--grid", "patch=4;dropout=0", *QUICK[9:]]
    code, _, err = command(*words, "--schedule", CHEAP, "--out", "x")
    assert code == 0 and "nothing to choose" in " ".join(err.split()), err
    assert not last(Path("x"))["online"]["probes"] and len(load_schedule("x/schedule.json").strategies) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("online:overhed=0.1", "'overhed=0.1' is not one of its settings"),
        ("online:overhead=0.1,overhead=0.2", "overhead is given twice"),
        ("online:overhead=much", "overhead='much' is not a number"),
        ("online:frozen=perhaps", "frozen='perhaps' is neither true nor false"),
        ("online:criterion=best", "unknown criterion 'best'"),
        ("online:start=0.7,finish=0.5", "start=0.7 and finish=0.5 leave nothing"),
        ("onlin", "online or none"),
    ],
)
def test_bad_texts_end_with_2_and_the_name(text: str, message: str, command: Run, small_data: ImageData) -> None:
    code, _, err = command(*QUICK, "--schedule", text, "--out", "x")
    assert code == 2 and message in " ".join(err.replace("│", " ").split()), err
    assert not Path("x").exists() or not list(Path("x").iterdir())


def test_another_rule_in_the_same_folder_ends_with_1(command: Run, small_data: ImageData) -> None:
    assert command(*QUICK, "--schedule", CHEAP, "--out", "x", "--quiet")[0] == 0
    before = {path.name: path.read_bytes() for path in Path("x").iterdir()}
    for text, message in ((f"{CHEAP},monotone=true", "other rule"), ("mixed", "another schedule")):
        code, _, err = command(*QUICK, "--schedule", text, "--out", "x")
        assert code == 1 and message in " ".join(err.split()) and "--out" in err and "Traceback" not in err
    assert {path.name: path.read_bytes() for path in Path("x").iterdir()} == before


@SLOW
def test_sigterm_ends_with_143_and_the_same_command_continues(tmp_path: Path) -> None:
    """In a process of its own, on the bundled images."""
    words = [*map(str, QUICK), "--schedule", CHEAP, "--out", "x"]
    words[words.index("700")] = "2000"
    command = [sys.executable, "-m", "gradscope", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        patience = time.monotonic() + 200
        while not (tmp_path / "x" / "cube.nc").exists() and time.monotonic() < patience:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 143 and "Traceback" not in err, err
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = [sys.executable, "-m", "gradscope", *words[:-1], "whole"]
    subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert_same_run(tmp_path / "whole", tmp_path / "x")


def test_a_note_stands_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", quiet=False) as progress:
        progress.note("probe at 5%: [bold]still[/bold] all mixed")
    assert "probe at 5%: [bold]still[/bold] all mixed" in capsys.readouterr().err
    with Progress("train", quiet=True) as progress:
        progress.note("probe at 5%")
    assert capsys.readouterr().err == ""


def test_scores_in_the_log_are_numbers(finished: tuple[Path, TrainResult, list[str]]) -> None:
    for row in read_log(finished[0]):
        if "probe" in row:
            assert all(np.isfinite(value) for value in row["scores"].values()) and len(row["scores"]) >= 2

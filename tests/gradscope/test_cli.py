"""The command line as a user meets it: exit codes, one clear error, one JSON object."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from gradscope import open_cube, profile_of
from gradscope.cli import main
from gradscope.cube import digest_of, groups_of
from gradscope.data import ImageData
from schedulers import load_schedule
from tests.gradscope.tasks_for_tests import make_checkpoints


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run a command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("GRADSCOPE_BUDGET", "GRADSCOPE_SEED", "GRADSCOPE_CONFIG", "GRADSCOPE_DATA"):
        monkeypatch.delenv(name, raising=False)

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


TRAIN = ("train", "--budget", 400, "--batch-size", 16, "--grid", "patch=2,4,7;dropout=0,0.5", "--set", "head_hidden=16")


def test_the_three_lines_of_the_readme(run, small_data: ImageData, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run(*TRAIN, "--schedule", "mixed", "--out", "ckpt_dir")[0] == 0
    code, out, _ = run("profile", "ckpt_dir", "--samples", 48)
    assert code == 0 and "30 cells measured, 0 reused, 0 failed" in out
    code, out, _ = run("optimize", "--budget", "2M")
    assert code == 0 and "budget 2M = 2,000,000 units" in out and "x as many as without acceleration" in out
    plan = load_schedule("schedule.json")
    assert plan.budget == 2e6 and plan.batch_size == 16
    code, out, _ = run("plot", "--run", "ckpt_dir")
    assert code == 0 and Path("report.html").stat().st_size > 1e6
    code, out, _ = run(*TRAIN, "--schedule", "schedule.json", "--out", "optimized", "--json")
    facts = json.loads(out)
    assert code == 0 and 0 < facts["units"] <= 400 and 0 <= facts["knn_accuracy"] <= 1
    code, out, _ = run("evaluate", "ckpt_dir", "--knn", "--linear", "--json")
    assert code == 0 and set(json.loads(out)["accuracy"]) == {"knn", "linear"}
    assert (
        run("profile", "ckpt_dir", "--samples", 48)[1]
        == "cube.nc: 0 cells measured, 30 reused, 0 failed; nothing to do\n"
    )
    for name in ("cube.nc", "schedule.json", sorted(Path("ckpt_dir").glob("step-*.pt"))[0]):
        code, out, _ = run("show", name, "--json")
        assert code == 0 and json.loads(out)["kind"] in ("cube", "schedule", "checkpoint")
    code, out, _ = run("merge", "cube.nc", "cube.nc", "-o", "joined.nc")
    assert code == 0 and "30 of 30 cells" in out


def test_cost_prints_the_documented_object(run) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("cost", "--method", "mocov3", "--image-size", 240, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and len(rows) == 30
    row = next(r for r in rows if r["patch"] == 24 and r["dropout"] == 0.9)
    assert (row["tokens_query"], row["tokens_key"]) == (11, 101)
    assert round(row["cost"]["paper"], 2) == 1.30 and row["cost"]["measured"] is None
    assert row["cost"]["tokens"] == pytest.approx((3 * 11 + 101) / 226)
    assert "0.75" in run("cost", "--image-size", 240)[1]


SMALL = ("--image-size", 28, "--model", "demo", "--grid", "patch=4,7;dropout=0,0.5", "--batch-size", 2, "--repeats", 1)


def test_cost_measures_the_bundled_model(run) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("cost", "--measure", *SMALL, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["measured"]["batch_size"] == 2 and facts["measured"]["repeats"] == 1
    reference, *others = facts["rows"]
    assert reference["cost"]["measured"] == reference["cost"]["tokens"] == reference["flops_units"] == 4
    counted = json.loads(run("cost", *SMALL[:2], *SMALL[4:6], "--json")[1])["rows"]
    for row, plain in zip(facts["rows"], counted, strict=True):
        assert row["cost"] == {**plain["cost"], "measured": row["cost"]["measured"]}
        assert row["seconds"] * 4 / reference["seconds"] == pytest.approx(row["cost"]["measured"])
    assert all(row["flops"] < reference["flops"] and row["memory"] < reference["memory"] for row in others)
    code, out, _ = run("cost", "--measure", *SMALL)
    assert code == 0 and "us/sample" in out
    assert out.splitlines()[-1].startswith("flops: ") and out.splitlines()[-2].startswith("time: ")


def test_cost_writes_what_it_measured_into_a_cube(run, small_run: Path) -> None:  # type: ignore[no-untyped-def]
    run("profile", small_run, "--samples", 48)
    before = open_cube(Path("cube.nc"))
    code, out, _ = run("cost", small_run, "--cube", "cube.nc", "--repeats", 1)
    assert code == 0 and "gradscope optimize --cost-model measured and --max-hours can now be used" in out
    after = open_cube(Path("cube.nc"))
    found = profile_of(after.dataset, cost_model="measured")
    assert np.isfinite(found.seconds).all() and np.isfinite(found.memory).all() and found.reference_cost == 4
    np.testing.assert_allclose(found.cost, 4 * found.seconds / found.seconds[found.reference_index])
    told = json.loads(after.attrs["measured_json"])
    assert told["batch_size"] == 16 and told["source"] == after.attrs["task_digest"]  # the run's
    xr.testing.assert_identical(groups_of(before), groups_of(after))
    xr.testing.assert_identical(before.dataset["moment_cov"], after.dataset["moment_cov"])
    run("profile", small_run, "--samples", 48)
    np.testing.assert_array_equal(profile_of(open_cube(Path("cube.nc")).dataset).seconds, found.seconds)
    for words, message in (
        (("--image-size", 56), "costs 2.5 units there and 2.508 here; measure the same method, image size"),
        (("--image-size", 28, "--patch", 7), "its reference is patch=4,dropout=0, that to be measured patch=7"),
        (("--image-size", 28, "--grid", "patch=4,14"), "patch=14,dropout=0 is not on its grid; leave out --grid"),
    ):
        code, out, err = run("cost", "--cube", "cube.nc", "--model", "demo", *words)
        assert code == 2 and out == "" and message in err
    code, _, err = run("cost", small_run, "--cube", "cube.nc", "--grid", "patch=4;dropout=0", "--repeats", 1)
    assert code == 0 and "lose" not in err
    joined = profile_of(open_cube(Path("cube.nc")).dataset).seconds
    assert joined[1:].tolist() == found.seconds[1:].tolist() and joined[0] != found.seconds[0]
    words = ("--grid", "patch=4;dropout=0", "--repeats", 1, "--batch-size", 2, "--quiet")
    code, _, err = run("cost", small_run, "--cube", "cube.nc", *words)
    assert code == 0 and "note: measured at a batch of 2, where the cube's run had 16" in err
    assert "note: 3 strategies lose their measured costs, which were of another device" in err
    assert np.isnan(profile_of(open_cube(Path("cube.nc")).dataset).seconds[1:]).all()


def test_costs_of_a_bundled_model_go_into_a_cube_only_where_it_is_named(run, small_run: Path) -> None:  # type: ignore[no-untyped-def]
    run("profile", small_run, "--samples", 48, "--checkpoints", "0", "--only", "patch=4")
    code, _, err = run("cost", "--cube", "cube.nc", "--image-size", 28)
    assert code == 2 and "gradscope cost CKPT_DIR --cube cube.nc), or --model" in err
    assert np.isnan(open_cube(Path("cube.nc")).dataset["seconds"]).all()
    words = ("--model", "demo", "--image-size", 28, "--batch-size", 2, "--repeats", 1)
    code, _, err = run("cost", "--cube", "cube.nc", *words)
    assert code == 0 and "note: cube.nc gets the costs of the bundled model demo on random numbers" in err
    told = json.loads(open_cube(Path("cube.nc")).attrs["measured_json"])
    assert told["source"] == "random numbers, model demo, method mocov3, image 28"


def test_cost_measures_a_task_of_ones_own_without_tokens(run) -> None:  # type: ignore[no-untyped-def]
    make_checkpoints(Path("ckpt_dir"))
    words = ("cost", "ckpt_dir", "--task", "tests.gradscope.tasks_for_tests:LineTask", "--repeats", 1)
    code, out, _ = run(*words, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and set(rows[0]["cost"]) == {"tokens", "measured"} and "tokens_query" not in rows[0]
    code, out, _ = run(*words)
    assert code == 0 and out.split()[:4] == ["keep", "noise", "tokens", "measured"] and "attention" not in out
    code, out, err = run(*words[:3], "tests.gradscope.tasks_for_tests:FailingTask", "--json")
    rows = {(row["keep"], row["noise"]): row for row in json.loads(out)["rows"]}
    assert code == 4 and "failed: keep=half,noise=2: RuntimeError: out of memory, say" in err
    failed = rows["half", 2]
    assert failed["seconds"] is failed["flops"] is failed["memory"] is failed["cost"]["measured"] is None
    run("profile", "ckpt_dir", "--task", words[3], "--samples", 24, "--samples-per-cell", "fixed")
    code, _, err = run("cost", "--cube", "cube.nc", "--model", "demo")
    assert code == 2 and "its axes are keep, noise, those to be measured patch, dropout" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("optimize", "--budget", "10Q"), 2, "10Q"),
        (("optimize", "--budget", "0"), 2, "0"),
        (("optimize", "--budget", "100M"), 1, "cube.nc: no such cube; make one with `gradscope profile"),
        (("profile", "nowhere"), 1, "nowhere: no such folder"),
        (("profile", "."), 1, "holds no checkpoint"),
        (("profile", ".", "--task", "nowhere:Task"), 1, "run from the folder that holds nowhere.py"),
        (
            ("train", "--budget", "1K", "--out", "x", "--method", "byol"),
            2,
            "method is 'byol'; it must be one of mocov3, simclr, dino",
        ),
        (
            ("train", "--budget", "1K", "--out", "x", "--method", "simclr", "--set", "prototypes=9"),
            2,
            "only dino has it, not simclr",
        ),
        (
            ("train", "--budget", "1K", "--out", "x", "--schedule", "patch=5"),
            2,
            "patch=5 does not divide image_size=28",
        ),
        (("train", "--budget", "1K", "--out", "x", "--schedule", "pach=4"), 2, "unknown axis 'pach'"),
        (("train", "--budget", "1K", "--out", "x", "--schedule", "absent.json"), 2, "no such file"),
        (("train", "--budget", "1K", "--out", "x", "--schedule", "online:dweel=1"), 2, "dweel"),
        (("train", "--budget", "1K", "--out", "x", "--data", "imagenet"), 2, "imagenet"),
        (
            ("train", "--budget", "1K", "--out", "x", "--grid", "size=1"),
            2,
            "unknown axis 'size'; the axes are patch, dropout",
        ),
        (("train", "--budget", "1K", "--out", "x", "--set", "momentun=1"), 2, "momentun"),
        (("train", "--budget", "100", "--out", "x"), 3, "the smallest budget that does is 256"),
        (("train", "--budget", "1K", "--out", "/proc/x"), 1, "cannot be written"),
        (("cost", "--image-size", "239", "--grid", "patch=16"), 2, "does not divide image_size=239"),
        (
            ("train", "--budget", "1K", "--out", "x", "--set", "head_hidden=abc"),
            2,
            "head_hidden is 'abc'; it must be a whole",
        ),
        (("train", "--budget", "1K", "--out", "x", "--set", "budget=5K"), 2, "has an option of its own, --budget"),
        (("train", "--budget", "1K", "--out", "x", "--grid", "patch=a,b"), 2, "take numbers"),
        (("cost", "--grid", "patch=a"), 2, "take numbers"),
        (("profile", "nothere", "--epochs", "3"), 1, "nothere: no such folder"),
        (("cost", "--method", "byol"), 2, "unknown method 'byol'"),
        (("cost", "--measure", "--method", "byol"), 2, "unknown method 'byol'"),
        (("cost", "--measure", "--model", "huge"), 2, "model is 'huge'; it must be one of demo"),
        (("cost", "--measure", "--batch-size", "1"), 2, "at least 2"),
        (("cost", "--measure", "--model", "demo", "--repeats", "0"), 2, "repeats=0: at least 1 round is needed"),
        (("cost", "--repeats", "3"), 2, "--repeats is for measured costs; add --measure"),
        (("cost", "--measure", "--task", "m:T"), 2, "give the folder of its checkpoints"),
        (("cost", "nowhere"), 2, "nowhere: no such folder"),
        (("cost", "."), 2, "holds no checkpoint"),
        (("cost", ".", "--model", "demo"), 2, "--model demo: the checkpoints of . have their own; leave it out"),
        (("cost", "--cube", "absent.nc"), 1, "no such cube"),
        (("evaluate", "absent.pt"), 1, "no such checkpoint"),
        (("show", "absent.nc"), 2, "no such file"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_bad_input_is_one_clear_error(run, words: tuple[str, ...], code: int, message: str) -> None:  # type: ignore[no-untyped-def]
    got, out, err = run(*words)
    assert got == code and out == ""
    assert message in " ".join(err.replace("│", " ").split()) and "Traceback" not in err


def test_an_infeasible_optimization_names_the_smallest_budget(run, small_data: ImageData) -> None:  # type: ignore[no-untyped-def]
    run(*TRAIN, "--schedule", "mixed", "--out", "ckpt_dir")
    run("profile", "ckpt_dir", "--samples", 48, "--grid", "patch=4;dropout=0")
    code, _, err = run("optimize", "--budget", "2")
    assert code == 3 and "smallest feasible budget" in err
    code, _, err = run("optimize", "--budget", "1M", "--allow", "patch=5")
    assert code == 2 and "patch=5 is not on the grid" in err
    code, out, _ = run("optimize", "--budget", "1M", "--allow", "patch=2", "--json")
    assert code == 0 and json.loads(out)["stages"][0]["strategy"] == {"patch": 2, "dropout": 0}


def test_a_cube_that_cannot_be_written_loses_nothing(run, small_data: ImageData) -> None:  # type: ignore[no-untyped-def]
    run(*TRAIN, "--schedule", "mixed", "--out", "ckpt_dir")
    code, _, err = run("profile", "ckpt_dir", "--samples", 48, "--grid", "patch=4;dropout=0", "--out", "/proc/cube.nc")
    assert code == 1 and "cannot be written" in err


def test_a_users_task_by_name(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make_checkpoints(tmp_path / "ckpts")
    code, out, err = run(
        "profile", "ckpts", "--task", "tests.gradscope.tasks_for_tests:FailingTask", "--samples", 24, "--json"
    )
    facts = json.loads(out)
    assert code == 4 and facts["measured"] == 12 and len(facts["failed"]) == 6
    assert "failed: progress=0,keep=all,noise=2: NonFiniteError" in err
    line = (
        "profile",
        "ckpts",
        "--task",
        "tests.gradscope.tasks_for_tests:LineTask",
        "--samples",
        24,
        "--out",
        "line.nc",
    )
    code, out, _ = run(*line, "--dry-run", "--json")
    planned = json.loads(out)
    assert code == 0 and planned["cells"] == 18 and not Path("line.nc").exists()
    code, out, _ = run(*line, "--json")
    second_moments = 3 * 4 * 8 * 3  # three checkpoints without optimizer state, four reference sub-batches each
    assert code == 0 and json.loads(out)["units"] == pytest.approx(planned["units"] + second_moments)
    assert "0 cells to measure on a grid of 6 strategies, nothing to do" in run(*line, "--dry-run")[1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--task", "tests.gradscope.tasks_for_tests"), 1, "not of the form module:Class"),
        (("--task", "tests.gradscope.tasks_for_tests:Absent"), 1, "has no attribute 'Absent'"),
        (("--task", "gradscope.task:Task"), 1, "abstract"),
        (("--task", "os:getcwd"), 1, "is no gradscope.Task"),
        (("--task", "tests.gradscope.tasks_for_tests:LineTask", "--samples", "1"), 2, "use --samples 24 or more"),
        (("--task", "tests.gradscope.tasks_for_tests:LineTask", "--batch-size", "0"), 2, "batch_size is 0"),
        (("--task", "tests.gradscope.tasks_for_tests:LineTask", "--grid", "noise=0;noise=2"), 2, "given twice"),
        (("--task", "tests.gradscope.tasks_for_tests:LineTask", "--out", "/proc/cube.nc"), 1, "cannot be written"),
    ],
)
def test_wrong_tasks_and_options_of_a_profile(
    run, tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:  # type: ignore[no-untyped-def]
    make_checkpoints(tmp_path / "ckpts")
    got, out, err = run("profile", "ckpts", *words)
    assert got == code and out == "" and message in err


def test_flags_win_over_environment_over_file_over_defaults(
    run, small_data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    Path("gradscope.toml").write_text('[train]\nbudget = "1K"\nseed = 5\nbatch_size = 16\nout = "from_file"\n')

    def settings(*words: object) -> dict[str, object]:
        out = json.loads(run("train", "--json", "--set", "head_hidden=16", "--schedule", "patch=7", *words)[1])
        first = sorted(Path(out["out"]).glob("step-*.pt"))[0]
        return dict(json.loads(run("show", first, "--json")[1])["config"])

    assert (settings()["budget"], settings()["seed"]) == (1000, 5)
    monkeypatch.setenv("GRADSCOPE_SEED", "6")
    assert settings("--out", "b")["seed"] == 6
    assert settings("--out", "c", "--seed", 7)["seed"] == 7
    Path("gradscope.toml").write_text("[train]\nbugdet = 1\n")
    code, _, err = run("train", "--out", "d")
    assert code == 2 and "no option 'bugdet'" in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("train",),
        ("profile",),
        ("optimize",),
        ("plot",),
        ("demo",),
        ("evaluate",),
        ("cost",),
        ("merge",),
        ("show",),
        ("compare",),
    ],
)
def test_help_is_there_and_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom gradscope.cli import main\nsys.argv = ['gradscope', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'xarray', 'plotly', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: gradscope" in done.stdout


def test_some_strategies_by_name(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make_checkpoints(tmp_path / "my checkpoints")
    words = ("profile", "my checkpoints", "--task", "tests.gradscope.tasks_for_tests:LineTask", "--seed", 2)
    named = (*words, "--only", "keep=half,noise=0.5", "--only", "noise=2", "--checkpoints", "1,2", "--samples", 40)
    assert json.loads(run(*named, "--dry-run", "--json")[1]) == {
        "schema_version": 1, "cells": 4, "strategies": 6, "units": 400.0, "units_least": 400.0,
    }  # fmt: skip
    assert "4 cells measured, 0 reused, 0 failed" in run(*named)[1]
    cube = open_cube(Path("cube.nc")).dataset
    assert cube["n_samples"].values[1:, 1, 1].tolist() == cube["n_samples"].values[1:, 0, 2].tolist() == [40, 40]
    assert int(cube["n_samples"].sum()) == 160
    command = shlex.split(cube.attrs["profile_command"])
    assert command == ["gradscope", *map(str, words)]
    code, out, _ = run(*command[1:], "--only", "noise=2", "--checkpoints", "2")
    assert code == 0 and "1 cells measured, 3 reused" in out  # 16 sub-batches of 8
    assert int(open_cube(Path("cube.nc")).dataset["n_samples"].sum()) == 120 + 128
    for text, message in (("noise=1", "noise=1 is not on the grid"), ("nose=1", "unknown axis 'nose'")):
        code, out, err = run(*words, "--only", text)
        assert code == 2 and out == "" and message in err


def test_the_command_that_made_a_cube_is_kept_in_it(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    make_checkpoints(tmp_path / "ckpts")
    task = ("--task", "tests.gradscope.tasks_for_tests:LineTask", "--grid", "noise=0,2;keep=all,half")
    how = (*task, "--batch-size", "10", "--estimator", "subbatch")
    for name, some in (("a.nc", "0"), ("b.nc", "1,2")):
        run("profile", "ckpts", *how, "--out", name, "--checkpoints", some, "--samples", 30, "--quiet")
        command = open_cube(Path(name)).attrs["profile_command"]
        assert shlex.split(command) == ["gradscope", "profile", "ckpts", "--out", name, *how]
        digest = digest_of(open_cube(Path(name)).dataset)
        assert digest == digest_of(open_cube(Path(name)).to_dataset().assign_attrs(profile_command=""))
    run("merge", "a.nc", "b.nc", "-o", "cube.nc")
    assert shlex.split(open_cube(Path("cube.nc")).attrs["profile_command"]) == ["gradscope", "profile", "ckpts", *how]
    words = shlex.split(open_cube(Path("cube.nc")).attrs["profile_command"])[1:]
    out = run(*words, "--samples", 30, "--samples-per-cell", "fixed")[1]
    assert out.startswith("cube.nc: 0 cells measured, 12 reused")

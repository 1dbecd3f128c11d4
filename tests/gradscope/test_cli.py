"""The command line as a user meets it: exit codes, one clear error, one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradscope.cli import main
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
            "method 'byol' cannot be trained; the methods are mocov3",
        ),
        (("train", "--budget", "1K", "--out", "x", "--method", "dino"), 2, "its costs are known, its training is not"),
        (
            ("train", "--budget", "1K", "--out", "x", "--schedule", "patch=5"),
            2,
            "patch=5 does not divide image_size=28",
        ),
        (("train", "--budget", "1K", "--out", "x", "--schedule", "pach=4"), 2, "unknown axis 'pach'"),
        (("train", "--budget", "1K", "--out", "x", "--schedule", "absent.json"), 2, "no such file"),
        (("train", "--budget", "1K", "--out", "x", "--schedule", "online"), 2, "not built yet"),
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
        (("cost", "--method", "byol"), 2, "unknown method 'byol'"),
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

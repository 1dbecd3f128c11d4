"""`gradscope optimize` on a small real cube: what is asked, what is said, and the command it ends with."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import gradscope.config
from gradscope.cli.app import app
from gradscope.cli.optimize import _doubt_lines, more_samples
from gradscope.cube import open_cube, profile_of, save_cube
from gradscope.data import ImageData
from gradscope.merge import merge_cubes
from gradscope.pilot import training_of
from schedulers import Schedule, Strategy, load_schedule, predict, reference_progress

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command line in an empty folder: (exit code, stdout); errors come with their exit code and text."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return int(getattr(done.exception, "exit_code", 99)), str(done.exception)
        return done.exit_code, done.stdout

    return call


@pytest.fixture(scope="module")
def made(few_images: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short mixed run, `ckpt_dir`, and its profile, `cube.nc`."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradscope.config, "load_data", lambda name, folder=None, image_size=None: few_images)
        patch.chdir(folder)
        grid = ("--batch-size", "16", "--set", "head_hidden=16", "--set", "head_width=8", "--set", "patch=4")
        words = ["train", "--budget", "400", "--grid", "patch=4,7;dropout=0,0.5", *grid, "--schedule", "mixed"]
        assert CliRunner().invoke(app, [*words, "--out", "ckpt_dir", "--quiet"]).exit_code == 0
        assert CliRunner().invoke(app, ["profile", "ckpt_dir", "--samples", "64", "--quiet"]).exit_code == 0
    return folder


@pytest.fixture
def cube(run: Run, made: Path, small_data: ImageData) -> Path:
    shutil.copytree(made, Path.cwd(), dirs_exist_ok=True)
    return Path("cube.nc")


def test_the_mode_is_chosen_by_what_the_cube_knows_and_said(run: Run, cube: Path) -> None:
    code, out = run("optimize", "--budget", "100")
    assert code == 0 and "progress by trajectory (the profiled run's budget is known)" in out
    assert "predicted progress" in out and "without acceleration" in out
    assert load_schedule("schedule.json").progress_mode == "trajectory"
    code, out = run("optimize", "--budget", "100", "--progress", "fraction")
    assert code == 0 and "progress by fraction of the budget" in out and "predicted progress" not in out
    tree = open_cube(cube)
    known = training_of(tree.dataset)
    assert known.pop("budget") == 400
    tree.attrs["training_json"] = json.dumps(known)
    save_cube(*merge_cubes([tree]), Path("foreign.nc"))
    code, out = run("optimize", "foreign.nc", "--budget", "100")
    assert code == 0 and "fraction of the budget (the cube does not know the profiled run's budget" in out
    code, out = run("optimize", "foreign.nc", "--budget", "100", "--profiled-budget", "400")
    assert code == 0 and "progress by trajectory" in out
    code, out = run("optimize", "foreign.nc", "--target-progress", "0.5")
    assert code == 2 and "does not know the budget of the profiled run" in out


def test_the_smallest_budget_matches_the_reference(run: Run, cube: Path) -> None:
    code, out = run("optimize", "--match-reference", "200", "--criterion", "descent-batch", "--json", "--draws", "0")
    assert code == 0
    found = json.loads(out)
    profile = profile_of(open_cube(cube).dataset)
    target = reference_progress(profile, 200, criterion="descent-batch")
    plan = load_schedule("schedule.json")
    assert plan.budget == found["budget"] <= 200 * (1 + 1e-4)
    assert found["predicted"]["progress"] >= target * (1 - 1e-12)
    reached = predict(profile, plan, float(plan.budget or 0), criterion="descent-batch")[-1]
    assert reached == pytest.approx(found["predicted"]["progress"], rel=1e-9)
    assert found["predicted"]["speed_up"] == pytest.approx(found["predicted"]["reference_budget"] / plan.budget)


def test_a_schedule_given_as_a_cube_is_told_from_a_damaged_one(run: Run, cube: Path) -> None:
    assert run("optimize", "--budget", "2M")[0] == 0
    code, said = run("optimize", "schedule.json", "--budget", "2M")
    assert code == 1 and "schedule.json: " in said and "not a cube" in said and "remove it" not in said


def test_a_budget_that_pays_for_few_steps_is_said_to(run: Run, cube: Path) -> None:
    few = run("optimize", "--budget", "300")[1]
    plan = load_schedule(Path("schedule.json"))
    assert f"about {plan.total_samples / 16:.0f} steps of 16 samples: too few to train with" in few
    assert "too few" not in run("optimize", "--budget", "2M")[1]


def test_stages_tell_how_sure_they_are(run: Run, cube: Path) -> None:
    _, out = run("optimize", "--budget", "300", "--json")
    stages = json.loads(out)["stages"]
    assert all(0 <= stage["probability"] <= 1 and stage["regret"] >= 0 for stage in stages)
    again = json.loads(run("optimize", "--budget", "300", "--json")[1])["stages"]
    assert stages == again
    other = json.loads(run("optimize", "--budget", "300", "--json", "--seed", "1")[1])["stages"]
    assert [s["strategy"] for s in other] == [s["strategy"] for s in stages]
    none = json.loads(run("optimize", "--budget", "300", "--json", "--draws", "0")[1])
    assert not any("probability" in stage for stage in none["stages"]) and none["more_samples"] == []


def test_the_commands_for_more_samples_can_be_pasted(run: Run, cube: Path) -> None:
    """Their cells, and no others, get the samples they name, for the units that were told."""
    tree = open_cube(cube)
    profile = profile_of(tree.dataset)
    plan = load_schedule_with_wishes(run)
    wishes = more_samples(tree.dataset, cube, plan, profile)
    assert len(wishes) == 2  # checkpoints 1 and 2 share their cells and samples, 3 has others
    cells = {
        (int(w["checkpoint"]), *profile.grid.position(Strategy(w["strategy"]))) for w in plan.predicted["more_samples"]
    }
    before = tree.dataset["n_samples"].values.copy()
    for wish in wishes:
        words = shlex.split(wish.command)
        assert words[:2] == ["gradscope", "profile"]
        dry = json.loads(run(*words[1:], "--dry-run", "--json")[1])
        assert 0 < dry["units"] <= wish.units * (1 + 1e-9)
        assert run(*words[1:], "--quiet")[0] == 0
    after = open_cube(cube).dataset["n_samples"].values
    grown = {tuple(map(int, at)) for at in np.argwhere(after != before)}
    assert grown <= cells and all(after[cell] >= 2 * before[cell] for cell in cells)


def load_schedule_with_wishes(run: Run) -> Schedule:
    """A schedule whose choices at three checkpoints are said to be open."""
    run("optimize", "--budget", "300", "--draws", "0")
    plan = load_schedule("schedule.json")
    both = [Strategy(patch=7, dropout=0), Strategy(patch=4, dropout=0.5)]
    cells = [(t, s) for t in (1, 2) for s in both] + [(3, Strategy(patch=7, dropout=0.5))]
    wishes = [{"checkpoint": t, "progress": t / 4, "strategy": dict(s), "times": 4} for t, s in cells]
    return dataclasses.replace(plan, predicted={**plan.predicted, "more_samples": wishes})


def test_the_folder_is_found_beside_the_cube(run: Run, cube: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, tree = load_schedule_with_wishes(run), open_cube(cube)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    wishes = more_samples(tree.dataset, Path("../cube.nc"), plan, profile_of(tree.dataset))
    words = shlex.split(wishes[0].command)
    assert words[2] == "../ckpt_dir" and words[words.index("--out") + 1] == "../cube.nc"
    assert run(*words[1:], "--dry-run", "--json")[0] == 0


def test_an_online_run_has_no_checkpoints_to_go_back_to(run: Run, cube: Path) -> None:
    plan, tree = load_schedule_with_wishes(run), open_cube(cube)
    plan = dataclasses.replace(plan, stages=tuple(dataclasses.replace(s, probability=0.5) for s in plan.stages))
    online = tree.dataset.assign_attrs(source="gradscope online")
    profile = profile_of(online)
    assert more_samples(online, cube, plan, profile) == []
    said = "probes cannot be repeated"
    assert any(said in line for line in _doubt_lines(plan, profile, []))
    assert not any(
        said in line for line in _doubt_lines(plan, profile, more_samples(tree.dataset, cube, plan, profile))
    )


def test_a_target_on_the_command_line_wins_over_a_budget_in_the_environment(
    run: Run, cube: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSCOPE_BUDGET", "300")
    assert run("optimize", "--target-progress", "0.3", "--draws", "0")[0] == 0
    assert run("optimize", "--target-progress", "0.3", "--budget", "300")[0] == 2


def test_limits_of_time_and_memory_need_measured_costs(run: Run, cube: Path) -> None:
    for words in (("--max-hours", 1), ("--max-memory", 1)):
        code, said = run("optimize", "--budget", "300", *words)
        assert code == 2 and "gradscope cost CKPT_DIR --cube cube.nc" in said
    assert run("cost", "ckpt_dir", "--cube", "cube.nc", "--repeats", 1, "--quiet")[0] == 0
    profile = profile_of(open_cube(cube).dataset)
    assert profile.seconds is not None and profile.memory is not None
    _, out = run("optimize", "--budget", "300", "--json", "--draws", "0")
    free = json.loads(out)["predicted"]["seconds"]
    assert free > 0
    code, said = run("optimize", "--budget", "300", "--max-hours", 1e-9)
    assert code == 3 and "what is enough: --max-hours" in said and "(or --budget" in said
    hours = said.partition("--max-hours ")[2].split()[0]
    assert run("optimize", "--budget", "300", "--max-hours", hours, "--draws", "0")[0] == 0
    code, out = run("optimize", "--budget", "300", "--max-hours", free / 3600 * 1.001, "--json", "--draws", "0")
    assert code == 0 and json.loads(out)["predicted"]["seconds"] <= free * 1.001
    least = float(np.nanmin(profile.memory)) / 1e6
    code, out = run("optimize", "--budget", "300", "--max-memory", least * 1.0001, "--json", "--draws", "0")
    used = {str(Strategy(stage["strategy"])) for stage in json.loads(out)["stages"]}
    strategies = profile.grid.strategies()
    assert used == {str(strategies[int(np.nanargmin(profile.memory))])}
    code, said = run("optimize", "--budget", "300", "--max-memory", least / 2)
    assert code == 3 and "what is enough: --max-memory" in said
    megabytes = said.partition("--max-memory ")[2].split()[0]
    assert run("optimize", "--budget", "300", "--max-memory", megabytes, "--draws", "0")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one of --budget, --target-progress, --match-reference"),
        (("--budget", "1K", "--target-progress", "1"), "give one of"),
        (("--budget", "1K", "--draws", "-1"), "--draws -1"),
        (("--budget", "1K", "--seed", "-1"), "--seed -1"),
        (("--budget", "1K", "--progress", "steps"), "progress='steps' is not one of fraction, trajectory"),
        (("--target-progress", "0.5", "--progress", "fraction"), "fraction has no smallest budget"),
        (("--target-progress", "-1"), "must be a progress above 0"),
        (("--budget", "1K", "--monotone", "size"), "monotone='size' is neither cost nor one of the axes patch"),
        (("--budget", "1K", "--exploration", "2"), "exploration=2.0 is not a probability"),
        (("--budget", "1K", "--max-hours", "0"), "--max-hours 0: a positive number of hours"),
    ],
)
def test_bad_questions_are_refused(run: Run, cube: Path, words: tuple[str, ...], message: str) -> None:
    code, said = run("optimize", *words)
    assert code == 2 and message in said
    assert not Path("schedule.json").exists()

"""Schedules on the command line: short texts that the trainer runs, `compare`, and what `show` tells."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gradscope.cli.app import app
from gradscope.cli.run_settings import make_schedule
from gradscope.config import Setting
from gradscope.errors import UsageError
from gradscope.trainer import read_log, train
from schedulers import Schedule, Stage, Strategy, parse_schedule, save_schedule

Make = Callable[..., Setting]
REFERENCE = Strategy(patch=16, dropout=0)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def save(path: Path, text: str, budget: float | None = None) -> Path:
    plan = parse_schedule(text, cost=lambda s: 64 / s.number("patch"), reference=REFERENCE)
    save_schedule(dataclasses.replace(plan, budget=budget), path)
    return path


def test_compare_prints_a_table_and_one_summary(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", "patch=32@0.4;patch=16", 1000.0)
    b = save(tmp_path / "b.json", "0.75*patch=32+0.25*patch=16@0.2;patch=32@0.4;patch=16", 2000.0)
    lines = run("compare", a, b).stdout.splitlines()
    assert lines[0].split() == ["fraction", "a", "b", "cost", "a", "cost", "b", "same"]
    assert [line.split()[0] for line in lines[2:5]] == ["0.00-0.20", "0.20-0.40", "0.40-1.00"]
    assert [line.split()[-3:] for line in lines[2:5]] == [
        ["2.000", "2.500", "no"],
        ["2.000", "2.000", "yes"],
        ["4.000", "4.000", "yes"],
    ]
    assert "75% patch=32,dropout=0 + 25% patch=16,dropout=0" in lines[2]
    # a: 400/2 + 600/4 = 350 samples; b: 400/2.5 + 400/2 + 1200/4 = 660
    assert lines[5:] == [
        "the same in 80.0% of the budget; a 2.857 units per sample, 350 samples for 1K units; "
        "b 3.030 units per sample, 660 samples for 2K units; b sees 1.89 x as many samples"
    ]


def test_compare_as_json_is_one_object(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.json", "patch=32"), save(tmp_path / "b.json", "patch=32@0.5;patch=16", 100.0)
    facts = json.loads(run("compare", a, b, "--json").stdout)
    assert [segment["same"] for segment in facts["segments"]] == [True, False]
    assert facts["segments"][1]["b"]["mixture"] == [{"strategy": {"patch": 16, "dropout": 0}, "weight": 1.0}]
    assert (facts["same_share"], facts["cost"]["a"]) == (0.5, 2.0)
    assert facts["samples"] == {"a": None, "b": 37.5, "difference": None}
    assert "a 2.000 units per sample (no budget)" in run("compare", a, b).stdout


def test_compare_refuses_what_is_no_pair_of_schedules(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", "patch=32")
    other = Schedule(stages=(Stage(0.0, 1.0, ((Strategy(resolution=14), 1.0),), 1.0),))
    save_schedule(other, tmp_path / "other.json")
    for second, match in ((tmp_path / "other.json", "axes patch, dropout and the other resolution"), ("x", "x cannot")):
        failed = run("compare", a, second).exception
        assert isinstance(failed, UsageError) and match in str(failed)


def test_compare_says_when_costs_are_of_two_models(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", "patch=32")
    measured = dataclasses.replace(make_stage(), cost_model="measured")
    save_schedule(measured, tmp_path / "b.json")
    assert "counts costs by tokens, " in run("compare", a, tmp_path / "b.json").stderr


def make_stage(**changes: object) -> Schedule:
    stage = Stage(0.0, 1.0, ((REFERENCE, 1.0),), 4.0)
    return Schedule(stages=(dataclasses.replace(stage, **changes),))  # type: ignore[arg-type]


def test_show_tells_the_predictions_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    save_schedule(make_stage(), path)
    assert run("show", path).stdout.splitlines()[0].split() == ["fraction", "cost", "strategy"]
    rival = Strategy(patch=32, dropout=0)
    known = make_stage(progress=(0.0, 0.625), probability=0.83, regret=0.041, rival=rival)
    predicted = {"progress": 0.625, "speed_up": [1.5, 2], "reference_budget": 941234.5}
    save_schedule(dataclasses.replace(known, predicted=predicted), path)
    lines = run("show", path).stdout.splitlines()
    assert lines[2].split() == [
        "0.00-1.00", "4.000", "patch=16,dropout=0", "0.00-0.62", "83%", "4.1%", "patch=32,dropout=0",
    ]  # fmt: skip
    assert lines[3:] == [
        "predicted progress: 0.625", "predicted speed_up: [1.5, 2]", "predicted reference_budget: 941,234",
    ]  # fmt: skip
    wishes = [{"checkpoint": i, "progress": i / 4, "strategy": dict(rival), "times": 2} for i in range(2)]
    save_schedule(dataclasses.replace(known, predicted={"more_samples": wishes, "beyond_profile": False}), path)
    assert run("show", path).stdout.splitlines()[3:] == [
        "predicted more_samples:",
        "  checkpoint 0, progress 0, strategy patch=32,dropout=0, times 2",
        "  checkpoint 1, progress 0.25, strategy patch=32,dropout=0, times 2",
        "predicted beyond_profile: false",
    ]
    odd = {"more_samples": [{"strategy": {"a": [1]}}, {"strategy": 5}, 3]}  # a file that people edit
    save_schedule(dataclasses.replace(known, predicted=odd), path)
    assert run("show", path).exit_code == 0


def test_help_of_compare_is_registered() -> None:
    assert "compare a.json b.json" in " ".join(run("compare", "--help").stdout.split())


def test_ramps_and_mixtures_run_in_the_trainer(make_setting: Make, tmp_path: Path) -> None:
    setting = make_setting(budget=1500)
    text = "patch=14>7,dropout=0.5->0.25/2@0.4;0.5*patch=7+0.5*patch=4,dropout=0.5"
    plan = make_schedule(text, setting)
    result = train(setting, plan, tmp_path / "run")
    rows = [row for row in read_log(tmp_path / "run") if "loss" in row]
    seen = Counter(row["strategy"] for row in rows)
    assert list(dict.fromkeys(row["strategy"] for row in rows))[:2] == ["patch=14,dropout=0.5", "patch=7,dropout=0.25"]
    assert set(seen) == {
        "patch=14,dropout=0.5", "patch=7,dropout=0.25", "patch=7,dropout=0", "patch=4,dropout=0.5",
    }  # fmt: skip
    costs = {str(s): setting.new_model().cost(s) for s in plan.strategies}
    mixed = plan.stages[-1]
    assert mixed.cost == pytest.approx((costs["patch=7,dropout=0"] + costs["patch=4,dropout=0.5"]) / 2)
    units = 0.0
    for row in rows:  # each step's strategy is one of the stage's at the fraction spent before it
        assert row["strategy"] in [str(s) for s, _ in plan.at(units / 1500).mixture]
        units += 16 * costs[row["strategy"]]
        assert row["units"] == pytest.approx(units)
    assert result.units <= 1500


def test_a_run_takes_the_steps_that_its_schedule_foretells(make_setting: Make, tmp_path: Path) -> None:
    setting = make_setting()
    plan = make_schedule("patch=14>7>4", setting)
    result = train(setting, plan, tmp_path / "run")
    foretold = dataclasses.replace(plan, budget=setting.config.budget)
    assert (result.step, result.samples) == (foretold.steps(16), foretold.samples(16))


def test_a_file_in_other_costs_is_trained_for_the_samples_it_plans(
    make_setting: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting, path = make_setting(), tmp_path / "schedule.json"
    text = make_schedule("patch=7@0.5;patch=4", setting)
    costs = [1.0, 10.0]  # units of time, which make the short sequences cheaper than their tokens do
    stages = tuple(dataclasses.replace(stage, cost=cost) for stage, cost in zip(text.stages, costs, strict=True))
    timed = Schedule(stages=stages, budget=2000.0, batch_size=16, cost_model="measured")
    save_schedule(timed, path)
    plan = make_schedule(str(path), setting)
    by_tokens = 1000 * text.stages[0].cost + 100 * text.stages[1].cost
    assert plan.cost_model == "tokens" and plan.budget == pytest.approx(by_tokens)
    assert [plan.stage_samples(stage) for stage in plan.stages] == pytest.approx([1000, 100])
    told = capsys.readouterr().err
    assert "counts measured costs, training counts tokens" in told and f"(--budget {by_tokens:.0f})" in told
    assert f"was made for budget {by_tokens:.9g}, this run has {setting.config.budget:g}" in told
    setting = make_setting(budget=round(by_tokens))
    plan = make_schedule(str(path), setting)
    assert "made for budget" not in capsys.readouterr().err
    train(setting, plan, tmp_path / "run")
    seen = Counter(row["strategy"] for row in read_log(tmp_path / "run") if "loss" in row)
    assert seen["patch=7,dropout=0"] == pytest.approx(1000 / 16, abs=1) and seen["patch=4,dropout=0"] <= 7


def test_a_ramp_through_a_patch_that_the_model_has_not_is_refused(make_setting: Make) -> None:
    for text, match in (("patch=14->4/5", "patch=11.5 is not a whole number"), ("patch=14>5>4", "5 does not divide")):
        with pytest.raises(UsageError, match=match):
            make_schedule(text, make_setting())

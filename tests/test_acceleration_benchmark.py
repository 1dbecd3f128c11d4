"""The benchmark of acceleration: what is run in which order, how budgets at equal accuracy are read, its rows."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.acceleration import keys, paper, ranking, rates, transfer
from benchmarks.acceleration.cases import CASES, cases_for
from benchmarks.acceleration.numbers import besides, crossing, curves_of, ratio_of, saving_of
from benchmarks.acceleration.page import overview
from benchmarks.acceleration.runs import Plan, checked, kept, read_results, run_key
from benchmarks.acceleration.tables import rows_of
from benchmarks.arms import LEAST_SUB_BATCHES, PROFILE_SHARE, shares_of
from benchmarks.machine import versions
from benchmarks.summary import SHOWN, parse_row
from gradscope.cli import main
from gradscope.config import Setting, TrainConfig, open_setting
from gradscope.errors import UsageError
from schedulers import parse_count, parse_schedule
from schedulers.strategy import Strategy

CASE = replace(CASES["mocov3"], budgets=(10e3, 20e3, 40e3))


@pytest.mark.parametrize("arms", [tuple(CASE.arms), ("paper-again",), ("online", "patch7")])
def test_what_waits_for_something_comes_after_it(arms: tuple[str, ...]) -> None:
    names, after = Plan(CASE, "cpu", Path("x"), quiet=True).keys(arms, math.inf)
    assert len(set(names)) == len(names)
    assert all(names.index(first) < names.index(key) for key, first in after.items())
    for arm in arms:
        least, most = (share * CASE.budgets[-1] for share in (CASE.arms[arm].least, CASE.arms[arm].most))
        assert [b for b in CASE.budgets if run_key(arm, b) in names] == [b for b in CASE.budgets if least <= b <= most]


def test_a_small_budget_needs_its_pilots_at_the_largest_all_the_same() -> None:
    names, after = Plan(CASE, "cpu", Path("x"), quiet=True).keys(("paper-again",), 10e3)
    assert names == [
        "none 40K", "cube of none, ca-mse", "paper 40K", "cube of paper, ca-mse", "paper-again 10K",
    ]  # fmt: skip
    assert after == dict(zip(names[1:], names, strict=False))


@pytest.mark.parametrize("name", CASES)
def test_schedules_of_arms_can_be_read(name: str) -> None:
    case = CASES[name]
    for arm in case.arms.values():
        assert (arm.offline is None) == bool(arm.schedule)
        if "=" in arm.schedule:
            reference = Strategy(patch=case.model.patch, dropout=0)
            text = arm.schedule if "@" in arm.schedule else f"{arm.schedule}@1"
            schedule = parse_schedule(text, cost=lambda s: 1.0, reference=reference)
            assert {s["patch"] for s in schedule.strategies} <= set(case.model.patches)


@pytest.mark.parametrize("options", sorted({a.options for case in CASES.values() for a in case.arms.values()}))
def test_options_of_arms_are_options_of_train(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--budget", "1", "--schedule", "none", "--quiet", "--out", str(tmp_path), *options]
    monkeypatch.setattr("sys.argv", ["gradscope", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 3  # the budget, and nothing before it


def test_the_budget_at_equal_accuracy() -> None:
    points = {10.0: 0.5, 100.0: 0.6, 1000.0: 0.8}
    assert crossing(points, 0.7) == pytest.approx(math.sqrt(1e5))
    assert crossing(points, 0.4) == 10 and crossing(points, 0.8) == pytest.approx(1000)
    assert crossing(points, 0.81) == math.inf
    # a shorter run that was lucky counts as much as the longer one that was not
    assert crossing({10.0: 0.7, 100.0: 0.5, 1000.0: 0.9}, 0.6) == 10
    assert 100 < crossing({10.0: 0.7, 100.0: 0.5, 1000.0: 0.9}, 0.75) < 1000


def test_times_less_budget_and_the_interval_over_seeds() -> None:
    none = {100.0: [0.7, 0.7, 0.7]}
    there = ratio_of(none, {10.0: [0.7, 0.7, 0.7], 100.0: [0.8, 0.8, 0.8]}, 100.0)
    assert (there.value, there.low, there.high) == pytest.approx((10, 10, 10)) and there.bound
    never = ratio_of(none, {10.0: [0.5] * 3, 100.0: [0.6] * 3}, 100.0)
    assert (never.value, never.low, never.high, never.bound) == (0, 0, 0, False)
    found = ratio_of(none, {10.0: [0.6, 0.7, 0.72], 100.0: [0.8, 0.8, 0.8]}, 100.0)
    assert 1 < found.low < found.value < found.high == pytest.approx(10) and not found.bound


@pytest.mark.parametrize("ends", [(0.6, 0.65, 0.74, 0.73, 0.7), (0.6, 0.6, 0.6, 0.6, 0.6), (0.5, 0.6, 0.7, 0.75, 0.8)])
def test_nothing_needs_less_budget_than_itself(ends: tuple[float, ...]) -> None:
    curve = {10.0 * 2**i: [end, end + 0.02 * (i % 2), end - 0.01] for i, end in enumerate(ends)}
    for level in curve:
        found = ratio_of(curve, curve, level)
        assert (found.value, found.low, found.high) == (1, 1, 1) and found.reference <= level * (1 + 1e-12)


def results(**accuracies: float) -> list[dict[str, Any]]:
    """Two seeds of some arms at all budgets; accuracy grows by .01 with the budget and by .002 with the seed."""
    runs = [
        {
            run_key(arm, budget): {
                "points": [{"accuracy": accuracy + 0.01 * i + 0.002 * seed, "samples": 1}],
                "date": "2026-01-01", "device": "d",
            }
            for arm, accuracy in accuracies.items()
            for i, budget in enumerate(CASE.budgets)
        }
        for seed in (0, 1)
    ]  # fmt: skip
    cube = {"pilot": "mixed", "pilot_units": 40e3, "profile_units": 4e3, "date": "2026-01-02", "device": "d"}
    return [{"seed": i, "runs": run | {"cube of mixed, descent": cube}} for i, run in enumerate(runs)]


def test_rows_tell_accuracy_savings_and_costs() -> None:
    rows = rows_of(CASE, results(none=0.6, descent=0.62, paper=0.5), {})
    assert all(parse_row(dataclasses.asdict(row), "here") for row in rows)
    by = {row.claim: row for row in rows}
    title = CASE.arms["descent"].title
    about = "mocov3: times less budget for the accuracy of no acceleration at 40K"
    least = ", at least (it is there with its smallest budget)"
    row = by[f"{about}{least}, {title}"]
    assert (row.value, row.high, row.holds, row.runs) == (4.0, None, True, 2)
    paid = by[f"{about}{least}, 44K units of pilot and profile paid by one run, {title}"]
    assert paid.value == pytest.approx(40 / (10 + 44), abs=1e-3)
    lost = by[f"{about}, {CASE.arms['paper'].title}"]
    assert (lost.value, lost.holds) == (0, False)
    assert by[f"mocov3: kNN accuracy after 20K units, {title}"].value == pytest.approx(0.631)
    assert rows_of(CASE, [], {}) == [] and rows_of(CASE, results(descent=0.5), {}) == []


def test_what_came_before_a_pilot_is_paid_for_too() -> None:
    (found, _) = results(none=0.6, paper=0.7)
    cube = {"pilot_units": 40e3, "profile_units": 4e3}
    found["runs"] |= {"cube of none, ca-mse": cube, "cube of paper, ca-mse": cube}
    assert [besides(CASE, found, arm) for arm in ("none", "paper", "paper-again")] == [None, 44e3, 88e3]


def test_a_profile_may_cost_a_quarter_of_the_budget_whatever_the_method_has_besides() -> None:
    for case in CASES.values():
        samples = case.model.profile_samples(case.pilot_budget, 5)
        sub_batches = samples / case.model.batch_size
        assert sub_batches == int(sub_batches) >= LEAST_SUB_BATCHES
        grid = case.model.config().grid(case.model.image_size)
        share = 5 * samples * sum(case.model.cost(strategy) for strategy in grid.strategies()) / case.pilot_budget
        assert share <= PROFILE_SHARE or (sub_batches == LEAST_SUB_BATCHES and share < 1 / 3)


def test_a_seed_that_lacks_a_budget_is_left_out_of_that_arm() -> None:
    found = results(none=0.6, descent=0.62)
    del found[1]["runs"]["descent 20K"]
    assert curves_of(CASE, found, "descent") == {
        b: [pytest.approx(0.62 + 0.01 * i)] for i, b in enumerate(CASE.budgets)
    }
    assert len(curves_of(CASE, found, "none")[10e3]) == 2
    assert {row.runs for row in rows_of(CASE, found, {}) if "times less" in row.claim} == {1}


def test_budgets_in_time_are_those_of_the_strategies_that_ran() -> None:
    found = results(none=0.6, descent=0.62)
    for one in found:
        for key, run in one["runs"].items():
            if "cube" not in key:
                budget = parse_count(key.partition(" ")[2])
                half = {"a": 0.5, "b": 0.5}  # the second costs a tenth in units, and takes a fifth of the time
                run["shares"] = {"a": 1.0} if key.startswith("none") else half
                run["points"][0]["samples"] = budget / (4.0 if key.startswith("none") else 2.2)
    saving = saving_of(CASE, found, "descent", 40e3, {"a": 1.0, "b": 0.2})
    assert saving is not None and saving.time is not None and saving.units.value == 4
    assert saving.time.value == pytest.approx(4 * (2.2 / 0.6) / 4) and saving.time.bound
    for one in found:
        for budget in CASE.budgets:
            one["runs"][run_key("descent", budget)]["probe_seconds"] = budget / (4 * 2.2) * 0.6 * 4
    with_probes = saving_of(CASE, found, "descent", 40e3, {"a": 1.0, "b": 0.2})
    assert with_probes is not None and with_probes.time is not None
    assert with_probes.time.value == pytest.approx(saving.time.value / 2)
    for unknown in ({"a": 1.0}, {}):
        without = saving_of(CASE, found, "descent", 40e3, unknown)
        assert without is not None and without.time is None
    del found[0]["runs"]["none 10K"]["shares"]
    without = saving_of(CASE, found, "descent", 40e3, {"a": 1.0, "b": 0.2})
    assert without is not None and without.time is None


def test_shares_of_steps_are_right_though_a_log_shows_few_of_them() -> None:
    model, (dear, cheap) = CASE.model, ("patch=2,dropout=0", "patch=7,dropout=0")
    rng, units, log, shown = np.random.default_rng(0), 0.0, [], 0
    for step in range(20_000):
        strategy = dear if rng.random() < 0.25 else cheap
        units += 64 * model.cost(Strategy.parse(strategy))
        if units * 400 // 2e6 > shown or step == 0:
            shown = int(units * 400 // 2e6)
            log.append({"step": step + 1, "units": units, "strategy": strategy})
    assert len(log) < 500 and sum(row["strategy"] == dear for row in log) > 0.7 * len(log)
    shares = shares_of([*log, {"step": 1, "units": units, "accuracy": 0.5}], model)
    assert shares[dear] == pytest.approx(0.25, abs=0.03) and sum(shares.values()) == pytest.approx(1)


def test_an_arm_is_compared_with_the_best_constant_of_each_budget_and_others() -> None:
    found = results(none=0.6, descent=0.65, paper=0.66, patch4=0.61, patch7=0.62, mixed=0.64)
    for one in found:
        one["runs"]["patch4 40K"]["points"][0]["accuracy"] = 0.7
    ahead = {row.claim: row for row in rows_of(CASE, found, {}) if "less that of" in row.claim}
    said = {claim.partition("mocov3: kNN accuracy after ")[2]: row.value for claim, row in ahead.items()}
    best = "units of 'descent' less that of the best constant strategy there,"
    assert said[f"10K {best} 'patch7'"] == said[f"20K {best} 'patch7'"] == 0.03
    assert said[f"40K {best} 'patch4'"] == pytest.approx(-0.029)
    assert said["10K units of 'descent' less that of the paper's way, 'paper'"] == -0.01
    assert said["10K units of 'descent' less that of the mixed run, 'mixed'"] == 0.01
    assert len(said) == 3 * len(CASE.budgets)
    only = [found[0] | {"runs": {k: v for k, v in found[0]["runs"].items() if not k.startswith("paper")}}]
    other = [found[1] | {"runs": {k: v for k, v in found[1]["runs"].items() if not k.startswith("descent")}}]
    assert rows_of(CASE, [*only, *other], {})  # no seed has both


def test_what_was_foretold_stands_beside_what_happened() -> None:
    found = results(none=0.6, descent=0.611)
    for one in found:
        for budget in CASE.budgets:
            one["runs"][run_key("descent", budget)]["predicted_speed_up"] = 3.0
    first, second, last = (row for row in rows_of(CASE, found, {}) if "predicted" in row.claim)
    assert first.claim.endswith("after 10K units, over those; predicted 3.00")
    assert (first.value, first.holds, first.low) == (pytest.approx(2.1, abs=0.05), True, None)
    assert second.claim.endswith("over those, more than this (it never got there); predicted 3.00")
    assert (second.value, second.holds, second.aim) == (2.0, True, "at least half of the predicted")
    assert (last.value, last.holds, last.aim) == (1.0, True, SHOWN)  # nothing can be said
    worse = results(none=0.6, descent=0.5)
    worse[0]["runs"]["descent 10K"]["predicted_speed_up"] = worse[1]["runs"]["descent 10K"]["predicted_speed_up"] = 3.0
    (row,) = (row for row in rows_of(CASE, worse, {}) if "predicted" in row.claim)
    assert "at most this" in row.claim and (row.value, row.holds) == (1.0, False)


def test_own_keys_are_mocov3_where_they_have_the_strategy_of_the_query() -> None:
    def made(text: str) -> tuple[keys.OwnKeys, Setting]:
        config = TrainConfig(budget=1e3, batch_size=4, width=8, data="fashion-mnist-10k")
        setting = open_setting(config)
        model = setting.new_model()
        model.__class__ = keys.OwnKeys
        assert isinstance(model, keys.OwnKeys)
        model.key, model.generator = Strategy.parse(text), torch.Generator().manual_seed(3)
        return model, setting

    query = Strategy.parse("patch=4,dropout=0")
    model, setting = made("patch=4,dropout=0")
    views = setting.views(torch.arange(4), torch.Generator().manual_seed(0), torch.device("cpu"))
    same = setting.new_model()
    assert torch.equal(model.targets(views, query), same.targets(views, query))
    assert model.cost(query) == pytest.approx(same.cost(query))
    apart, _ = made("patch=2,dropout=0.5")
    assert apart.cost(query) == pytest.approx((3 * 50 + 99) / 197)
    first, second = apart.targets(views, query), apart.targets(views, query)
    assert not torch.equal(first, second)  # other tokens are dropped at every step


def test_rows_of_keys_rates_and_transfer() -> None:
    about = {"device": "d", "date": "2026-01-01", "budget": 60e3}
    chosen, other = "patch 4 of both", "patch 4 of queries"
    runs = {name: {"accuracy": 0.7 + 0.1 * (name == chosen) - 0.01 * (name == other)} for name in keys.VARIANTS}
    (tokens, patches) = keys.rows_of([about | {"seed": 0, "runs": runs}])
    assert (tokens.value, tokens.holds) == (0, False) and (patches.value, patches.holds) == (pytest.approx(0.11), True)

    (row,) = rates.rows_of(
        CASE, [about | {"chosen": "0.004", "accuracy": {"0.002": [0.8, 0.9], "0.004": [0.84, 0.84]}}]
    )
    assert (row.value, row.holds) == (0.84, False) and "0.002: 85.0%" in row.claim

    def ends(**accuracies: float) -> dict[str, Any]:
        return about | {"runs": {arm: {"points": [{"accuracy": value}]} for arm, value in accuracies.items()}}

    found = ends(transferred=0.7, own=0.704, none=0.6, patch7=0.69, mixed=0.71)
    found["runs"]["own"] |= {"pilot_units": 60e3, "profile_units": 15e3}
    found["runs"]["transferred"] |= {"pilot_units": 240e3, "profile_units": 60e3}
    rows = transfer.rows_of([found])
    assert [row.holds for row in rows] == [True, True, True, False]
    assert "300K units of the small one, 75K of the wide" in rows[0].claim
    assert transfer.rows_of([]) == [] == keys.rows_of([])


def test_cases_are_for_a_device_and_their_runs_for_their_model() -> None:
    assert cases_for("cpu") == ["mocov3", "simclr", "dino"] and cases_for("cuda:0") == ["mocov3-small-60"]
    model = CASES["mocov3-small-60"].model
    words = " ".join(model.words)
    assert "--model small" in words and "--image-size 60" in words and "--batch-size 256" in words
    assert model.cost(model.config().reference) == 4 and rates.rate_of(CASES["mocov3"]) == 4e-3


def test_committed_results_are_of_known_cases_and_keys() -> None:
    for name, case in CASES.items():
        names, _ = Plan(case, "cpu", Path("x"), quiet=True).keys(tuple(case.arms), math.inf)
        for found in read_results(name):
            assert set(found["runs"]) <= set(names) and found["grid"] == case.model.grid


def test_rank_correlations_are_over_the_strategies_of_a_checkpoint() -> None:
    def point(pilot: str, place: int, progress: float) -> dict[str, Any]:
        return {
            "pilot": pilot, "fraction": 0.5, "strategy": f"patch={place}",
            "scores": {"descent, optimizer": float(place), "ca-mse, euclidean": math.nan if place == 3 else -place},
            "0.08, recovered": {"loss": progress, "accuracy": 0.0},
        }  # fmt: skip

    mixed = [point("mixed", place, progress) for place, progress in ((1, 0.1), (2, 0.3), (3, 0.7), (4, 0.9))]
    none = [point("none", place, -place) for place in (1, 2, 3)]
    found = [{"seed": 0, "device": "d", "date": "2026-01-01", "points": mixed + none}]
    rows = {row.claim: row for row in ranking.rows_of(CASE, found)}
    assert all(parse_row(dataclasses.asdict(row), "here") for row in rows.values())
    text = "mocov3: rank correlation of {} with progress in the reference's loss, 0.08, recovered, checkpoints of '{}'"
    assert (rows[text.format("descent, optimizer", "mixed")].value, len(rows)) == (1, 3)  # accuracy has no order
    assert rows[text.format("ca-mse, euclidean", "mixed")].value == -1  # of the three strategies that have a score
    assert rows[text.format("descent, optimizer", "mixed")].aim == "above that of ca-mse, euclidean, -1.0"
    none_alone = rows[text.format("descent, optimizer", "none")]  # the paper's has no score for enough of them there
    assert (none_alone.value, none_alone.aim, ranking.rows_of(CASE, [])) == (-1, SHOWN, [])


def test_the_overview_has_a_line_for_every_arm_and_marks_the_best(tmp_path: Path) -> None:
    case = CASES["mocov3"]
    for seed in (0, 1):
        runs = {
            run_key(arm, budget): {
                "points": [{"accuracy": base + 0.01 * i, "samples": budget / 4}], "shares": {"a": 1.0}, "device": "d",
                "date": "2026-01-01",
            }
            for arm, base in {"none": 0.6, "patch4": 0.62, "patch7": 0.5}.items()
            for i, budget in enumerate(case.budgets)
        }  # fmt: skip
        found = {"case": case.name, "seed": seed, "grid": case.model.grid, "runs": runs}
        (tmp_path / f"mocov3-{seed}.json").write_text(json.dumps(found))
    (tmp_path / "clock-mocov3.json").write_text(json.dumps({"seconds": {"a": 1.0}}))
    lines = overview(tmp_path)
    assert overview(tmp_path / "empty") == []
    by = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines if line.startswith("|")}
    assert by["constant patch=4"][:5] == ["**62.0**", "**63.0**", "**64.0**", "**65.0**", "**66.0**"]
    assert by["constant patch=4"][5:] == ["2", *["4.0 (4.0 to 4.0)"] * 2, "≥ 4.0 (4.0 to 4.0)", "4.0", " |"]
    assert by["no acceleration"][4:6] == ["64.0", "2"] and by["constant patch=7"][6] == "not by 240K"
    (only,) = (json.loads(path.read_text()) for path in tmp_path.glob("mocov3-1.json"))
    for seed in (0, 1):
        runs = {key: only["runs"][key] for key in ("none 240K", "patch4 240K")}
        (tmp_path / f"mocov3-{seed}.json").write_text(json.dumps(only | {"seed": seed, "runs": runs}))
    assert any("constant patch=4" in line for line in overview(tmp_path))  # runs that have only begun


def test_results_of_other_cases_and_settings_are_not_mixed(tmp_path: Path) -> None:
    for name in ("mocov3", "mocov3-small-60"):
        (tmp_path / f"{name}-0.json").write_text(json.dumps({"case": name, "seed": 0, "runs": {}}))
    assert [one["case"] for one in read_results("mocov3", tmp_path)] == ["mocov3"]
    about = Plan(CASES["mocov3"], "cpu", Path("x"), quiet=True).about
    assert checked(about, {**about, "seed": 0}) == {**about, "seed": 0}
    with pytest.raises(UsageError, match=r"of mocov3, seed 0, are of runs with lr 0\.1, not 0\.004"):
        checked(about, {**about, "seed": 0, "lr": 0.1})


def test_a_run_that_was_done_keeps_its_date_and_device() -> None:
    new = {"points": [1], "date": "2026-02-02", "device": "b", "linear": 0.5}
    assert kept(new, {"points": [1], "date": "2026-01-01", "device": "a"}) == new | {
        "date": "2026-01-01",
        "device": "a",
    }
    assert kept(new, {"points": [0], "date": "2026-01-01", "device": "a"}) == new == kept(new, None)
    cube = {"profile_units": 2.0, "date": "2026-02-02", "device": "b"}
    assert kept(cube, cube | {"device": "a"})["device"] == "a"


def test_the_papers_findings_are_read_from_the_runs() -> None:
    case = CASES["mocov3"]
    budgets = (case.budgets[0], case.budgets[-1])
    firsts = [
        ["patch=4,dropout=0", "patch=14,dropout=0", "patch=2,dropout=0.5", "patch=2,dropout=0", "patch=2,dropout=0"]
    ]
    firsts += [
        ["patch=7,dropout=0.5", "patch=4,dropout=0.5", "patch=7,dropout=0", "patch=14,dropout=0", "patch=14,dropout=0"]
    ]
    results = []
    for seed, names in enumerate(firsts):
        accuracies = {"none": (0.6, 0.8), "patch4": (0.65, 0.7), "patch7": (0.7, 0.75), "none-poly": (0.61, None)}
        runs: dict[str, Any] = {
            run_key(arm, budget): {"points": [{"accuracy": value}], "device": "d", "date": "2026-01-01"}
            for arm, values in accuracies.items()
            for budget, value in zip(budgets, values, strict=True)
            if value is not None
        }
        best = [[i / 4, name] for i, name in enumerate(names)]
        runs["cube of none, ca-mse"] = {"best": {"ca-mse, euclidean": best}, "device": "d", "date": "2026-01-01"}
        results.append({"seed": seed, "runs": runs})
    moderate, shift, small, large, poly = paper.rows_of(case, results)
    assert (moderate.value, moderate.low, moderate.high, moderate.holds) == (0.75, 0.5, 1, True)  # 5 of 8 by chance
    assert "above what chance gives, 0.62" in str(moderate.aim) and "0.25 patch=14,dropout=0" in moderate.claim
    costs = [[case.model.cost(Strategy.parse(name)) for name in names] for names in firsts]
    logs = [math.log2((c[3] + c[4]) / (c[0] + c[1])) for c in costs]
    assert (shift.low, shift.high) == pytest.approx((min(logs), max(logs)), abs=1e-4) and shift.low < 0 < shift.high
    assert shift.holds is (sum(logs) > 0)
    assert "'patch7'" in small.claim and (small.value, small.holds) == (0.1, True)
    assert "'patch7'" in large.claim and (large.value, large.holds) == (-0.05, True)
    assert "'none-poly' less that of 'none'" in poly.claim and (poly.value, poly.holds) == (0.01, True)
    assert paper.rows_of(case, []) == []


def test_the_papers_printed_costs_are_ours() -> None:
    (row,) = paper.cost_rows("2026-01-01")
    assert row.value == row.aim == 33 and row.holds


def test_results_say_with_which_versions_they_were_made() -> None:
    found = versions()
    assert set(found) == {"gradscope", "torch", "python"} and all(found.values())
    assert found["torch"] == torch.__version__

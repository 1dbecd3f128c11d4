"""The report: complete, self-contained, and safe with any text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from plotly.offline import get_plotlyjs

from gradscope.cube import grid_of
from gradscope.plots._theme import with_error
from gradscope.report import build_report, facts_of, write_report
from gradscope.report_tables import results_of
from gradscope.report_words import sentences
from schedulers.errors import UsageError
from schedulers.schedule import Schedule, Stage, constant_schedule, mixed_schedule
from schedulers.strategy import Strategy
from tests.gradscope.cube_samples import sample_cube, sample_runs, sample_schedule, tree_of

EVIL = "<script>evil()</script>"


class Page(HTMLParser):
    """Tags with their attributes, scripts, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)
        if self._inside in ("h1", "h2"):
            self.headings[-1] += data

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


@pytest.fixture(scope="module")
def cube() -> xr.Dataset:
    return sample_cube()


@pytest.fixture(scope="module")
def parts(cube: xr.Dataset) -> dict[str, Any]:
    table: list[dict[str, str | float]] = [
        {"run": "no acceleration", "budget": "4M", "samples": 1_176_471, "seconds": 812.4, "kNN accuracy": 0.788},
        {"run": "schedule", "budget": "4M", "samples": 6_600_000, "seconds": 805.91, "kNN accuracy": 0.81},
    ]
    return {
        "cube": cube,
        "schedule": sample_schedule(cube),
        "runs": sample_runs(rows=60),
        "table": table,
        "title": "A profile",
    }


@pytest.fixture(scope="module")
def html(parts: dict[str, Any]) -> str:
    return build_report(**parts)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_plotly_is_embedded_once(html: str, page: Page) -> None:
    assert html.count(get_plotlyjs()) == 1
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1
    assert len([a for a in page.named("div") if "plotly-graph-div" in (a.get("class") or "")]) == 8


def test_nothing_is_fetched(page: Page) -> None:
    assert not [attributes for _, attributes in page.tags if {"src", "href", "srcset"} & attributes.keys()]
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "img", "object", "base")]
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy


def test_styles_fetch_nothing(html: str) -> None:
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_nothing_plays_on_load(html: str, page: Page) -> None:
    figures = [json.loads(script) for script in page.scripts if script.startswith('{"data"')]
    assert len(figures) == 8 and sum(bool(figure.get("frames")) for figure in figures) == 6
    assert html.index('<ul class="short"') < html.index(get_plotlyjs())  # words are there before plotly.js is read


def test_it_is_one_document_and_the_same_each_time(html: str, parts: dict[str, Any]) -> None:
    for tag in ("<!doctype html>", "<html", "<head>", "<body>", "</html>"):
        assert html.count(tag) - get_plotlyjs().count(tag) == 1
    assert build_report(**parts) == html


def test_words_come_before_figures_and_provenance_last(page: Page) -> None:
    assert page.headings == [
        "A profile",
        "Results",
        "The schedule",
        "Best strategy at each progress",
        "What is uncertain",
        "Strategies over training",
        "The schedule over its budget",
        "Training runs",
        "Provenance",
    ]


def test_the_page_begins_with_the_facts_in_a_few_sentences(parts: dict[str, Any], page: Page) -> None:
    shown = {name: parts[name] for name in ("cube", "schedule", "runs")}
    said = sentences(facts_of(**shown))
    assert page.text.index(said[0]) < page.text.index(said[1]) < page.text.index("The cube holds 9 strategies")
    assert said[0].startswith("By descent (optimizer metric) the best estimate is patch 4, dropout 0.25")
    assert said[1].startswith("At 5 of 5 points other strategies are within two standard errors of the best")
    assert "4M units pay for 6.603M samples, 6.6 times as many as the reference alone." in said[2]
    assert "Of 45 cells 1 failed and 2 are not measured yet." in said


def test_facts_are_those_of_the_cube(cube: xr.Dataset) -> None:
    facts = json.loads(json.dumps(facts_of(cube=cube), allow_nan=False))
    assert facts["profile"]["cells"] == {"all": 45, "measured": 42, "failed": 1, "pending": 2}
    scores = cube["descent"].sel(metric="optimizer")
    for best, score in zip(facts["best"], scores, strict=True):
        at = dict(part.split("=") for part in best["strategy"].split(","))
        value = float(score.sel({axis: float(text) for axis, text in at.items()}))
        assert value == best["value"] == float(score.max())
        assert best["gain"] == pytest.approx(value / float(score.sel(patch=2, dropout=0)))
        # by the definition: sqrt(se² + se_best²) twice
        errors = cube["descent_se"].sel(metric="optimizer", progress=score["progress"])
        own = float(errors.sel({axis: float(text) for axis, text in at.items()}))
        near = (value - score <= 2 * np.hypot(errors, own)).sum() - 1
        assert len(best["as_good"]) == int(near)
    assert facts["uncertain"]["untrained"] == ["patch=7,dropout=0.5"] and not facts["uncertain"]["other_cube"]


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([0], "is patch 4, dropout 0.25 at progress 0. It scores 1.3 times as well as the reference."),
        ([2, 3], "is patch 4, dropout 0.25 at every point measured, progress 0.5 to 0.75."),
        ([0, 1], "is patch 4, dropout 0.25 (at progress 0), then patch 4, dropout 0 (at progress 0.25)."),
    ],
)
def test_the_best_strategy_is_told_by_spans_of_progress(cube: xr.Dataset, points: list[int], said: str) -> None:
    assert said in sentences(facts_of(cube=cube.isel(progress=points)))[0]


def test_a_reference_that_is_best_is_said_to_be(cube: xr.Dataset) -> None:
    home = cube.isel(progress=[3, 4]).copy(deep=True)
    home["descent"].loc[{"patch": [4, 7]}] = 0.01
    home["descent"].loc[{"patch": 2, "dropout": [0.25, 0.5]}] = 0.01
    first = sentences(facts_of(cube=home))[0]
    assert "is patch 2, dropout 0 at every point" in first and "nothing cheaper is worth it" in first


def test_one_strategy_is_not_called_the_best_of_any(cube: xr.Dataset) -> None:
    begun = cube.copy(deep=True)
    for name in ("descent", "descent_se"):
        begun[name].loc[{"patch": [4, 7]}] = np.nan
        begun[name].loc[{"patch": 2, "dropout": [0.25, 0.5]}] = np.nan
    facts = facts_of(cube=begun)
    said = " ".join(sentences(facts))
    assert {best["decided"] for best in facts["best"]} == {None} and "No other was measured there." in said
    assert "At 5 points nothing is known about how sure" in said and "clear by" not in said and "worth" not in said


def test_a_gain_within_the_errors_is_not_told(cube: xr.Dataset) -> None:
    rough = cube.copy(deep=True)
    rough["descent_se"][:] = 10.0
    facts = facts_of(cube=rough)
    assert {best["gain"] for best in facts["best"]} == {None} and facts["uncertain"]["undecided"]
    assert "Two standard errors do not tell it from the reference." in sentences(facts)[0]
    half = cube.copy(deep=True)
    half["descent_se"][dict(progress=[0, 1])] = 10.0
    assert (
        "at 3 of 5 points; elsewhere two standard errors do not tell them apart." in sentences(facts_of(cube=half))[0]
    )


def test_missing_standard_errors_are_no_certainty(cube: xr.Dataset) -> None:
    for bare in (cube.drop_vars("descent_se"), cube.assign(descent_se=cube["descent_se"] * np.nan)):
        facts = facts_of(cube=bare)
        assert {(best["decided"], best["gain"], best["se"]) for best in facts["best"]} == {(None, None, None)}
        assert "clear" not in " ".join(sentences(facts))


def test_scores_that_are_lost_in_noise_are_told_from_missing_ones(cube: xr.Dataset) -> None:
    lost = cube.copy(deep=True)
    lost["descent"][dict(progress=[1])] = np.nan
    said = sentences(facts_of(cube=lost))
    assert "At progress 0.25 no score is defined: the reference gradient is lost in noise." in said
    assert "(at progress 0)" in said[0] and "at progress 0.25" not in said[0]
    lost["descent"][:] = np.nan
    assert sentences(facts_of(cube=lost))[0].endswith(
        "no strategy has a defined score: the reference gradient is lost in noise."
    )
    assert "Nothing is measured" not in sentences(facts_of(cube=lost))[0]
    rows = Page(build_report(cube=lost)).text.partition("All values of descent as a table")[2]
    assert rows.count("undefined") >= 42 and "failed" in rows


@pytest.mark.parametrize(
    ("predicted", "said"),
    [
        ({"speed_up": 2.5}, "It is predicted to train 2.5 times as fast as the reference alone."),
        (
            {"speed_up": 2.5, "progress": 1.5, "progress_se": 0.3, "beyond_profile": True},
            "It is predicted to reach progress 1.5 ± 0.3 of the profiled run, 2.5 times as fast as the reference "
            "alone, if what was measured last goes on to hold.",
        ),
        (
            {"speed_up": 2.5, "progress": 34.0, "progress_se": 50.0},
            "lost in noise (progress 30 ± 50",
        ),
    ],
)
def test_a_prediction_is_told_with_its_error(parts: dict[str, Any], predicted: dict[str, Any], said: str) -> None:
    schedule = dataclasses.replace(parts["schedule"], predicted=predicted)
    assert any(said in one for one in sentences(facts_of(schedule=schedule)))


def test_a_schedule_for_any_budget_is_told_by_its_samples(cube: xr.Dataset, parts: dict[str, Any]) -> None:
    said = sentences(facts_of(cube=cube, schedule=dataclasses.replace(parts["schedule"], budget=None)))
    assert any("a budget pays for 6.6 times as many samples as by the reference alone." in one for one in said)


def test_the_schedule_shows_the_learning_rate_where_the_cube_tells_it(cube: xr.Dataset, parts: dict[str, Any]) -> None:
    told = cube.assign_attrs(config_json=json.dumps({"config": {"decay": "cosine", "warmup": 0.1}}))
    schedule = parts["schedule"]
    assert "learning-rate factor" in build_report(cube=told, schedule=schedule)
    for text in ('{"config": {"decay": "unknown"}}', "[]", "{", '{"config": {"decay": "cosine", "warmup": "x"}}'):
        other = build_report(cube=cube.assign_attrs(config_json=text), schedule=schedule)
        assert "learning-rate factor" not in other


def test_groups_of_parameters_are_a_figure_of_their_own(cube: xr.Dataset) -> None:
    page = Page(build_report(cube=tree_of(cube)))
    assert any("by parameter group" in (a.get("aria-label") or "") for a in page.named("div"))


def test_every_value_is_there_as_text(cube: xr.Dataset, page: Page) -> None:
    here = {"patch": 7, "dropout": 0.5, "progress": 0.25, "metric": "optimizer"}
    text = with_error(float(cube["descent"].sel(here)), float(cube["descent_se"].sel(here)))
    assert text in page.text[page.text.index("All values of descent as a table") :]


def test_a_keyboard_reaches_the_slider(page: Page) -> None:
    (slider,) = [a for a in page.named("input") if a.get("type") == "range"]
    assert slider["max"] == "4" and slider["aria-valuetext"] == "progress 0"
    assert {"for": "progress"} in list(page.named("label")) and slider["id"] == "progress"
    assert "Descent (signed cos², same budget per update)" in [a.get("aria-label") for a in page.named("div")]
    assert all(a.get("aria-label") for a in page.named("div") if (a.get("class") or "").startswith("figure"))


def test_the_report_of_the_papers_grid_is_small() -> None:
    patches, dropouts = (16, 20, 24, 30, 48), (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
    cube = sample_cube(patches=patches, dropouts=dropouts, image_size=240)
    tree = tree_of(cube, [f"blocks.{i}" for i in range(20)], [0.05] * 20)
    html = build_report(cube=tree, schedule=sample_schedule(sample_cube()), runs=sample_runs(rows=400))
    assert len(html.encode()) < 7e6


def test_only_a_watched_report_loads_itself_again(parts: dict[str, Any], html: str) -> None:
    assert "data-refresh=" not in html
    assert '<body data-refresh="10">' in build_report(**parts, refresh=10)


def test_best_strategies_are_told_with_their_errors(cube: xr.Dataset, page: Page) -> None:
    scores = cube["descent"].sel(metric="optimizer", progress=0.5).stack(cell=("patch", "dropout"))
    best = scores.isel(cell=int(scores.argmax("cell")))
    error = cube["descent_se"].sel(metric="optimizer", progress=0.5, patch=best["patch"], dropout=best["dropout"])
    name = f"patch {int(best['patch'])}, dropout {float(best['dropout']):g}"
    assert f"{name} {with_error(float(best), float(error))}" in page.text


def test_the_schedule_is_told_in_numbers(page: Page) -> None:
    assert "25 to 70 % 1M to 2.8M units patch 4, dropout 0 1.02 1.773M 0.342 ± 0.011" in page.text
    assert "80% patch 2, dropout 0 20% patch 4, dropout 0" in page.text
    assert "The budget of 4M units pays for 6.603M samples, 6.6 times as many as the reference alone." in page.text


def test_results_are_told_with_aligned_decimals(page: Page) -> None:
    assert "no acceleration 4M 1,176,471 812.4 0.788" in page.text
    assert "schedule 4M 6,600,000 805.9 0.810" in page.text


def test_uncertainties_name_untrained_failed_and_pending(page: Page) -> None:
    assert "never trained under patch 7, dropout 0.5" in page.text
    assert "Failed: patch 4, dropout 0.5 at progress 0.5." in page.text
    assert "2 of 45 cells are not measured yet." in page.text
    assert "within two standard errors of it" in page.text
    assert "made from another cube" not in page.text


def test_provenance_holds_every_attribute_and_failure(cube: xr.Dataset, page: Page) -> None:
    tail = page.text[page.text.index("Provenance") :]
    for name in cube.attrs:
        assert name == "failures_json" or name in tail
    assert "progress=0.5,patch=4,dropout=0.5 out of memory" in tail
    assert "step-001000.pt" in tail


def test_a_schedule_of_another_cube_is_said_to_be_one(cube: xr.Dataset) -> None:
    other = sample_schedule(sample_cube(seed=1))
    assert "made from another cube" in Page(build_report(cube=cube, schedule=other)).text


def test_the_schedules_metric_and_criterion_lead(cube: xr.Dataset) -> None:
    stage = Stage(0.0, 1.0, ((Strategy(patch=2, dropout=0), 1.0),), 4.0)
    found = Page(build_report(cube=cube, schedule=Schedule((stage,), criterion="ca-mse", metric="euclidean")))
    assert "In the euclidean metric." in found.text and "best by ca-mse" in found.text


def test_every_text_is_escaped() -> None:
    cube = sample_cube()
    cube = cube.assign_coords(
        dropout=["none", EVIL, "half"],
        checkpoint=("progress", [EVIL] * 5),
        checkpoint_sha256=("progress", [EVIL] * 5),
        cost_model=[EVIL, "paper", "measured"],
        metric=["euclidean", EVIL],
    )
    cube["patch"].attrs["units"] = EVIL
    cube.attrs.update({name: EVIL for name in ("title", "source", "history", "method", "model_name", EVIL)})
    cube.attrs["reference"] = "patch=2,dropout=none"
    cube.attrs["failures_json"] = json.dumps({EVIL: EVIL})
    cube.attrs["config_json"] = json.dumps({EVIL: [EVIL]})
    cube.attrs["training_json"] = json.dumps({"strategies": [], "schedule": EVIL})
    strategy = Strategy(patch=4, dropout=EVIL)
    stage = Stage(0.0, 1.0, ((strategy, 0.9), (Strategy(patch=4, dropout=EVIL + "2"), 0.1)), 1.0, 0.5, 0.1)
    schedule = Schedule(
        (stage,),
        budget=1e6,
        cost_model=EVIL,
        criterion=EVIL,
        metric=EVIL,
        constraints={EVIL: EVIL},
        cube_digest=EVIL,
        library_version=EVIL,
    )
    runs = {EVIL: [{"units": 1.0, "loss": 1.0, "accuracy": 0.5, "strategy": EVIL}]}
    table: list[dict[str, str | float]] = [{EVIL: EVIL, "accuracy": 0.5}]
    plain = build_report(cube=sample_cube(), schedule=sample_schedule(sample_cube()), runs=sample_runs(rows=20))
    html = build_report(cube=cube, schedule=schedule, runs=runs, table=table, title=EVIL)
    assert "<script>evil" not in html and "evil()</script>" not in html
    assert len(Page(html).scripts) == len(Page(plain).scripts)
    assert EVIL in Page(html).text


@pytest.mark.parametrize("name", ["cube", "schedule", "runs", "table"])
def test_each_part_makes_a_report_alone(parts: dict[str, Any], name: str) -> None:
    html = build_report(**{name: parts[name]})
    assert "gradscope report" in html
    assert html.count(get_plotlyjs()) == (name != "table")


def test_a_tree_is_reported_as_its_root(cube: xr.Dataset) -> None:
    assert build_report(cube=xr.DataTree(cube)) == build_report(cube=cube)


def test_a_cube_of_one_metric_and_no_values_is_reported(cube: xr.Dataset) -> None:
    started = sample_cube(holes=False).isel(metric=[0])
    started = started.map(lambda v: v.where(False) if "metric" in v.dims else v, keep_attrs=True)
    started = started.assign_attrs(cube.attrs)
    started["status"] = started["status"] * 0
    assert "45 cells: 0 measured, 45 pending" in Page(build_report(cube=started)).text


@pytest.mark.parametrize("empty", [{}, {"runs": {}, "table": []}])
def test_nothing_to_report_is_refused(empty: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="nothing to show"):
        build_report(**empty)


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path, parts: dict[str, Any]) -> None:
    target = tmp_path / "report.html"
    write_report(target, table=parts["table"])
    first = target.read_text(encoding="utf-8")
    assert "kNN accuracy" in first
    with pytest.raises(UsageError):
        write_report(target, runs={"broken": [{"loss": 1.0}]})
    assert target.read_text(encoding="utf-8") == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_results_come_from_the_logs_where_no_table_is_given() -> None:
    rows = [
        {"units": 10.0, "samples": 4, "seconds": 1.0, "accuracy": 0.5},
        {"units": 1500.0, "samples": 2000, "seconds": 12.4, "loss": 1.0},
    ]
    assert results_of({"a": rows, "empty": []}) == [
        {"run": "a", "units spent": "1.5K", "samples": "2,000", "seconds": "12", "kNN accuracy": "50.0%"}
    ]


def test_runs_of_another_schedule_are_told_from_those_of_the_one_shown(cube: xr.Dataset) -> None:
    shown, rows = sample_schedule(cube), [{"units": 1500.0, "samples": 2000, "seconds": 12.4, "accuracy": 0.5}]
    reference, other = Strategy(patch=2, dropout=0), Strategy(patch=7, dropout=0)
    stages = tuple(dataclasses.replace(stage, score=None) for stage in shown.stages)
    followed = {
        "a": dataclasses.replace(shown, stages=stages, budget=1500.0),
        "b": constant_schedule(reference, 4.0),
        "c": mixed_schedule([reference, other], [4.0, 1.4]),
        "d": dataclasses.replace(shown, stages=(dataclasses.replace(shown.stages[0], end=1.0),)),
        "e": Schedule((dataclasses.replace(stages[0], end=0.5), dataclasses.replace(stages[1], start=0.5, end=1.0))),
    }
    runs = {name: rows for name in (*followed, "f")}
    told = [row["schedule"] for row in results_of(runs, followed, shown)]
    first = str(shown.stages[0].strategy)
    assert told == ["the one shown", str(reference), "mixed from 2 strategies", first, "another of 2 stages", ""]
    said = sentences(facts_of(cube=cube, schedule=shown, runs=runs, followed=followed))
    (measured,) = [line for line in said if line.startswith("Measured")]
    assert measured.startswith(
        "Measured kNN accuracy, one run each: 50.0% by a (1.5K units, this schedule), 50.0% by b (1.5K units, "
    )
    assert measured.endswith("and 2 more below.") and "No run shown" not in " ".join(said)
    del followed["a"]
    said = sentences(facts_of(cube=cube, schedule=shown, runs=runs, followed=followed))
    assert "No run shown has followed the schedule shown." in said


def test_stages_that_differ_from_the_best_are_counted(cube: xr.Dataset) -> None:
    shown = sample_schedule(cube)
    nowhere = dataclasses.replace(shown, progress_mode="trajectory")  # and its stages tell no progress
    assert facts_of(cube=cube, schedule=nowhere)["schedule"]["unlike_best"] is None
    best = [one["strategy"] for one in facts_of(cube=cube)["best"]]
    near = {0: 0, 1: 2, 2: 3}  # stages by fraction: [0, .25), [.25, .7), [.7, 1] beside progress 0, .5 and .75
    unlike = sum(str(stage.strategy) != best[near[i]] for i, stage in enumerate(shown.stages))
    assert facts_of(cube=cube, schedule=shown)["schedule"]["unlike_best"] == unlike > 0
    said = " ".join(sentences(facts_of(cube=cube, schedule=shown)))
    assert f"In {unlike} stages of 3 it runs another strategy than the best at the nearest point measured" in said


def test_a_table_of_another_kind_gives_no_sentence(cube: xr.Dataset) -> None:
    for row in ({"method": "x", "kNN accuracy": "81.0%"}, {"run": "a", "units spent": "1K", "kNN accuracy": "n/a"}):
        page = Page(build_report(cube=cube, table=[row]))
        assert "Measured" not in page.text and str(row["kNN accuracy"]) in page.text


def test_a_strategy_that_left_a_race_and_looks_better_is_explained(cube: xr.Dataset) -> None:
    said = "Strategies that left a race after few samples look better than the best that stayed at progress 0:"
    assert said not in Page(build_report(cube=cube)).text
    scores = cube["descent"].sel(metric="optimizer").isel(progress=0)
    first = scores.stack(cell=("patch", "dropout")).idxmax("cell").item()
    names = [str(s) for s in grid_of(cube).strategies()]
    left = str(Strategy(patch=int(first[0]), dropout=0 if first[1] == 0 else float(first[1])))
    raced = cube.copy(deep=True)
    raced["n_samples"].loc[{"progress": 0.0, "patch": first[0], "dropout": first[1]}] //= 8  # else it counts again
    row = f"{str(cube['checkpoint_sha256'].values[0])[:16]}:{int(cube['step'].values[0])}"
    metric = list(cube["metric"].values).index("optimizer")
    entry = {"rule": ["descent", metric], "cells": names, "checked": 8, "open": [n for n in names if n != left]}
    raced.attrs["races_json"] = json.dumps({row: [entry]})
    assert said in Page(build_report(cube=raced)).text

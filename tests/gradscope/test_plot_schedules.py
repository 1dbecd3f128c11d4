"""Schedules in one figure: the numbers collected for it, one colour per strategy, and what the hover tells."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import plotly.io as pio
import pytest

from benchmarks import pictures
from gradscope.plots import plot_schedule, plot_schedules
from gradscope.plots.schedules import _schedules_info
from schedulers import Schedule, Stage, Strategy, UsageError, parse_schedule, save_schedule

SHORT, FULL = Strategy(patch=30, dropout=0.5), Strategy(patch=16, dropout=0)


def plan(text: str, budget: float | None = 1000.0) -> Schedule:
    schedule = parse_schedule(text, cost=lambda s: 64 / s.number("patch"), reference=FULL)
    return dataclasses.replace(schedule, budget=budget)


PLANS = {
    "step": plan("patch=30,dropout=0.5@0.4;patch=16"),
    "mixture": plan("0.75*patch=32+0.25*patch=16@0.5;patch=30,dropout=0.5"),
    "none": plan("patch=16"),
}


def test_strips_hold_each_schedules_numbers() -> None:
    info = _schedules_info(PLANS)
    assert [strip.name for strip in info.strips] == ["step", "mixture", "none"]
    assert [strip.mixed for strip in info.strips] == [False, True, False]
    assert info.strategies == (SHORT, FULL, Strategy(patch=32, dropout=0))
    # none: 1000 / 4; step: 400 / (64/30) + 600 / 4 = 337.5
    assert (info.strips[2].note, info.strips[0].note) == (
        "1K units, 4 per sample, 250 samples",
        "1K units, 2.96 per sample, 337.5 samples",
    )
    mixed = {s: (b[0].base, b[0].share, b[0].end) for s, b in info.strips[1].blocks.items() if b[0].start == 0}
    assert mixed == {Strategy(patch=32, dropout=0): (0.0, 0.75, 0.5), FULL: (0.75, 0.25, 0.5)}


def test_the_axis_has_units_only_where_all_budgets_are_one() -> None:
    assert _schedules_info(PLANS).budget == 1000
    for other in (2000.0, None):
        assert _schedules_info({**PLANS, "other": plan("patch=16", other)}).budget is None
    ticks = plot_schedules(PLANS).layout.xaxis.ticktext
    assert ticks[2] == "50%<br>500"
    assert plot_schedules({"a": plan("patch=16", None)}).layout.xaxis.ticktext[2] == "50%"


def test_a_strategy_has_one_look_and_one_entry_in_the_legend() -> None:
    figure = plot_schedules(PLANS)
    looks: dict[str, set[tuple[str, str]]] = {}
    for bar in figure.data:
        looks.setdefault(bar.name, set()).add((bar.marker.color, bar.marker.pattern.shape))
    assert len(looks) == 3 and all(len(found) == 1 for found in looks.values())
    assert len(set.union(*looks.values())) == 3
    shown = [bar.name for bar in figure.data if bar.showlegend]
    assert sorted(shown) == sorted(looks)
    assert {bar.legendgroup for bar in figure.data} == {str(s) for s in _schedules_info(PLANS).strategies}


def test_many_strategies_of_many_schedules_are_told_apart() -> None:
    plans = {f"p{p}": plan(f"patch={p},dropout=0.8->0/7") for p in (16, 30)}
    looks = {(bar.name, bar.marker.color, bar.marker.pattern.shape) for bar in plot_schedules(plans).data}
    assert len(looks) == len({look[1:] for look in looks}) == 14


def test_strips_lie_under_each_other_without_overlap_in_the_order_given() -> None:
    figure = plot_schedules(
        {**PLANS, "a long name that needs more than one line because it says so much": PLANS["none"]}
    )
    axes = [figure.layout[name] for name in ("yaxis", "yaxis2", "yaxis3", "yaxis4")]
    high = 1.0
    margin = figure.layout.margin
    plot = figure.layout.height - margin.t - margin.b
    for axis, label in zip(axes, figure.layout.annotations, strict=True):
        low, top = axis.domain
        assert label.y == top and (high - top) * plot >= 16 * (label.text.count("<br>") + 1)
        assert (top - low) * plot == pytest.approx(58, abs=0.01)
        high = low
    assert high == pytest.approx(0, abs=1e-9)
    assert [bar.yaxis for bar in figure.data] == ["y", "y", "y2", "y2", "y2", "y3", "y4"]
    assert figure.layout.xaxis.anchor == "y4"


def test_names_are_shown_literally_and_the_figure_is_valid() -> None:
    figure = plot_schedules({"<i>mine</i>": PLANS["mixture"]})
    assert "&lt;i&gt;mine" in figure.layout.annotations[0].text
    assert "NaN" not in pio.to_json(figure, validate=True)


def test_no_schedule_is_refused() -> None:
    with pytest.raises(UsageError, match="no schedule to draw"):
        plot_schedules({})


def test_the_hover_tells_what_was_predicted() -> None:
    stage = Stage(
        start=0.0, end=1.0, mixture=((SHORT, 0.75), (FULL, 0.25)), cost=2.0,
        progress=(0.0, 0.625), probability=0.83, regret=0.041, rival=Strategy(patch=48, dropout=0),
    )  # fmt: skip
    schedule = Schedule(stages=(stage,), budget=1000.0)
    for figure in (plot_schedule(schedule), plot_schedules({"a": schedule})):
        text = figure.data[0].customdata[0].replace("\u00a0", " ")
        for line in (
            "75% of the steps",
            "predicted progress 0 to 0.625",
            "patch 30, dropout 0.5 is the best with probability 83%",
            "otherwise most often patch 48, dropout 0",
            "shortfall of the score then 4.1%",
        ):
            assert line in text
    plain = plot_schedule(PLANS["step"]).data[0].customdata[0]
    assert not any(word in plain for word in ("predicted", "probability", "otherwise", "shortfall"))


def test_pictures_draws_schedules_together(tmp_path: Path) -> None:
    for name, schedule in PLANS.items():
        save_schedule(schedule, tmp_path / f"{name}.json")
    (tmp_path / "more").mkdir()
    save_schedule(PLANS["none"], tmp_path / "more" / "step.json")
    paths = [tmp_path / "step.json", tmp_path / "none.json"]
    options = {"variables": ["descent"], "metric": None, "progress": None, "together": "both"}
    ((name, figure),) = pictures.figures(paths, **options)
    assert name == "both"
    assert [label.text.partition("<br>")[0] for label in figure.layout.annotations] == ["<b>step</b>", "<b>none</b>"]
    twice = [paths[0], tmp_path / "more" / "step.json"]
    ((_, figure),) = pictures.figures(twice, **options)
    assert len(figure.layout.annotations) == 2


def test_pictures_together_needs_a_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").write_text("<p>", encoding="utf-8")
    assert pictures.main([str(tmp_path / "report.html"), "--out", str(tmp_path), "--together", "all"]) == 2
    assert "--together all: there is no schedule" in capsys.readouterr().err

"""The report: one HTML file that holds everything it shows and works without a network (design §9)."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope import report_tables as tables
from gradscope.files import write_text
from gradscope.report_facts import Facts, Shown, report_facts
from gradscope.report_words import sentences
from schedulers.errors import UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from schedulers.decay import Decay
    from schedulers.schedule import Schedule

Row = Mapping[str, Any]

# The browser itself is told to fetch nothing.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


def build_report(
    *,
    cube: xr.DataTree | xr.Dataset | None = None,
    schedule: Schedule | None = None,
    runs: Mapping[str, Sequence[Row]] | None = None,
    followed: Mapping[str, Schedule] | None = None,
    table: Sequence[Mapping[str, str | float]] | None = None,
    title: str = "gradscope report",
    refresh: float | None = None,
) -> str:
    """The report as an HTML text.

    Args:
        cube: profile; its best strategies, uncertainties, heat maps and provenance.
        schedule: its stages, marked in the heat maps too (at the progress they are predicted for).
        runs: training logs by name (rows as `plot_training` takes them).
        followed: schedules that runs followed, by the runs' names, where known; told beside `schedule`.
        table: results of runs, a row each; columns are the keys in order of first appearance. By default what
            each of `runs` spent and reached.
        title: heading and name of the page.
        refresh: seconds after which the open page loads itself again, at the point of training it shows; by default
            it never does.

    Words and numbers come first, figures next, provenance last. plotly.js (about 5 MB) is embedded once and
    nothing is fetched. The metric and criterion shown first are the schedule's where it names them and the
    cube has them, else the cube's default metric and `descent`. Every text is escaped.

    Raises:
        UsageError: all four parts are None or empty.
    """
    if cube is None and schedule is None and not runs and not table:
        raise UsageError("report: nothing to show; give a cube, a schedule, training runs or a table of results")
    from gradscope import plots

    table = table or tables.results_of(runs or {}, followed or {}, schedule)
    shown = Shown.of(cube, schedule) if cube is not None else None
    facts = report_facts(shown, schedule, table)
    figures = _Figures()
    sections = [_short(facts)]
    if shown:
        sections.append(tables.cells_sentence(shown.view))
    if table:
        sections.append("<h2>Results</h2>" + tables.results_table(table))
    if schedule:
        view = shown.costs(schedule.cost_model) if shown else None
        sections.append("<h2>The schedule</h2>" + tables.schedule_table(schedule, view))
    if shown:
        said = tables.uncertainties(shown.dataset, shown.criterion, shown.metric, schedule)
        sections += [_best_section(shown), "<h2>What is uncertain</h2>" + said]
    if shown:
        sections.append(_cube_figures(shown, schedule, figures, cube))
    if schedule:
        sections.append(
            "<h2>The schedule over its budget</h2>" + figures.html(plots.plot_schedule(schedule, decay=_decay(shown)))
        )
    if runs:
        sections.append("<h2>Training runs</h2>" + figures.html(plots.plot_training(runs)))
    if shown or schedule:
        sections.append("<h2>Provenance</h2>")
    if schedule:
        sections.append(tables.schedule_provenance(schedule))
    if shown:
        sections.append(tables.cube_provenance(shown.dataset))
    return _page(title, sections, figures, refresh)


def facts_of(
    *,
    cube: xr.DataTree | xr.Dataset | None = None,
    schedule: Schedule | None = None,
    runs: Mapping[str, Sequence[Row]] | None = None,
    followed: Mapping[str, Schedule] | None = None,
) -> Facts:
    """What a report of these parts says first, as JSON values: see `report_facts`. Arguments as of `build_report`."""
    shown = Shown.of(cube, schedule) if cube is not None else None
    return report_facts(shown, schedule, tables.results_of(runs or {}, followed or {}, schedule))


def write_report(path: str | os.PathLike[str], **parts: Any) -> None:
    """`build_report(**parts)` written to `path`, whole or not at all.

    Raises GradscopeError when the folder cannot be written, and where `build_report` does.
    """
    write_text(Path(path), build_report(**parts))


class _Figures:
    """The figures of one page, numbered, so that the same contents give the same page."""

    def __init__(self) -> None:
        self.count = 0

    def html(self, figure: go.Figure, *, wide: bool = False) -> str:
        """A block that report.js draws with plotly.js; nothing plays on load. A `wide` one scrolls on a telephone."""
        from gradscope.plots import _theme

        self.count += 1
        text = _theme.without_slider(figure).to_json()
        for sign in "<>&":
            text = text.replace(sign, f"\\u{ord(sign):04x}")
        hint = '<small class="sideways">Wider than this screen: it scrolls sideways.</small>' if wide else ""
        return hint + (
            f'<div class="figure{" wide" if wide else ""}" role="group" aria-label="{tables.escaped(_spoken(figure))}">'
            f'<div id="figure-{self.count}" class="plotly-graph-div" style="height:{figure.layout.height:g}px"></div>'
            f'<script type="application/json">{text}</script></div>'
        )


def _spoken(figure: go.Figure) -> str:
    """The figure's title without markup."""
    text = (figure.layout.title.text or "figure").partition("</b>")[0]
    return html.unescape(re.sub(r"<[^>]*>", "", text.replace("<br>", " ")))


def _short(facts: Facts) -> str:
    said = "".join(f"<li>{tables.escaped(sentence)}</li>" for sentence in sentences(facts))
    return f'<ul class="short" aria-label="In short">{said}</ul>' if said else ""


def _best_section(shown: Shown) -> str:
    parts = [
        f"<h2>Best strategy at each progress</h2><p>In the {tables.escaped(shown.metric)} metric. A strategy after ≈ "
        "is within two standard errors of the best.</p>" + tables.best_table(shown.dataset, shown.metric)
    ]
    parts += [
        f"<details><summary>In the {tables.escaped(other)} metric</summary>"
        f"{tables.best_table(shown.dataset, other)}</details>"
        for other in map(str, shown.dataset["metric"].values)
        if other != shown.metric
    ]
    return "".join(parts)


def _decay(shown: Shown | None) -> Decay | None:
    """The decay of the learning rate that the profiled run had, None where its cube does not tell."""
    from schedulers.decay import Decay

    try:
        config = json.loads(shown.dataset.attrs["config_json"])["config"] if shown else {}
        return Decay(config["decay"], config.get("decay_alpha", 2.0), config.get("warmup", 0.0))
    except (KeyError, TypeError, ValueError):
        return None


def _cube_figures(
    shown: Shown, schedule: Schedule | None, figures: _Figures, cube: xr.DataTree | xr.Dataset | None
) -> str:
    import xarray as xr

    from gradscope.cube import groups_of
    from gradscope.plots import plot_bias_variance, plot_groups, plot_heatmap
    from gradscope.plots._view import criteria_of

    def heatmap(name: str) -> str:
        return figures.html(plot_heatmap(shown.dataset, variable=name, metric=shown.metric, schedule=schedule))

    lead = heatmap(shown.criterion)
    rest = [found.short for found in criteria_of(shown.dataset) if found.short != shown.criterion]
    pairs = "".join(heatmap(name) for name in [*rest, "bias_sq", "variance"])
    scatter = figures.html(plot_bias_variance(shown.dataset, metric=shown.metric)) if shown.view.beta() > 0 else ""
    layers = ""
    if isinstance(cube, xr.DataTree) and groups_of(cube) is not None and shown.view.beta() > 0:
        layers = figures.html(plot_groups(cube, metric=shown.metric), wide=True)
    numbers = tables.values_table(shown.view, shown.variable)
    return (
        "<h2>Strategies over training</h2><p>The slider goes through training, all figures of this section with it. "
        "Point at a cell for all its numbers.</p>"
        f'<div class="linked">{_control(shown.view.labels)}{lead}'
        f"<details><summary>All values of {tables.escaped(shown.criterion)} as a table</summary>{numbers}</details>"
        f'<div class="pair">{pairs}</div>{scatter}{layers}</div>'
    )


def _control(names: Sequence[str]) -> str:
    """A slider and a button that a keyboard reaches; none where there is one point of training."""
    if len(names) < 2:
        return ""
    return (
        f'<div class="control" data-names="{tables.escaped(json.dumps(list(names)))}">'
        '<label for="progress">progress</label>'
        f'<input type="range" id="progress" min="0" max="{len(names) - 1}" step="1" value="0" '
        f'aria-valuetext="progress {tables.escaped(names[0])}"><output for="progress">{tables.escaped(names[0])}'
        '</output><button type="button">Play</button></div>'
    )


def _part(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _page(title: str, sections: Sequence[str], figures: _Figures, refresh: float | None) -> str:
    from plotly.offline import get_plotlyjs

    scripts = f"<script>{get_plotlyjs()}</script>" if figures.count else ""
    link = f"<script>{_part('report.js')}</script>" if figures.count or refresh else ""
    body = f'<body data-refresh="{refresh:g}">' if refresh else "<body>"
    live = f"<p><small>Loads itself again every {refresh:g} seconds.</small></p>" if refresh else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{tables.escaped(title)}</title>\n<style>{_part('report.css')}</style>\n</head>\n{body}\n<main>\n"
        f"<h1>{tables.escaped(title)}</h1>\n{live}"
        + "\n".join(sections)
        + f"\n</main>\n{scripts}{link}\n</body>\n</html>\n"
    )

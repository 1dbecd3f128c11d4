"""The report: one HTML file that holds everything it shows and works without a network (design §9)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope import report_tables as tables
from gradscope.files import write_text
from schedulers.errors import UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from gradscope.plots._view import CubeView
    from schedulers.schedule import Schedule

Row = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light; --ink: #1f2430; --muted: #5b6270; --line: #d9dce1; --soft: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: white; color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3em; }
h2 { font-size: 1.2rem; margin: 2.4em 0 .4em; padding-top: .8em; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6em 0 .4em; }
p, ul { max-width: 46rem; margin: .5em 0; }
ul { padding-left: 1.2em; }
li { margin: .3em 0; }
small, .lead { color: var(--muted); }
.scroll { overflow-x: auto; margin: .6em 0 1em; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4em 1.2em .4em 0; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
pre { margin: 0; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
td { overflow-wrap: break-word; min-width: 4.5rem; }
td + td:not(.number) { min-width: 8.5rem; }
.figure { margin: .8em 0; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 24px; }
@media (min-width: 860px) { .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
details > summary { cursor: pointer; color: var(--muted); }
@media (max-width: 520px) { main { padding: 16px 12px 48px; } h1 { font-size: 1.4rem; } .modebar { display: none; } }
@media print {
  main { max-width: none; padding: 0; }
  .figure, tr, h2, h3 { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .modebar, .updatemenu-container { display: none !important; }
}
"""

# All figures over progress on the page show the same point: moving one slider moves them all.
_LINK = """
window.addEventListener("load", () => {
  const figures = Array.from(document.querySelectorAll(".linked .plotly-graph-div"));
  const at = { mode: "immediate", frame: { duration: 0, redraw: true }, transition: { duration: 0 } };
  let shown = null;
  for (const figure of figures) figure.on("plotly_animatingframe", event => {
    if (event.name === shown) return;
    shown = event.name;
    for (const other of figures) if (other !== figure) Plotly.animate(other, [event.name], at);
  });
});
"""

# The browser itself is told to fetch nothing.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage"]]}


def build_report(
    *,
    cube: xr.DataTree | xr.Dataset | None = None,
    schedule: Schedule | None = None,
    runs: Mapping[str, Sequence[Row]] | None = None,
    table: Sequence[Mapping[str, str | float]] | None = None,
    title: str = "gradscope report",
) -> str:
    """The report as an HTML text.

    Args:
        cube: profile; its best strategies, uncertainties, heat maps and provenance.
        schedule: its stages, marked in the heat maps too (at the progress they are predicted for).
        runs: training logs by name (rows as `plot_training` takes them).
        table: results of runs, a row each; columns are the keys in order of first appearance. By default what
            each of `runs` spent and reached.
        title: heading and name of the page.

    Words and numbers come first, figures next, provenance last. plotly.js (about 5 MB) is embedded once and
    nothing is fetched. The metric and criterion shown first are the schedule's where it names them and the
    cube has them, else the cube's default metric and `descent`. Every text is escaped.

    Raises:
        UsageError: all four parts are None or empty.
    """
    if cube is None and schedule is None and not runs and not table:
        raise UsageError("report: nothing to show; give a cube, a schedule, training runs or a table of results")
    from gradscope import plots

    table = table or tables.results_of(runs or {})
    shown = _Shown.of(cube, schedule) if cube is not None else None
    figures = _Figures()
    sections: list[str] = []
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
        sections.append(_cube_figures(shown, schedule, figures))
    if schedule:
        sections.append("<h2>The schedule over its budget</h2>" + figures.html(plots.plot_schedule(schedule)))
    if runs:
        sections.append("<h2>Training runs</h2>" + figures.html(plots.plot_training(runs)))
    if shown or schedule:
        sections.append("<h2>Provenance</h2>")
    if schedule:
        sections.append(tables.schedule_provenance(schedule))
    if shown:
        sections.append(tables.cube_provenance(shown.dataset))
    return _page(title, sections, figures)


def write_report(path: str | os.PathLike[str], **parts: Any) -> None:
    """`build_report(**parts)` written to `path`, whole or not at all.

    Raises GradscopeError when the folder cannot be written, and where `build_report` does.
    """
    write_text(Path(path), build_report(**parts))


@dataclass(frozen=True)
class _Shown:
    """A cube with the metric and the criterion that lead the page."""

    dataset: xr.Dataset
    view: CubeView
    metric: str
    criterion: str

    @classmethod
    def of(cls, cube: xr.DataTree | xr.Dataset, schedule: Schedule | None) -> _Shown:
        from gradscope.plots._view import criteria_of, default_metric, metrics_of, read_view, root_dataset

        dataset = root_dataset(cube)
        names = [found.short for found in criteria_of(dataset)]
        if not names:
            raise UsageError("cube: it holds no criterion; profile it with this version")
        metric, criterion = (schedule.metric, schedule.criterion) if schedule else (None, None)
        if metric is None or metric not in metrics_of(dataset):
            metric = default_metric(dataset)
        if criterion is None or criterion not in names:
            criterion = "descent" if "descent" in names else names[0]
        return cls(dataset, read_view(dataset, metric=metric), metric, criterion)

    def costs(self, cost_model: str) -> CubeView | None:
        """The view in a schedule's cost model, None where the cube does not have it."""
        from gradscope.plots._view import read_view

        known = "cost" in self.dataset and cost_model in self.dataset["cost_model"].values
        return read_view(self.dataset, metric=self.metric, cost_model=cost_model) if known else None


class _Figures:
    """The figures of one page, numbered, so that the same contents give the same page."""

    def __init__(self) -> None:
        self.count = 0

    def html(self, figure: go.Figure) -> str:
        """The figure as a block that needs plotly.js on the page; nothing plays on load."""
        self.count += 1
        block = figure.to_html(
            config=_CONFIG, auto_play=False, include_plotlyjs=False, full_html=False, div_id=f"figure-{self.count}"
        )
        return f'<div class="figure">{block}</div>'


def _best_section(shown: _Shown) -> str:
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


def _cube_figures(shown: _Shown, schedule: Schedule | None, figures: _Figures) -> str:
    from gradscope.plots import plot_bias_variance, plot_heatmap
    from gradscope.plots._view import criteria_of

    def heatmap(name: str) -> str:
        return figures.html(plot_heatmap(shown.dataset, variable=name, metric=shown.metric, schedule=schedule))

    lead = heatmap(shown.criterion)
    rest = [found.short for found in criteria_of(shown.dataset) if found.short != shown.criterion]
    pairs = "".join(heatmap(name) for name in [*rest, "bias_sq", "variance"])
    scatter = figures.html(plot_bias_variance(shown.dataset, metric=shown.metric)) if shown.view.beta() > 0 else ""
    return (
        "<h2>Strategies over training</h2><p>Move a slider to go through training: the figures of this section move "
        "together. Point at a cell for all its numbers.</p>"
        f'<div class="linked">{lead}<div class="pair">{pairs}</div>{scatter}</div>'
    )


def _page(title: str, sections: Sequence[str], figures: _Figures) -> str:
    from plotly.offline import get_plotlyjs

    scripts = f"<script>{get_plotlyjs()}</script>" if figures.count else ""
    link = f"<script>{_LINK}</script>" if figures.count else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{tables.escaped(title)}</title>\n<style>{_STYLE}</style>\n{scripts}\n</head>\n<body>\n<main>\n"
        f"<h1>{tables.escaped(title)}</h1>\n" + "\n".join(sections) + f"\n</main>\n{link}\n</body>\n</html>\n"
    )

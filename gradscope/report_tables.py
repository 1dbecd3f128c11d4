"""What the report says in words and numbers: HTML fragments, every text from outside escaped."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.plots._theme import number, strategy_text, with_error
from gradscope.plots._view import (
    DONE,
    FAILED,
    PENDING,
    Best,
    Candidate,
    CubeView,
    Variable,
    best_strategies,
    criteria_of,
    metrics_of,
    read_view,
    untrained_strategies,
)
from gradscope.report_facts import THIS, times_the_samples
from schedulers.counts import format_count

if TYPE_CHECKING:
    import xarray as xr

    from schedulers.schedule import Schedule, Stage

_LISTED = 4  # names in a list before "and n more"


def escaped(text: object) -> str:
    """`text` as it may stand between tags or in an attribute."""
    return html.escape(str(text), quote=True)


def table_html(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A table that scrolls sideways on a narrow screen. Header and cells are HTML; columns in `right` are numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        inner = "".join(f"<{tag}{' class=number' if i in right else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{inner}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table><thead>{row(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def cells_sentence(view: CubeView) -> str:
    """How much of the cube is measured."""
    done, failed = int((view.status == DONE).sum()), int((view.status == FAILED).sum())
    rest = view.status.size - done - failed
    parts = [f"{done} measured"] + ([f"{failed} failed"] if failed else []) + ([f"{rest} pending"] if rest else [])
    reference = escaped(strategy_text(view.grid.reference))
    return (
        f"<p>The cube holds {len(view.grid)} strategies at {_points(len(view.progress))} of training, "
        f"{view.status.size} cells: {', '.join(parts)}. The reference is <b>{reference}</b>; costs are in "
        f"units per sample ({escaped(view.cost_model or 'not recorded')}).</p>"
    )


def best_table(cube: xr.Dataset, metric: str) -> str:
    """The best strategy at each progress by each criterion of the cube, in one metric."""
    view = read_view(cube, metric=metric)
    criteria = criteria_of(cube)
    columns = [best_strategies(view, criterion) for criterion in criteria]
    header = ["progress", *(f"{escaped(c.short)}<br><small>{c.better} is better</small>" for c in criteria)]
    rows = [[p, *(_best_cell(column[t]) for column in columns)] for t, p in enumerate(view.labels)]
    return table_html(header, rows)


def _best_cell(best: Best | None) -> str:
    if best is None:
        return "<small>not measured</small>"
    winner = best.winner
    tie = f"<br><small>≈ {_names(rival.strategy for rival in best.rivals)}</small>" if best.rivals else ""
    return f"{escaped(strategy_text(winner.strategy))}<br><small>{with_error(winner.value, winner.error)}</small>{tie}"


def values_table(view: CubeView, shown: Variable) -> str:
    """Every value of one variable with its standard error: a row per strategy, a column per progress."""
    values, errors = view.values(shown.name), view.errors(shown.name)
    header = ["strategy", *(f"progress {p}" for p in view.labels)]

    def cell(t: int, at: tuple[int, ...]) -> str:
        status = int(view.status[t][at])
        if math.isnan(values[t][at]) and status != PENDING:
            return "failed" if status == FAILED else "undefined"
        return with_error(values[t][at], errors[t][at])

    points = range(len(view.progress))
    rows = [
        [escaped(strategy_text(view.strategy(at))), *(cell(t, at) for t in points)]
        for at in np.ndindex(*view.grid.shape)
    ]
    return table_html(header, rows, right=range(1, len(header)))


def schedule_table(schedule: Schedule, view: CubeView | None) -> str:
    """The stages with what is predicted of them, and what the budget pays for compared with the reference."""
    budget, stages = schedule.budget, schedule.stages
    moves, sure = (any(getattr(s, name) is not None for s in stages) for name in ("progress", "probability"))
    header = ["budget", "strategy", "units per<br>sample", *(["samples"] if budget else [])]
    header += ["predicted<br>progress"] if moves else []
    header += [f"predicted<br>{escaped(schedule.criterion or 'score')}"]
    header += ["best with<br>probability"] if sure else []
    rows = [
        [
            _span(stage, budget),
            _mixture(stage),
            number(stage.cost),
            *([format_count(schedule.stage_samples(stage))] if budget else []),
            *([_progress(stage)] if moves else []),
            _score(stage),
            *([_probability(stage)] if sure else []),
        ]
        for stage in stages
    ]
    text = table_html(header, rows, right=range(2, len(header))) + _samples_sentence(schedule, view)
    return text + _predicted_sentence(schedule)


def _progress(stage: Stage) -> str:
    return "" if stage.progress is None else f"{stage.progress[0]:.2f} to {stage.progress[1]:.2f}"


def _probability(stage: Stage) -> str:
    if stage.probability is None:
        return ""
    if stage.rival is None:
        return f"{stage.probability:.0%}"
    short = "" if stage.regret is None else f"<br>then {stage.regret:.1%} better"
    return f"{stage.probability:.0%}<br><small>else {escaped(strategy_text(stage.rival))}{short}</small>"


def _predicted_sentence(schedule: Schedule) -> str:
    """What `optimize` expected of the schedule as a whole, "" for one made by hand."""
    predicted, said = schedule.predicted, list[str]()
    end, alone, speed_up = (predicted.get(name) for name in ("progress", "progress_reference", "speed_up"))
    if isinstance(end, float) and isinstance(alone, float):
        error = predicted.get("progress_se")
        error = error if isinstance(error, float) else math.nan
        more = f", {speed_up:.2f} times as fast" if isinstance(speed_up, float) and not error >= end else ""
        said.append(
            f"Predicted by the speed that strategies earn: progress {with_error(end, error)} of the profiled run; the "
            f"reference alone would reach {alone:.2f}{more}."
        )
        if predicted.get("beyond_profile"):
            said.append("Past the profiled run's end its last measurements are held.")
    regret = predicted.get("regret")
    if isinstance(regret, float):
        said.append(f"A schedule from perfect measurements is expected to be {regret:.1%} better.")
    return f"<p>{' '.join(said)}</p>" if said else ""


def _score(stage: Stage) -> str:
    if stage.score is None:
        return ""
    return with_error(stage.score, math.nan if stage.score_se is None else stage.score_se)


def _span(stage: Stage, budget: float | None) -> str:
    share = f"{100 * stage.start:.3g} to {100 * stage.end:.3g} %"
    if budget is None:
        return share
    low, high = (format_count(edge * budget) if edge else "0" for edge in (stage.start, stage.end))
    return f"{share}<br><small>{low} to {high} units</small>"


def _mixture(stage: Stage) -> str:
    entries = sorted(((s, w) for s, w in stage.mixture if w > 0), key=lambda entry: -entry[1])
    if len(entries) == 1:
        return escaped(strategy_text(entries[0][0]))
    shown = "<br>".join(f"{weight:.0%} {escaped(strategy_text(strategy))}" for strategy, weight in entries[:_LISTED])
    rest = len(entries) - _LISTED
    return shown + (f"<br><small>and {rest} more</small>" if rest > 0 else "")


def _samples_sentence(schedule: Schedule, view: CubeView | None) -> str:
    if schedule.budget is None:
        return f"<p>{number(schedule.cost)} units per sample on average, for any budget.</p>"
    said = (
        f"The budget of {format_count(schedule.budget)} units pays for {format_count(schedule.total_samples)} samples"
    )
    more = times_the_samples(schedule, view)
    if more is not None:
        said += f", {number(more)} times as many as the reference alone"
    return f"<p>{said}.</p>"


def uncertainties(cube: xr.Dataset, criterion: str, metric: str, schedule: Schedule | None) -> str:
    """What the numbers do not settle: ties within two standard errors, disagreement, untrained strategies, holes."""
    from gradscope.cube import digest_of

    view = read_view(cube, metric=metric)
    ties = ties_table(cube, view, criterion)
    items = _disagreements(cube, view)
    if flattered := flattered_strategies(view, next(c for c in criteria_of(cube) if c.short == criterion)):
        items.append(
            "Strategies that left a race after few samples look better than the best that stayed at progress "
            f"{', '.join(flattered)}: their values have larger errors and were never followed up, so they count as no "
            "better."
        )
    untrained = untrained_strategies(cube)
    if untrained is None:
        items.append(
            "How the checkpoints were trained is not recorded, so the bias of strategies that they never saw "
            "may be mere unfamiliarity."
        )
    elif untrained:
        items.append(
            f"The checkpoints were never trained under {_names(untrained, limit=9)}: part of the bias measured "
            "there is unfamiliarity, which a few steps of training remove."
        )
    failed = np.argwhere(view.status == FAILED)
    if len(failed):
        cells = [
            f"{strategy_text(view.strategy(tuple(c[1:])))} at progress {view.labels[c[0]]}" for c in failed[:_LISTED]
        ]
        more = f" and {len(failed) - _LISTED} more" if len(failed) > _LISTED else ""
        items.append(f"Failed: {escaped('; '.join(cells))}{more}. The reasons stand under provenance.")
    if schedule and schedule.cube_digest and schedule.cube_digest != digest_of(cube):
        items.append(
            "The schedule was made from another cube than the one shown here, so its predicted scores "
            "do not belong to these figures."
        )
    pending = int(((view.status != DONE) & (view.status != FAILED)).sum())
    if pending:
        items.append(f"{pending} of {view.status.size} cells are not measured yet.")
    if not ties and bool((view.status == DONE).any()):
        items.insert(
            0, f"By {escaped(criterion)} no strategy is within two standard errors of the best at any progress."
        )
    said = "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>" if items else ""
    if ties:
        said += f"<details><summary>Strategies that two standard errors do not tell apart</summary>{ties}</details>"
    return said


def flattered_strategies(view: CubeView, shown: Variable) -> list[str]:
    """The labels of the points where a strategy that had left a race has a better value than the best that stayed."""
    values, sign = view.values(shown.name), -1 if shown.better == "lower" else 1
    best = best_strategies(view, shown)
    return [
        label
        for label, here, found in zip(view.labels, values, best, strict=True)
        if found and bool((sign * here > sign * found.winner.value).any())
    ]


def ties_table(cube: xr.Dataset, view: CubeView, criterion: str) -> str:
    """The strategies that two standard errors do not separate from the best by `criterion`, "" where there are none."""
    shown = next(c for c in criteria_of(cube) if c.short == criterion)
    rows = [
        [p, _candidate(best.winner), "<br>".join(map(_candidate, best.rivals))]
        for p, best in zip(view.labels, best_strategies(view, shown), strict=True)
        if best and best.rivals
    ]
    if not rows:
        return ""
    header = ["progress", f"best by {escaped(criterion)}", "within two standard errors of it"]
    return table_html(header, rows)


def _candidate(found: Candidate) -> str:
    return f"{escaped(strategy_text(found.strategy))} <small>({with_error(found.value, found.error)})</small>"


def _disagreements(cube: xr.Dataset, view: CubeView) -> list[str]:
    criteria = criteria_of(cube)
    winners = {c.short: best_strategies(view, c) for c in criteria}
    at_each = zip(view.labels, zip(*winners.values(), strict=True), strict=True)
    points = [p for p, bests in at_each if len({best.winner.strategy for best in bests if best}) > 1]
    if not points:
        return []
    names = ", ".join(map(escaped, winners))
    return [f"The criteria ({names}) prefer different strategies at progress {', '.join(points)}."]


def results_of(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    followed: Mapping[str, Schedule] | None = None,
    schedule: Schedule | None = None,
) -> list[dict[str, str]]:
    """A line of results for each training log: what it spent and the last accuracy it reached.

    With `followed`, the runs' own schedules where known, also what that was, seen from the `schedule` shown.
    """
    lines = []
    for name, rows in runs.items():
        last = next((row for row in reversed(rows) if {"units", "samples", "seconds"} <= row.keys()), None)
        if last is None:
            continue
        accuracy = next((row["accuracy"] for row in reversed(rows) if "accuracy" in row), None)
        lines.append(
            {
                "run": name,
                **({"schedule": _followed(followed.get(name), schedule)} if followed else {}),
                "units spent": format_count(last["units"]) if last["units"] else "0",
                "samples": f"{last['samples']:,}",
                "seconds": f"{last['seconds']:.0f}",
                "kNN accuracy": "" if accuracy is None else f"{accuracy:.1%}",
            }
        )
    return lines


def _followed(own: Schedule | None, shown: Schedule | None) -> str:
    """What a run followed: `THIS`, its strategy where it had one, or how many stages it had; "" where not known."""
    if own is None:
        return ""
    if shown is not None and own.same_stages(shown):
        return THIS
    if len(own.stages) == 1:
        entries = [strategy for strategy, weight in own.stages[0].mixture if weight > 0]
        return str(entries[0]) if len(entries) == 1 else f"mixed from {len(entries)} strategies"
    return f"{'one' if shown is None else 'another'} of {len(own.stages)} stages"


def results_table(rows: Sequence[Mapping[str, str | float]]) -> str:
    """A table of results; columns are the keys in order of first appearance, numbers to four digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [i for i, key in enumerate(columns) if all(not isinstance(row[key], str) for row in rows if key in row)]

    def cell(row: Mapping[str, str | float], key: str) -> str:
        value = row.get(key, "")
        if isinstance(value, str):
            return escaped(value)
        return f"{value:,.{places[key]}f}" if key in places else number(value, 4)

    places = {columns[i]: max(_decimals(float(row[columns[i]])) for row in rows if columns[i] in row) for i in numeric}
    return table_html([escaped(c) for c in columns], [[cell(row, c) for c in columns] for row in rows], right=numeric)


def _decimals(value: float) -> int:
    """Decimals that four significant digits need, six at most, trailing zeros not counted."""
    digits = 4 if value == 0 or not math.isfinite(value) else 3 - math.floor(math.log10(abs(value)))
    text = f"{value:.{min(max(digits, 0), 6)}f}"
    return len(text.rstrip("0").partition(".")[2])


def cube_provenance(cube: xr.Dataset) -> str:
    """The cube's attributes, its checkpoints, and the failures by cell."""
    attributes = [
        [escaped(name), _attribute(value)] for name, value in cube.attrs.items() if str(name) != "failures_json"
    ]
    failures = _json(cube.attrs.get("failures_json", ""))
    view = read_view(cube, metric=metrics_of(cube)[0])
    parts = [table_html(["attribute", "value"], attributes)]
    if isinstance(failures, dict) and failures:
        rows = [[escaped(cell), f"<pre>{escaped(message)}</pre>"] for cell, message in failures.items()]
        parts.append("<h3>Failed cells</h3>" + table_html(["cell", "error"], rows))
    if "checkpoint" in cube:
        digests = cube["checkpoint_sha256"].values if "checkpoint_sha256" in cube else [""] * len(view.progress)
        rows = [
            [
                p,
                "" if view.step is None else f"{view.step[t]:,}",
                escaped(name),
                f"<code>{escaped(str(digest)[:12])}</code>",
            ]
            for t, (p, name, digest) in enumerate(zip(view.labels, cube["checkpoint"].values, digests, strict=True))
        ]
        parts.append("<h3>Checkpoints</h3>" + table_html(["progress", "step", "file", "SHA-256"], rows))
    return "".join(parts)


def schedule_provenance(schedule: Schedule) -> str:
    """Where a schedule comes from: its constraints, the cube's digest and the version that wrote it."""
    values: dict[str, Any] = {
        "criterion": schedule.criterion,
        "metric": schedule.metric,
        "cost_model": schedule.cost_model,
        "progress_mode": schedule.progress_mode,
        "batch_size": schedule.batch_size,
        "constraints": json.dumps(schedule.constraints),
        "cube_digest": schedule.cube_digest,
        "library_version": schedule.library_version,
    }
    rows = [[escaped(name), _attribute(value)] for name, value in values.items() if value not in (None, "", "{}")]
    return table_html(["schedule", "value"], rows)


def _attribute(value: Any) -> str:
    text = str(value)
    structure = _json(text) if text[:1] in "{[" else None
    if structure is not None:
        shown = escaped(json.dumps(structure, indent=1, ensure_ascii=False))
        return f"<details><summary>{len(text):,} characters</summary><pre>{shown}</pre></details>"
    return escaped(text)


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None


def _points(count: int) -> str:
    return f"{count} point{'' if count == 1 else 's'}"


def _names(strategies: Iterable[Mapping[str, Any]], limit: int = _LISTED) -> str:
    names = [escaped(strategy_text(strategy)) for strategy in strategies]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(names[:limit]) + more

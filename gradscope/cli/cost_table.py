"""Rows and text of `gradscope cost`: what each strategy costs, and where cost is not linear in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradscope.cli.console import table

if TYPE_CHECKING:
    from gradscope.task import Task
    from gradscope.timing import MeasuredCosts
    from schedulers import Grid

LINEAR = 0.1  # a cost further from the token count's than this share of it is marked
Row = dict[str, Any]


def counted_rows(method: str, image_size: int, grid: Grid, small_crops: int) -> list[Row]:
    """A row per strategy by its token counts, nothing measured. Raises UsageError for what does not fit the image."""
    from gradscope.recipes import small_crop_size
    from schedulers import paper_cost, patch_tokens, token_cost, token_counts

    base, rows = int(grid.reference.number("patch")), []
    small = patch_tokens(small_crop_size(image_size, base), base) + 1 if small_crops else 0
    for strategy in grid.strategies():
        counts = token_counts(image_size, base, strategy, method=method)
        costs = {
            "tokens": token_cost(method, image_size, base, strategy, small=small, crops=small_crops),
            "paper": paper_cost(method, image_size, base, strategy, small=small, crops=small_crops),
            "measured": None,
        }
        rows.append({**strategy, "tokens_query": counts.query, "tokens_key": counts.key, "cost": costs})
    return rows


def measured_rows(task: Task, found: MeasuredCosts) -> list[Row]:
    """A row per strategy by the task's own counts and the measured costs, None where the loss failed.

    `flops`, `seconds` and `memory` (bytes) are per sample, `spread` is that of the seconds' quartiles, and
    `flops_units` what the operations come to in units when the reference's are its cost in tokens.
    """
    reference_cost = task.cost(task.grid.reference)
    seconds_units, flops_units = found.units(reference_cost), found.units(reference_cost, "flops")
    rows = []
    for strategy in task.grid.strategies():
        here = found[strategy]
        costs = {**task.other_costs(strategy), "tokens": task.cost(strategy), "measured": seconds_units[strategy]}
        row: Row = {**strategy, **{f"tokens_{name}": count for name, count in task.tokens(strategy).items()}}
        values = {"flops": here.flops, "seconds": here.seconds, "memory": here.memory, "spread": here.spread}
        values["flops_units"] = flops_units[strategy]
        rows.append({**row, "cost": _without_nan(costs), **_without_nan(values)})
    return rows


def cost_text(rows: Sequence[Row], grid: Grid, found: MeasuredCosts | None) -> list[str]:
    """The table as lines, and, where costs were measured, under it in words where they are not linear in tokens."""
    counts = [name for name in ("tokens_query", "tokens_key") if name in rows[0]]
    models = [name for name in ("tokens", "paper") if name in rows[0]["cost"]]
    header = [*grid.axes, *(name.removeprefix("tokens_") for name in counts), *models]
    if found is not None:
        header += ["measured", "flops", "us/sample", "MB/sample", "time off linear", "flops off linear"]
    lines = []
    for row in rows:
        axes = [row[axis] if isinstance(row[axis], str) else f"{row[axis]:g}" for axis in grid.axes]
        line = [*axes, *(str(row[name]) for name in counts), *(f"{row['cost'][name]:.3f}" for name in models)]
        lines.append(line if found is None else line + _measured_cells(row, grid))
    return table(header, lines) + ([] if found is None else ["", *verdict(rows, grid, found)])


def verdict(rows: Sequence[Row], grid: Grid, found: MeasuredCosts) -> list[str]:
    """How it was measured, and the largest deviations of time and FLOPs from linear in tokens, with their cause."""
    spread = sorted(row["spread"] for row in rows if row["spread"] is not None)
    lines = [
        f"{found.device}, threads: {found.threads}; steps of {found.batch_size} samples, median of {found.repeats} "
        f"rounds, quartiles {spread[len(spread) // 2]:.0%} apart"
    ]
    reference = next(row for row in rows if _is_reference(row, grid))
    for title, column in (("time", 0), ("flops", 1)):
        offs = [(off, row) for row in rows if row is not reference and (off := _off_linear(row)[column]) is not None]
        if not offs:
            continue
        most, row = max(offs, key=lambda pair: abs(pair[0]))
        beyond = sum(abs(off) > LINEAR for off, _ in offs)
        if not beyond:
            lines.append(f"{title}: within {LINEAR:.0%} of linear in tokens everywhere (at most {most:+.0%})")
            continue
        strategy = ",".join(f"{axis}={row[axis]}" for axis in grid.axes)
        counts = [f"{row[name]} {name.removeprefix('tokens_')}" for name in row if name.startswith("tokens_")]
        line = (
            f"{title}: {beyond} of {len(offs)} strategies more than {LINEAR:.0%} off linear (*), most {most:+.0%} at "
        )
        line += strategy + (f" ({' and '.join(counts)} tokens)" if counts else "")
        shorter = row["cost"]["tokens"] < reference["cost"]["tokens"]
        lines.append(line + (f": {_cause(title, most, shorter)}" if counts else ""))
    return lines


def _measured_cells(row: Row, grid: Grid) -> list[str]:
    if row["seconds"] is None:
        return ["failed", *["-"] * 5]
    off = ["-", "-"] if _is_reference(row, grid) else [_percent(off) for off in _off_linear(row)]
    flops = "-" if row["flops_units"] is None else f"{row['flops_units']:.3f}"
    memory = "-" if row["memory"] is None else f"{row['memory'] / 1e6:.2f}"
    return [f"{row['cost']['measured']:.3f}", flops, f"{row['seconds'] * 1e6:,.0f}", memory, *off]


def _off_linear(row: Row) -> tuple[float | None, float | None]:
    """Relative deviation of the costs by time and by FLOPs from that by tokens, None where not measured."""
    tokens = row["cost"]["tokens"]
    units = row["cost"]["measured"], row["flops_units"]
    time, flops = (None if value is None else value / tokens - 1 for value in units)
    return time, flops


def _percent(off: float | None) -> str:
    if off is None:
        return "-"
    return f"{100 * off:+.0f} %" + (" *" if abs(off) > LINEAR else "  ")


def _cause(title: str, off: float, shorter: bool) -> str:
    """The term of a transformer's cost that makes it deviate to this side of linear."""
    if (off > 0) != shorter:
        effect = ", so those shorter than the reference cost less of it" if shorter else ""
        return f"attention's quadratic term makes long sequences dearer than linear{effect}"
    work = "heads; per step optimizer and launches: measure at the batch you train with" if title == "time" else "heads"
    effect = "makes short sequences dearer than linear" if shorter else "weighs less on long ones"
    return f"work that is the same at every length ({work}) {effect}"


def _is_reference(row: Row, grid: Grid) -> bool:
    return all(row[axis] == value for axis, value in grid.reference.items())


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}

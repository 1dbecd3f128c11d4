"""One table of every claim that a benchmark measured: `python -m benchmarks.summary [--markdown]`.

Each `benchmarks/<name>/summary.json` is a list of rows with exactly the fields of `Row`. A row that
does not hold stays in the table.

    python -m benchmarks.summary --markdown > benchmarks/RESULTS.md
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SHOWN = "none; shown for comparison"  # the aim of rows without one
HEADER = ["benchmark", "claim", "measured", "interval", "unit", "aim", "holds", "runs", "device", "date", "command"]


class SummaryError(ValueError):
    """A summary file is not valid; the message names the file, the row and the field."""


@dataclass(frozen=True)
class Row:
    """One measured claim.

    `value` in `unit` with its interval `low`..`high` (None where an interval has no meaning, as for an
    exact count); `aim` is what was aimed at, in words or as a number; `holds` whether it is reached;
    `runs` how many runs the value rests on; `command` repeats it from the repository root.
    """

    claim: str
    value: float
    unit: str
    low: float | None
    high: float | None
    aim: str | float
    holds: bool
    device: str
    date: str
    runs: int
    command: str


def parse_row(entry: object, where: str) -> Row:
    """`entry` of a summary file as a Row. Raises SummaryError naming `where` and the field."""
    if not isinstance(entry, Mapping):
        raise SummaryError(f"{where}: expected an object with the fields {', '.join(_FIELDS)}, found {entry!r}")
    for name in _FIELDS:
        if name not in entry:
            raise SummaryError(f"{where}: field {name!r} is missing")
    for name in entry:
        if name not in _FIELDS:
            raise SummaryError(f"{where}: unknown field {name!r}; the fields are {', '.join(_FIELDS)}")
    for name, value in entry.items():
        wanted = _complaint(name, value)
        if wanted:
            raise SummaryError(f"{where}: field {name!r} must be {wanted}, not {value!r}")
    row = Row(**entry)
    if row.low is not None and row.low > row.value:
        raise SummaryError(f"{where}: field 'low' ({row.low}) lies above the value {row.value}")
    if row.high is not None and row.high < row.value:
        raise SummaryError(f"{where}: field 'high' ({row.high}) lies below the value {row.value}")
    return row


def read_summary(path: Path) -> list[Row]:
    """The rows of one summary file. Raises SummaryError naming the file and the field."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SummaryError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise SummaryError(f"{path}: expected a list of rows, found {type(entries).__name__}")
    return [parse_row(entry, f"{path}: row {index}") for index, entry in enumerate(entries)]


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` as a summary file, after checking each as a reader would."""
    entries = [dataclasses.asdict(row) for row in rows]
    for index, entry in enumerate(entries):
        parse_row(entry, f"{path}: row {index}")
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def collect(folder: Path = FOLDER) -> list[tuple[str, Row]]:
    """(benchmark, row) of every `<folder>/<benchmark>/summary.json`, in the order of the names."""
    return [(path.parent.name, row) for path in sorted(folder.glob("*/summary.json")) for row in read_summary(path)]


def table(rows: Sequence[tuple[str, Row]]) -> str:
    """All rows as one aligned text table."""
    cells = [[name, *_cells(row)] for name, row in rows]
    widths = [max(len(line[column]) for line in [HEADER, *cells]) for column in range(len(HEADER))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [HEADER, *cells]]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def page(rows: Sequence[tuple[str, Row]], overview: Sequence[str]) -> str:
    """Markdown: the overview, what does not reach its aim, and all rows, benchmark by benchmark."""
    names = list(dict.fromkeys(name for name, _ in rows))
    missed = [(name, row) for name, row in rows if not row.holds]
    aimed = [name for name, row in rows if row.aim != SHOWN]
    counts = [f"{name} {sum(n == name for n, _ in missed)} of {aimed.count(name)}" for name in names]
    lines = ["# Benchmarks", "", "Written by `python -m benchmarks.summary --markdown`.", ""]
    lines += ["## In a minute", "", *overview, ""] if overview else []
    lines += ["## What does not hold", "", f"Rows that miss their aim: {', '.join(counts)}.", ""]
    lines += [f"- {name}: {row.claim}: {_number(row.value)} {row.unit}, aim {_aim(row)}" for name, row in missed]
    for name in names:
        lines += ["", f"## {name}", "", _markdown_line(HEADER[1:]), _markdown_line(["---"] * len(HEADER[1:]))]
        for cells in (_cells(row) for n, row in rows if n == name):
            lines.append(_markdown_line([cell.replace("|", "\\|") for cell in [*cells[:-1], f"`{cells[-1]}`"]]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description="Every measured claim.")
    parser.add_argument("--markdown", action="store_true", help="print the page benchmarks/RESULTS.md")
    options = parser.parse_args(arguments)
    try:
        if options.markdown:
            from benchmarks.acceleration.page import overview  # which needs the package

            print(page(collect(), overview()))
        else:
            print(table(collect()))
    except SummaryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


_FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def _complaint(name: str, value: Any) -> str | None:
    """What field `name` should have been, or None where `value` is legal."""
    if name == "holds":
        return None if isinstance(value, bool) else "true or false"
    if name == "runs":
        legal = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return None if legal else "a whole number of at least 1"
    if name == "value":
        return None if _is_number(value) else "a finite number"
    if name in ("low", "high"):
        return None if value is None or _is_number(value) else "a finite number or null"
    if name == "aim" and _is_number(value):
        return None
    if not (isinstance(value, str) and (value.strip() or name == "unit")):
        return "a number or a text that is not empty" if name == "aim" else "a text that is not empty"
    if name == "date":
        try:
            datetime.date.fromisoformat(value)
        except ValueError:
            return "a date of the form YYYY-MM-DD"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cells(row: Row) -> list[str]:
    interval = "" if row.low is None and row.high is None else f"{_number(row.low)} to {_number(row.high)}"
    holds = "yes" if row.holds else "no"
    text = [row.claim, _number(row.value), interval, row.unit, _aim(row), holds, str(row.runs), row.device, row.date]
    return [*text, row.command]


def _aim(row: Row) -> str:
    return row.aim if isinstance(row.aim, str) else _number(row.aim)


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())

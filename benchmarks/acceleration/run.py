"""Does it accelerate, by how much, and which criterion is right?

    python -m benchmarks.acceleration.run [--part all|runs|ranking] [--quick] [--rows]

`summary.json` is written from all the result files that are there. The parts have more options of their own, for other
cases, seeds and arms: `python -m benchmarks.acceleration.<part> --help`; `python -m benchmarks.acceleration.tables`
prints the rows of a case and draws its figure.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.acceleration import ranking, runs, tables
from benchmarks.acceleration.cases import CASES
from benchmarks.parts import run_parts
from benchmarks.summary import Row

PARTS = ("runs", "ranking")


def rows_of(folder: Path) -> list[Row]:
    """Rows of all cases from the result files in `folder`."""
    made = []
    for case in CASES.values():
        made += tables.rows_of(case, runs.read_results(case.name, folder))
        made += ranking.rows_of(case, ranking.read_results(case.name, folder))
    return made


if __name__ == "__main__":
    sys.exit(run_parts("acceleration", PARTS, rows_of, "Equal-budget comparisons and short-horizon rankings."))

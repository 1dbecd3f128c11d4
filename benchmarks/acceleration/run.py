"""Does it accelerate, by how much, and which criterion is right?

    python -m benchmarks.acceleration.run [--part all|rates|runs|clock|ranking|keys|transfer] [--quick] [--rows]

`summary.json` is written from all the result files that are there. The parts have more options of their own, for other
cases, seeds and arms: `python -m benchmarks.acceleration.<part> --help`; `python -m benchmarks.acceleration.tables`
prints the rows of a case and draws its figure.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.acceleration import clock, keys, paper, ranking, rates, runs, tables, transfer
from benchmarks.acceleration.cases import CASES
from benchmarks.parts import run_parts
from benchmarks.summary import Row

PARTS = ("rates", "runs", "clock", "ranking", "keys", "transfer")


def rows_of(folder: Path) -> list[Row]:
    """Rows of all cases from the result files in `folder`."""
    made: list[Row] = []
    for case in CASES.values():
        made += tables.rows_of(case, runs.read_results(case.name, folder), clock.read_seconds(case.name, folder))
        made += paper.rows_of(case, runs.read_results(case.name, folder))
        made += rates.rows_of(case, rates.read_results(case.name, folder))
        made += ranking.rows_of(case, ranking.read_results(case.name, folder))
    made += paper.cost_rows(max(row.date for row in made)) if made else []
    return made + keys.rows_of(keys.read_results(folder)) + transfer.rows_of(transfer.read_results(folder))


if __name__ == "__main__":
    sys.exit(run_parts("acceleration", PARTS, rows_of, "Equal-budget comparisons and short-horizon rankings."))

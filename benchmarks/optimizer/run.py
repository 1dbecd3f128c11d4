"""Everything that is measured of the optimizer: speed and exactness, linear costs, schedules at three budgets.

    python -m benchmarks.optimizer.run [--part all|speed|costs|shift] [--quick] [--device cpu] [--rows]

A part measures what is missing from its file in `results/` and leaves the rest; `summary.json` is written from
all the result files that are there. `--quick` runs each part small, for a look, and writes no summary; `--rows`
measures nothing and only writes the summary anew. The parts have more options of their own:
`python -m benchmarks.optimizer.<part> --help`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.optimizer import costs, shift, speed
from benchmarks.parts import run_parts
from benchmarks.summary import Row

PARTS = ("speed", "costs", "shift")


def rows_of(folder: Path) -> list[Row]:
    """Rows of every part whose results lie in `folder`, in the order of PARTS."""
    rows: list[Row] = []
    for part, module in (("speed", speed), ("shift", shift)):
        path = folder / f"{part}.json"
        if path.exists():
            rows += module.rows(json.loads(path.read_text(encoding="utf-8")))
    return rows + [Row(**values) for values in costs.rows(folder)]


if __name__ == "__main__":
    sys.exit(
        run_parts(
            "optimizer",
            PARTS,
            rows_of,
            "Speed and exactness of the optimizer, linear costs, schedules at three budgets.",
        )
    )

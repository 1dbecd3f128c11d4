"""Everything that is measured of the optimizer: speed and exactness, linear costs, schedules at three budgets.

    python -m benchmarks.optimizer.run [--part all|speed|costs|shift] [--quick] [--device cpu] [--rows]

A part measures what is missing from its file in `results/` and leaves the rest; `summary.json` is written from
all the result files that are there. `--quick` runs each part small, for a look, and writes no summary; `--rows`
measures nothing and only writes the summary anew. The parts have more options of their own:
`python -m benchmarks.optimizer.<part> --help`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.optimizer import costs, shift, speed
from benchmarks.summary import Row, table, write_summary

FOLDER = Path(__file__).parent
PARTS = ("speed", "costs", "shift")


def rows_of(folder: Path) -> list[Row]:
    """Rows of every part whose results lie in `folder`, in the order of PARTS."""
    rows: list[Row] = []
    for part, module in (("speed", speed), ("shift", shift)):
        path = folder / f"{part}.json"
        if path.exists():
            rows += module.rows(json.loads(path.read_text(encoding="utf-8")))
    return rows + [Row(**values) for values in costs.rows(folder)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Speed and exactness of the optimizer, linear costs, schedules at three budgets."
    )
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small, for a look; writes no summary")
    parser.add_argument("--rows", action="store_true", help="measure nothing, write the summary from the results")
    options = parser.parse_args()
    if not options.rows:
        for part in PARTS if options.part == "all" else (options.part,):
            command = [sys.executable, "-m", f"benchmarks.optimizer.{part}", "--device", options.device]
            done = subprocess.run([*command, *(["--quick"] if options.quick else [])], check=False)
            if done.returncode:
                return done.returncode
    if not options.quick:
        rows = rows_of(FOLDER / "results")
        write_summary(FOLDER / "summary.json", rows)
        print(table([("optimizer", row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that is measured of the profiler: sample efficiency, overhead, speed of the per-sample path.

    python -m benchmarks.profile.run [--part all|efficiency|overhead|per_sample] [--quick] [--device cpu] [--rows]

A part measures what is missing from its file in `results/` and leaves the rest; `summary.json` is written from
all the result files that are there. `--quick` runs each part small, for a look, and writes no summary; `--rows`
measures nothing and only writes the summary anew. The parts have more options of their own:
`python -m benchmarks.profile.<part> --help`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.summary import Row, table, write_summary

FOLDER = Path(__file__).parent
PARTS = ("efficiency", "overhead", "per_sample")


def rows_of(folder: Path) -> list[Row]:
    """Rows of every part whose results lie in `folder`, in the order of PARTS."""
    rows: list[Row] = []
    for part in PARTS:
        path = folder / f"{part}.json"
        if path.exists():
            module = importlib.import_module(f"benchmarks.profile.{part}")
            rows += module.rows(json.loads(path.read_text(encoding="utf-8")))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Sample efficiency, overhead and speed of the profiler.")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small, for a look; writes no summary")
    parser.add_argument("--rows", action="store_true", help="measure nothing, write the summary from the results")
    options = parser.parse_args()
    if not options.rows:
        for part in PARTS if options.part == "all" else (options.part,):
            command = [sys.executable, "-m", f"benchmarks.profile.{part}", "--device", options.device]
            done = subprocess.run([*command, *(["--quick"] if options.quick else [])], check=False)
            if done.returncode:
                return done.returncode
    if not options.quick:
        rows = rows_of(FOLDER / "results")
        write_summary(FOLDER / "summary.json", rows)
        print(table([("profile", row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

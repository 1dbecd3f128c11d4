"""Everything that is measured of the profiler: sample efficiency, overhead, speed of the per-sample path.

    python -m benchmarks.profile.run [--part all|efficiency|overhead|per_sample] [--quick] [--device cpu] [--rows]

A part measures what is missing from its file in `results/` and leaves the rest; `summary.json` is written from
all the result files that are there. `--quick` runs each part small, for a look, and writes no summary; `--rows`
measures nothing and only writes the summary anew. The parts have more options of their own:
`python -m benchmarks.profile.<part> --help`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.parts import run_parts
from benchmarks.summary import Row

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


if __name__ == "__main__":
    sys.exit(run_parts("profile", PARTS, rows_of, "Sample efficiency, overhead and speed of the profiler."))

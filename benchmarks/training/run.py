"""Everything that is measured of the trainer: speed, throughput, input pipeline, kills, learning curves.

    python -m benchmarks.training.run [--part all|speed|throughput|pipeline|kill|curves] [--quick] [--rows]

A part measures what is missing from its file in `results/` and leaves the rest; `summary.json` is written from
all the result files that are there. The parts have more options of their own: `python -m benchmarks.training.<part>
--help`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.parts import run_parts
from benchmarks.summary import Row
from benchmarks.training import curves, kill, pipeline, speed, throughput

PARTS = ("speed", "throughput", "pipeline", "kill", "curves")


def rows_of(folder: Path) -> list[Row]:
    """Rows of every part whose results lie in `folder`."""
    return [row for part in (speed, throughput, pipeline, kill, curves) for row in part.rows(folder)]


if __name__ == "__main__":
    sys.exit(
        run_parts(
            "training",
            PARTS,
            rows_of,
            "The trainer's speed, throughput and memory, its input pipeline, kill -9, and learning curves.",
        )
    )

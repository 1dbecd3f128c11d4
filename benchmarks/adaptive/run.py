"""Everything that is measured of the online mode: regret in simulation, accuracy and overhead, how fair probes are.

    python -m benchmarks.adaptive.run [--part all|simulation|training|fairness] [--quick] [--rows]

`summary.json` is written from all the result files that are there. The parts have more options of their own:
`python -m benchmarks.adaptive.<part> --help`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.adaptive import fairness, simulation, training
from benchmarks.parts import run_parts
from benchmarks.summary import Row

PARTS = ("simulation", "training", "fairness")


def rows_of(folder: Path) -> list[Row]:
    """Rows of all parts; those of training from the result files in `folder`."""
    return [*simulation.rows(), *training.rows(folder), *fairness.rows()]


if __name__ == "__main__":
    sys.exit(run_parts("adaptive", PARTS, rows_of, "Regret in simulation, accuracy and overhead in training."))

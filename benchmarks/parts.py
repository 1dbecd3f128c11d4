"""A benchmark of several parts: run what is asked for, then write its summary from the result files."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.summary import Row, table, write_summary


def run_parts(name: str, parts: Sequence[str], rows_of: Callable[[Path], list[Row]], description: str) -> int:
    """The command line of `benchmarks.<name>.run`: each part is `benchmarks.<name>.<part>`. Returns the exit code.

    `rows_of` makes the summary's rows from the folder of result files; `--rows` measures nothing before it.
    """
    folder = Path(__file__).parent / name
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--part", choices=[*parts, "all"], default="all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small, for a look; writes no summary")
    parser.add_argument("--rows", action="store_true", help="measure nothing, write the summary from the results")
    options = parser.parse_args()
    if not options.rows:
        for part in parts if options.part == "all" else (options.part,):
            command = [sys.executable, "-m", f"benchmarks.{name}.{part}", "--device", options.device]
            done = subprocess.run([*command, *(["--quick"] if options.quick else [])], check=False)
            if done.returncode:
                return done.returncode
    if not options.quick:
        rows = rows_of(folder / "results")
        write_summary(folder / "summary.json", rows)
        print(table([(name, row) for row in rows]))
    return 0

"""The same seed makes the same: on one machine every number, wherever global state stands and hashes fall."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.gradscope.repeat_job import everything

ROOT = Path(__file__).parents[2]


def test_another_process_makes_the_same_to_the_bit(tmp_path: Path) -> None:
    """Trainings by all methods and online, a profile, a schedule with bootstrap and a report."""
    here = everything(tmp_path / "here", 1)
    done = subprocess.run(
        [sys.executable, "-m", "tests.gradscope.repeat_job", str(tmp_path / "there"), "2"],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "77"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    there = json.loads(done.stdout)
    assert len(set(here.values())) == len(here) == 7
    assert [name for name in here if here[name] != there[name]] == []

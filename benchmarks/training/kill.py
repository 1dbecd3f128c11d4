"""Kill -9 at random moments: does training resume, is every file readable, are the last parameters the same?

    python -m benchmarks.training.kill [--kills 20] [--method mocov3] [--quick]

One run goes through undisturbed. Another, of the same settings, is killed at random moments of its life (start-up,
steps, writing of one of its 21 checkpoints) and started again, until it has been killed as often as asked; after every
kill each checkpoint in its folder is opened. Then it is left to end. Results go to `results/kill-<method>.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope.checkpoints import list_checkpoints, list_steps, load_checkpoint
from gradscope.files import write_text
from gradscope.trainer import RESUME_FILE

FOLDER = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.training.kill"
POINTS = ",".join(f"{k / 20:g}" for k in range(21))


def command(out: Path, method: str, budget: str) -> list[str]:
    return [
        sys.executable, "-m", "gradscope", "train", "--method", method, "--budget", budget, "--schedule", "mixed", "-q",
        "--out", str(out), "--set", f"checkpoints=({POINTS})", "--set", "evaluations=()",
    ]  # fmt: skip


def try_kills(method: str, kills: int, budget: str, folder: Path, seed: int = 0) -> dict[str, Any]:
    """What came of it; see the text above."""
    begun = time.monotonic()
    subprocess.run(command(folder / "whole", method, budget), check=True)
    life, chance = time.monotonic() - begun, random.Random(seed)
    out, done, read, at = folder / "killed", 0, 0, []
    while done < kills:
        process = subprocess.Popen(command(out, method, budget))
        try:
            # most moments fall into a start-up and the first checkpoints after it, so that the run does not end early
            process.wait(timeout=chance.uniform(0.1, 0.35) * life)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
        else:  # it came to its end before it was killed enough: begin anew
            shutil.rmtree(out)
            continue
        for path in [*list_steps(out), out / RESUME_FILE]:
            if path.exists():
                load_checkpoint(path)  # raises where it cannot be read
                read += 1
        at.append(load_checkpoint(list_steps(out)[-1], mmap=True)["step"] if list_steps(out) else 0)
    subprocess.run(command(out, method, budget), check=True)
    ends = [load_checkpoint(list_checkpoints(run)[-1].path) for run in (folder / "whole", out)]
    equal = all(torch.equal(value, ends[1]["model"][name]) for name, value in ends[0]["model"].items())
    left = [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
    return {
        "method": method, "kills": done, "files_opened": read, "unreadable": 0, "steps": ends[0]["step"],
        "killed_after_checkpoint_at_step": at, "equal": equal, "leftovers": left,
    }  # fmt: skip


def rows(folder: Path = FOLDER) -> list[Row]:
    """Rows for `summary.json`: one a method."""
    made = []
    for path in sorted(folder.glob("kill-*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        claim = (
            f"{one['method']}: kill -9 at random moments, {one['files_opened']} checkpoints opened after them and none "
            "unreadable, last parameters bit for bit those of an undisturbed run"
        )
        made.append(
            Row(
                claim=claim,
                value=one["kills"],
                unit="kills",
                low=None,
                high=None,
                aim=20,
                holds=one["equal"] and one["kills"] >= 20,
                device=one["device"],
                date=one["date"],
                runs=1,
                command=f"{COMMAND} --method {one['method']}",
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", default="mocov3")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--device", default="cpu", help="cpu alone: bit-for-bit is promised there")
    parser.add_argument("--quick", action="store_true", help="three kills; writes nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills, budget = (3, "6K") if options.quick else (options.kills, "20K")
        found = try_kills(options.method, kills, budget, Path(folder))
    print(json.dumps(found, indent=1))
    if not options.quick:
        found |= {"device": device_text("cpu", torch.get_num_threads()), "date": str(datetime.date.today())}
        write_text(FOLDER / f"kill-{options.method}.json", json.dumps(found, indent=1) + "\n")
        print(table([("training", row) for row in rows()]))


if __name__ == "__main__":
    main()

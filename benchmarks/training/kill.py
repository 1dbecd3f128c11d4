"""Kill -9 at random moments: does training resume, is every file readable, are the last parameters the same?

    python -m benchmarks.training.kill [--kills 20] [--method mocov3] [--quick]

One run goes through undisturbed. Another, of the same settings, is killed at random moments of its life (start-up,
steps, writing of one of its 21 checkpoints) and started again, until it has been killed as often as asked; after every
kill each checkpoint in its folder is opened. Every run that comes to its end must end as the undisturbed one did, bit
for bit, or nothing is written. Results go to `results/kill-<method>.json`.
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
from gradscope.checkpoints import RESUME_FILE, list_checkpoints, list_steps, load_checkpoint
from gradscope.files import write_text

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
    whole = load_checkpoint(list_checkpoints(folder / "whole")[-1].path)
    out, done, opened, runs, at = folder / "killed", 0, 0, 0, []
    while done < kills:
        process = subprocess.Popen(command(out, method, budget))
        try:
            process.wait(timeout=chance.uniform(0.1, 0.35) * life)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
        else:  # it came to its end before it was killed often enough: the next kills are another run's
            runs += _same_end(whole, out)
            shutil.rmtree(out)
            continue
        for path in [*list_steps(out), out / RESUME_FILE]:
            if path.exists():
                load_checkpoint(path)  # raises where it cannot be read
                opened += 1
        at.append(load_checkpoint(list_steps(out)[-1], mmap=True)["step"] if list_steps(out) else 0)
    subprocess.run(command(out, method, budget), check=True)
    runs += _same_end(whole, out)
    return {
        "method": method, "kills": done, "runs": runs, "openings": opened, "steps": whole["step"],
        "last_checkpoint_at_each_kill": at,
    }  # fmt: skip


def _same_end(whole: dict[str, Any], out: Path) -> int:
    """1 where a run ended as the undisturbed one did: parameters, optimizer, all it spent, no leftovers.

    The state of torch's own random stream is not compared: each process begins with another, and no step draws from it.
    """
    end = load_checkpoint(list_checkpoints(out)[-1].path)
    for part in ("model", "optimizer", "step", "units", "samples", "data"):
        if not _equal(whole[part], end[part]):
            raise SystemExit(f"{out}: ended with another {part} than the undisturbed run")
    left = [path.name for path in out.iterdir() if path.name.endswith(".tmp")]
    if left:
        raise SystemExit(f"{out}: left {left}")
    return 1


def _equal(a: Any, b: Any) -> bool:
    """Equal values, bit for bit in tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def rows(folder: Path = FOLDER) -> list[Row]:
    """Rows for `summary.json`: one a method."""
    made = []
    for path in sorted(folder.glob("kill-*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        claim = (
            f"{one['method']}: kill -9 at random moments of {one['runs']} runs, checkpoints opened {one['openings']} "
            "times after them, all readable; every run ended with the parameters and the optimizer of an "
            "undisturbed one"
        )
        made.append(
            Row(
                claim=claim,
                value=one["kills"],
                unit="kills",
                low=None,
                high=None,
                aim=20,
                holds=one["kills"] >= 20,
                device=one["device"],
                date=one["date"],
                runs=one["runs"],
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

"""Train, profile, optimize and report, small, and print a digest of what each made: run by `test_determinism`."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

from gradscope import ProfileOptions, open_cube, profile, profile_of
from gradscope.checkpoints import list_checkpoints, load_checkpoint
from gradscope.cli.run_settings import make_schedule
from gradscope.cube import digest_of, groups_of
from gradscope.report import build_report
from gradscope.trainer import train
from schedulers import AdaptiveRule, Schedule, optimize
from tests.gradscope.small_methods import small_setting
from tests.gradscope.tasks_for_tests import LineTask, make_checkpoints

ONLINE = AdaptiveRule(overhead=0.4, minimum=3, maximum=4, sub_batch=8, dwell=0.0, exploration=0.3, confidence=0.0)


def digest(value: object) -> str:
    """Of nested values with tensors in them, in their own order, without seconds and the global random stream."""
    state = hashlib.sha256()

    def take(part: object) -> None:
        if isinstance(part, torch.Tensor):
            state.update(f"{part.dtype}{tuple(part.shape)}".encode() + part.contiguous().numpy().tobytes())
        elif isinstance(part, dict):
            for name in part:
                if "second" not in str(name) and name != "rng":
                    state.update(str(name).encode())
                    take(part[name])
        elif isinstance(part, list | tuple):
            for one in part:
                take(one)
        else:
            state.update(repr(part).encode())

    take(value)
    return state.hexdigest()[:16]


def trained(method: str, schedule: Schedule | AdaptiveRule, out: Path) -> str:
    """Train; the digest of the last checkpoint."""
    train(small_setting(method, budget=1500.0), schedule, out)
    content = load_checkpoint(list_checkpoints(out)[-1].path)
    return digest([{**content, "log": json.loads(content["log"])}])


def everything(folder: Path, disturbance: int) -> dict[str, str]:
    """What is made in `folder`, by name; the global random streams are somewhere else for every `disturbance`."""
    torch.manual_seed(disturbance)
    np.random.seed(disturbance)
    random.seed(disturbance)
    found = dict[str, str]()
    for method in ("mocov3", "simclr", "dino"):
        found[method] = trained(method, make_schedule("mixed", small_setting(method)), folder / method)
    found["online"] = trained("mocov3", ONLINE, folder / "online")
    cube = folder / "cube.nc"
    tree, _ = profile(LineTask(), make_checkpoints(folder / "line"), cube, options=ProfileOptions(samples=240, seed=5))
    groups = groups_of(open_cube(cube))
    assert groups is not None
    found["cube"] = digest_of(tree.to_dataset()) + digest_of(groups)
    plan = optimize(profile_of(tree.to_dataset()), 1e4, slices=20, draws=50)
    found["schedule"] = digest(plan.to_json())
    found["report"] = digest(
        build_report(cube=tree.to_dataset().assign_attrs(created_at="", history=""), schedule=plan)
    )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(everything(Path(sys.argv[1]), int(sys.argv[2]))))

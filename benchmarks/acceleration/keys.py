"""How MoCo-v3's keys should be compressed: equal-budget runs in which query and key have strategies of their own.

    python -m benchmarks.acceleration.keys [--seeds 0 1 2] [--budget 60K] [--device cpu] [--quick]

The paper drops tokens of queries only, and scales the patches of both (its tables 2a to 2c); VARIANTS has both choices
and what they were chosen over, on the model and data of the case `mocov3`. A unit counts both sequences as they are.
What is done lies in `build/acceleration/keys`; `results/keys-<seed>.json` keeps it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.acceleration.cases import CASES
from benchmarks.acceleration.runs import FOLDER, WORK
from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope.config import Setting, open_setting
from gradscope.engines import derive_seed
from gradscope.evaluation import dataset_features, knn_accuracy
from gradscope.files import write_text
from gradscope.methods import MoCoV3
from gradscope.methods.base import Views
from gradscope.stepper import Stepper
from schedulers import Strategy, format_count, parse_count, sequence_cost, token_counts

COMMAND = "python -m benchmarks.acceleration.keys"
VARIANTS = {
    "dropout 0.5 of queries": ("patch=2,dropout=0.5", "patch=2,dropout=0"),
    "dropout 0.5 of both": ("patch=2,dropout=0.5", "patch=2,dropout=0.5"),
    "patch 4 of both": ("patch=4,dropout=0", "patch=4,dropout=0"),
    "patch 4 of queries": ("patch=4,dropout=0", "patch=2,dropout=0"),
}
"""The strategies of query and key."""
CLAIMS = (
    ("dropping tokens of the queries only is better", "dropout 0.5 of queries", "dropout 0.5 of both"),
    ("the same patch on both sides is better", "patch 4 of both", "patch 4 of queries"),
)


class OwnKeys(MoCoV3):
    """MoCo-v3 whose keys have the strategy `key` at every step, and drop tokens as `generator` says."""

    key: Strategy
    generator: torch.Generator

    @torch.no_grad()
    def targets(self, views: Views, strategy: Strategy) -> Tensor:
        own, self.backbone = self.backbone, self.momentum_backbone
        try:
            key_BF: Tensor = self.momentum_projector(self.features(views[1], self.key, self.generator, None))
        finally:
            self.backbone = own
        return key_BF

    def cost(self, strategy: Strategy) -> float:
        query, key = (
            token_counts(self.backbone.image_size, self.backbone.patch, s, method=self.name).query
            for s in (strategy, self.key)
        )
        return sequence_cost(self.name, query=query, key=key, base=self.tokens(strategy).base)


def measure(setting: Setting, name: str, kept: Path, device: torch.device) -> dict[str, Any]:
    """Train one variant to its budget: units, samples and kNN accuracy on full-length sequences. Done once."""
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    config, model = setting.config, setting.new_model().to(device)
    query, key = (Strategy.parse(text) for text in VARIANTS[name])
    model.__class__ = OwnKeys  # the same parameters, in another class
    assert isinstance(model, OwnKeys)
    model.key, model.generator = key, torch.Generator().manual_seed(derive_seed("keys", config.seed))
    stepper = Stepper(setting, model, device=device)
    cost, step = config.batch_size * model.cost(query), 0
    while (step + 1) * cost <= config.budget:
        epoch, position = divmod(step, setting.steps_per_epoch)
        indices_B = setting.shuffled(epoch, config.seed)[position * config.batch_size :][: config.batch_size]
        generator = torch.Generator().manual_seed(derive_seed("views", config.seed, step))
        stepper.step(step, step * cost / config.budget, query, setting.views(indices_B, generator, device))
        step += 1
    data = setting.data
    train_ND, test_MD = (dataset_features(model.evaluated, data, part) for part in ("train", "test"))
    accuracy = float(knn_accuracy(train_ND, data.train_labels, test_MD, data.test_labels))  # type: ignore[attr-defined]
    found = {"units": round(step * cost), "samples": step * config.batch_size, "accuracy": accuracy}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_text(kept, json.dumps(found))
    return found


def read_results(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """What was measured, by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("keys-*.json")]
    return sorted(found, key=lambda one: one["seed"])


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows for `summary.json`: the advantage in accuracy of what the paper chose."""
    made = []
    for claim, chosen, other in CLAIMS if results else ():
        budget = format_count(results[0]["budget"])
        ahead = [found["runs"][chosen]["accuracy"] - found["runs"][other]["accuracy"] for found in results]
        means = [statistics.fmean(found["runs"][name]["accuracy"] for found in results) for name in (chosen, other)]
        made.append(
            Row(
                f"mocov3, the paper's finding that {claim}: kNN accuracy of {chosen} ({means[0]:.1%}) less that of "
                f"{other} ({means[1]:.1%}) after {budget} units",
                round(statistics.fmean(ahead), 4), "fraction", round(min(ahead), 4), round(max(ahead), 4),
                "above 0 in the mean", statistics.fmean(ahead) > 0, results[0]["device"], results[-1]["date"],
                len(ahead), COMMAND,
            )
        )  # fmt: skip
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=parse_count, default=60e3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="one seed, 2K units; writes nothing")
    options = parser.parse_args()
    work, model, device = WORK / "keys", CASES["mocov3"].model, torch.device(options.device)
    if options.quick:
        work, options.seeds, options.budget = WORK / "quick" / "keys", options.seeds[:1], 2e3
    done = []
    for seed in options.seeds:
        config = replace(model.config(options.budget), data=model.data, seed=seed)
        setting = open_setting(config)
        found: dict[str, Any] = {
            "seed": seed, "budget": options.budget, "device": device_text(options.device, torch.get_num_threads()),
            "date": str(datetime.date.today()), "runs": {},
        }  # fmt: skip
        for name in VARIANTS:
            kept = work / format_count(options.budget) / f"{name.replace(' ', '-')}-{seed}.json"
            found["runs"][name] = measure(setting, name, kept, device)
            print(f"seed {seed}, {name}: {found['runs'][name]}", flush=True)
        done.append(found)
        if not options.quick:
            write_text(FOLDER / f"keys-{seed}.json", json.dumps(found, indent=1) + "\n")
    print(table([("acceleration", row) for row in rows_of(done)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

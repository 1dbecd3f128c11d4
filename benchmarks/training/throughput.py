"""The trainer's unaccelerated step against a plain loop around a ViT of `transformers`, and the memory of both.

    python -m benchmarks.training.throughput [--device cuda] [--threads 1] [--clock processor] [--quick] [--again]

The plain loop is what one writes without this project: ViTModel as query encoder and a deep copy as key encoder,
MoCo-v3's heads, cross-entropy of the cosines, AdamW, a momentum update. Both do the same work on the same random
images, one step each in turn; ratios are taken within a round. Memory is the peak of a fresh process beyond what it
held before the first step (on a GPU: torch's peak). Results go to `results/throughput-<device>.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.summary import Row
from benchmarks.training.cases import (
    CLOCKS,
    FOLDER,
    Case,
    new_parser,
    new_setting,
    new_stepper,
    random_views,
    run_cases,
    synchronize,
)
from gradscope.methods import mlp_head
from gradscope.models import VIT_SIZES

COMMAND = "python -m benchmarks.training.throughput"
CASES = {
    "cpu": {
        "demo-28": Case("demo", 28, 2, 64, (), repeats=11),
        "tiny-240": Case("tiny", 240, 16, 32, (), repeats=5),
        "small-240": Case("small", 240, 16, 16, (), repeats=3),
    },
    "cuda": {
        "small-240": Case("small", 240, 16, 256, (), repeats=30, precision="bf16"),
        "base-240": Case("base", 240, 16, 256, (), repeats=30, precision="bf16"),
    },
}
QUICK = {"demo-28-quick": Case("demo", 28, 2, 16, (), repeats=3)}
Step = Callable[[], float]


def ours(case: Case, device: torch.device) -> Step:
    stepper, views = new_stepper(case, device), random_views(case, device)
    return lambda: stepper.step(0, 0.25, case.reference, views)[0]


def plain(case: Case, device: torch.device) -> Step:
    """The loop around `transformers`, in full."""
    from transformers import ViTConfig, ViTModel

    size, config = VIT_SIZES[case.model], new_setting(case).config
    heads = config.heads or size.heads
    vit = ViTModel(
        ViTConfig(
            hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=heads, image_size=case.image_size,
            intermediate_size=round(size.width * size.mlp_ratio), patch_size=case.patch, attn_implementation="sdpa",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    vit.embeddings.patch_embeddings.requires_grad_(False)  # as the recipe has it
    vit.embeddings.position_embeddings.requires_grad_(False)
    projector = mlp_head(size.width, layers=3, hidden=config.head_hidden, width_out=config.head_width)
    predictor = mlp_head(config.head_width, layers=2, hidden=config.head_hidden, width_out=config.head_width)
    online = nn.ModuleList([vit, projector]).to(device).train()
    predictor = predictor.to(device)
    slow = copy.deepcopy(online).requires_grad_(False)
    parameters = [p for p in (*online.parameters(), *predictor.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate(0.25), weight_decay=config.weight_decay, fused=device.type == "cuda" or None
    )
    views = random_views(case, device)
    labels = torch.arange(case.batch_size, device=device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16")

    def step() -> float:
        with torch.no_grad():
            for a, b in zip(slow.parameters(), online.parameters(), strict=True):
                a.lerp_(b, 0.01)
        with half:
            with torch.no_grad():
                keys = slow[1](slow[0](views[1]).last_hidden_state[:, 0])
            queries = predictor(online[1](online[0](views[0]).last_hidden_state[:, 0]))
        logits = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T / config.temperature
        loss = 2 * config.temperature * F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


SIDES: dict[str, Callable[[Case, torch.device], Step]] = {"gradscope": ours, "transformers": plain}


def measure(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of both sides, in turn, and the peak memory of each in a process of its own."""
    device, clock, threads = torch.device(options.device), options.clock, options.threads
    now, steps = CLOCKS[clock], {side: make(case, device) for side, make in SIDES.items()}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(case.repeats + 1):
        for side, step in steps.items():
            synchronize(device)
            begun = now()
            step()
            synchronize(device)
            seconds[side].append(now() - begun)
    ratios = [b / a for a, b in zip(seconds["gradscope"][1:], seconds["transformers"][1:], strict=True)]
    memory = {side: _peak_apart(side, name, device, threads) for side in SIDES}
    return {
        "title": case.title, "repeats": case.repeats, "clock": clock,
        "samples_per_second": {s: case.batch_size / float(np.median(t[1:])) for s, t in seconds.items()},
        "ratio": float(np.median(ratios)), "ratio_quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
        "peak_bytes": memory,
    }  # fmt: skip


def peak(side: str, case: Case, device: torch.device) -> int:
    """Bytes beyond those held before the first step, at the worst moment of three steps."""
    step = SIDES[side](case, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew (Linux)
        before = _resident("VmRSS")
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")) - before


def _resident(field: str) -> int:
    """Bytes of this process in memory now (VmRSS), or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _peak_apart(side: str, name: str, device: torch.device, threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.training.throughput", "--peak", side, "--cases", name]
    done = subprocess.run(
        [*command, "--device", str(device), "--threads", str(threads)], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def rows(folder: Path = FOLDER) -> list[Row]:
    """Rows for `summary.json`: throughput and memory over the plain loop's."""
    made = []
    for path in sorted(folder.glob("throughput-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        common = {"device": results["device"], "date": results["date"], "command": COMMAND}
        for case in results["cases"].values():
            speed, memory = case["samples_per_second"], case["peak_bytes"]
            low, high = case["ratio_quartiles"]
            made.append(
                Row(
                    claim=f"{case['title']}: unaccelerated samples/s over a plain loop around transformers "
                    f"({speed['gradscope']:.3g} against {speed['transformers']:.3g})",
                    value=case["ratio"],
                    unit="times",
                    low=low,
                    high=high,
                    aim="not below 1, by the upper quartile",
                    holds=high >= 1,
                    runs=case["repeats"],
                    **common,
                )
            )
            share = memory["gradscope"] / memory["transformers"]
            made.append(
                Row(
                    claim=f"{case['title']}: peak memory of a step over the plain loop's "
                    f"({memory['gradscope'] / 2**20:,.0f} against {memory['transformers'] / 2**20:,.0f} MiB)",
                    value=share,
                    unit="times",
                    low=None,
                    high=None,
                    aim="at most 1",
                    holds=share <= 1,
                    runs=1,
                    **common,
                )
            )
    return made


def main() -> None:
    parser = new_parser(__doc__.partition("\n")[0])
    parser.add_argument("--peak", choices=list(SIDES), help="print the peak memory of one side and stop")
    options = parser.parse_args()
    if options.peak:
        torch.set_num_threads(options.threads)
        device = torch.device(options.device)
        print(peak(options.peak, {**QUICK, **CASES[device.type]}[options.cases[0]], device))
        return
    run_cases("throughput", options, CASES, QUICK, measure, rows)


if __name__ == "__main__":
    main()

"""Per-sample gradient norms of a ViT: time and memory of the fast path beside those of other ways.

    python -m benchmarks.profile.per_sample [--device cpu] [--threads 2] [--clock wall|cpu] [--repeats 9] [--quick]

Every way yields the squared norms of the gradients of K loss terms and the sum of the gradients. Time: the ways
take turns, so that whatever else the machine does hits all alike, and each turn is divided by the plain forward
and backward pass of the same round; the median of the rounds with its quartiles. On a machine that is busy with other
things take `--clock cpu`, the processor time of one thread, which waiting does not lengthen. Memory: each in a
process of its own, the peak above the built model over that of the plain pass; the first call, which finds things
out, is included.

The model is one that all can take: linear patch embedding, constant positions, mean pooling, the bundled
transformer blocks (Opacus would treat one with a class token of its own as a single layer). Results are written
after every case; a case that is there with the same clock and threads is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import device_text
from benchmarks.summary import Row
from gradscope import Grid, Strategy, Task
from gradscope.engines.fast import FastPerSampleEngine, PerSampleStream
from gradscope.engines.flat import FlatParameters
from gradscope.estimators import Metrics
from gradscope.files import write_text
from gradscope.models import ViTSize
from gradscope.models.vit import Block

PATH = Path(__file__).parent / "results" / "per_sample.json"
COMMAND = "python -m benchmarks.profile.per_sample"
SHAPES = ((17, 64), (65, 32), (197, 16))  # tokens, batch
WIDTHS = {192: 3, 384: 6}  # width, heads
PATCH = 48
FAST = "fast path"
OTHERS = ("autograd loop", "vmap(grad)", "vmap(grad), chunks of 16", "Opacus hooks", "Opacus ghost norms")
EXTRAS = ("fast path, optimizer metric", "fast path, paired with a reference", "fast path, both")
Batch = tuple[Tensor, Tensor]
Result = tuple[Tensor, Tensor] | None  # squared norms (K), norm of the sum
Way = Callable[[], Result]


class Network(nn.Module):
    """Patches (B, T, 48) to logits."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        size = ViTSize(width, depth, heads)
        self.embed = nn.Linear(PATCH, width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, patches_BTK: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(patches_BTK))).mean(1))
        return logits


def losses_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Classify(Task):
    """The same loss as a task, with two strategies that are alike: the second is paired with the first."""

    grid = Grid({"again": (0, 1)}, Strategy(again=0))

    def load(self, checkpoint: Path) -> nn.Module:
        raise NotImplementedError

    def batches(self, size: int, seed: int) -> Iterator[Any]:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        return losses_of(model, batch).mean()

    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        return losses_of(model, batch)

    def cost(self, strategy: Strategy) -> float:
        return 3.0


def ways(model: Network, batch: Batch) -> dict[str, Callable[[], Way]]:
    """Every way by name, as a function that prepares it (a wrapped model, say) and returns the call to be timed."""
    parameters = list(model.parameters())

    def plain() -> Way:
        def call() -> Result:
            torch.autograd.grad(losses_of(model, batch).mean(), parameters)
            return None

        return call

    def loop() -> Way:
        def call() -> Result:
            squares, total = [], [torch.zeros_like(p) for p in parameters]
            for x, y in zip(*batch, strict=True):
                gradients = torch.autograd.grad(losses_of(model, (x[None], y[None])).sum(), parameters)
                squares.append(torch.stack([g.square().sum() for g in gradients]).sum())
                torch._foreach_add_(total, gradients)
            return torch.stack(squares), _norm(total)

        return call

    def mapped(chunk: int | None) -> Callable[[], Way]:
        def prepare() -> Way:
            named = {name: p.detach() for name, p in model.named_parameters()}

            def loss(named: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
                return F.cross_entropy(functional_call(model, named, (x[None],)), y[None])

            gradients_of = vmap(grad(loss), in_dims=(None, 0, 0))

            def call() -> Result:
                squares, total = [], [torch.zeros_like(p) for p in parameters]
                with sdpa_kernel(SDPBackend.MATH):
                    for x, y in zip(*(t.split(chunk or len(t)) for t in batch), strict=True):
                        found = list(gradients_of(named, x, y).values())
                        squares.append(torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0))
                        torch._foreach_add_(total, [g.sum(0) for g in found])
                return torch.cat(squares), _norm(total)

            return call

        return prepare

    def hooks() -> Way:
        from opacus.grad_sample import GradSampleModule

        wrapped = GradSampleModule(model, loss_reduction="mean")

        def call() -> Result:
            wrapped.zero_grad(set_to_none=True)
            losses_of(wrapped, batch).mean().backward()
            found = [p.grad_sample for p in parameters]
            squares = torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0)
            total = _norm([g.sum(0) for g in found])
            for p in parameters:
                p.grad_sample = None
            return squares, total

        return call

    def ghost() -> Way:
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

        wrapped = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="mean"
        )

        def call() -> Result:
            wrapped.zero_grad(set_to_none=True)
            losses_of(wrapped, batch).mean().backward()
            norms = wrapped.get_norm_sample()
            total = _norm([p.grad for p in parameters if p.grad is not None]) * len(norms)
            for p in parameters:
                del p._norm_sample
            return norms.square(), total

        return call

    def fast() -> Way:
        stream = PerSampleStream(model)

        def call() -> Result:
            found = stream(lambda batch: losses_of(model, batch), batch)
            return found.squares_K, _norm(list(found.sums.values()))

        return call

    def engine(weighted: bool, paired: bool) -> Callable[[], Way]:
        def prepare() -> Way:
            task = Classify()
            flat = FlatParameters.of(task, model)
            weights = {"euclidean": None, **({"optimizer": torch.rand(flat.layout.total)} if weighted else {})}
            engine = FastPerSampleEngine(task, model, flat, Metrics(weights))
            reference = engine.reference(batch, seed=0) if paired else None
            strategy = Strategy(again=1)

            def call() -> Result:
                if reference is not None:
                    engine.block(batch, strategy, seed=0, reference=reference)
                else:
                    engine._block(*engine._moments(batch, strategy, 0), strategy)
                return None

            return call

        return prepare

    return {
        "plain": plain,
        FAST: fast,
        "autograd loop": loop,
        "vmap(grad)": mapped(None),
        "vmap(grad), chunks of 16": mapped(16),
        "Opacus hooks": hooks,
        "Opacus ghost norms": ghost,
        EXTRAS[0]: engine(True, False),
        EXTRAS[1]: engine(False, True),
        EXTRAS[2]: engine(True, True),
    }


def make(width: int, depth: int, tokens: int, batch: int, device: str) -> tuple[Network, Batch]:
    torch.manual_seed(0)
    model = Network(width, WIDTHS[width], depth).to(device)
    x = torch.randn(batch, tokens, PATCH, device=device)
    return model, (x, torch.arange(batch, device=device) % 10)


def names_here() -> list[str]:
    opacus = importlib.util.find_spec("opacus") is not None
    return ["plain", FAST, *(n for n in OTHERS if opacus or not n.startswith("Opacus")), *EXTRAS]


def measure(width: int, depth: int, tokens: int, batch: int, device: str, repeats: int, clock: str) -> dict[str, Any]:
    """Times of all ways in turns, and whether their norms agree."""
    _, data = make(width, depth, tokens, batch, device)
    calls, found = {}, {}
    for name in names_here():
        model, _ = make(width, depth, tokens, batch, device)  # Opacus leaves its marks on a model
        calls[name] = ways(model, data)[name]()
        for _ in range(2):
            found[name] = calls[name]()
    now = time.process_time if clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            _synchronise(device)
            start = now()
            call()
            _synchronise(device)
            times[name].append(now() - start)
    truth = found["autograd loop"]
    assert truth is not None
    errors = {
        name: max(_error(squares, truth[0]), _error(total, truth[1]))
        for name, (squares, total) in ((n, r) for n, r in found.items() if r is not None)
    }
    return {"times": times, "errors": errors}


def memory(name: str, width: int, depth: int, tokens: int, batch: int, device: str) -> int:
    """Bytes at the peak of two calls above the built model; to be called in a fresh process."""
    model, data = make(width, depth, tokens, batch, device)
    small = make(width, 1, 3, 2, device)
    ways(*small)[name]()()  # libraries are imported and allocate on first use
    del small
    call = None
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    for _ in range(2):
        call = call or ways(model, data)[name]()
        call()
    return torch.cuda.max_memory_allocated() - before if device.startswith("cuda") else _status("VmHWM") - before


def run_case(width: int, depth: int, tokens: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    case = measure(width, depth, tokens, batch, options.device, options.repeats, options.clock)
    case["memory"] = {}
    for name in names_here():
        arguments = ["--memory", name, str(width), str(depth), str(tokens), str(batch)]
        settings = ["--device", options.device, "--threads", str(options.threads)]
        command = [sys.executable, "-m", "benchmarks.profile.per_sample", *arguments, *settings]
        # Memory that is freed goes back to the system, so that the peak is that of what is held.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
        found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        case["memory"][name] = int(found.stdout)
    return {
        "width": width,
        "depth": depth,
        "tokens": tokens,
        "batch": batch,
        "load": os.getloadavg()[0],
        "clock": options.clock,
        "threads": options.threads,
        "device": device_text(options.device, options.threads),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        **case,
    }


def ratios(case: Mapping[str, Any], name: str, over: str = "plain") -> tuple[float, float, float]:
    """Median and quartiles of the time over another way's in the same round."""
    values = [a / b for a, b in zip(case["times"][name], case["times"][over], strict=True)]
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high


def rows(results: Mapping[str, Any]) -> list[Row]:
    """The claims that the results bear, whether they hold or not."""
    found: list[Row] = []
    for case in results["cases"]:
        where = f"ViT width {case['width']}, depth {case['depth']}, {case['tokens']} tokens x {case['batch']}"
        command = COMMAND + (" --threads 1 --clock cpu" if case["clock"] == "cpu" else "")
        clock = ", processor time" if case["clock"] == "cpu" else ""
        shared = (case["device"], case["date"], len(case["times"]["plain"]), command)

        def add(claim: str, values: tuple[float | None, float, float | None], aim: str, holds: bool,
                unit: str = "x a plain pass", shared: Any = shared, where: str = where,
                clock: str = clock) -> None:  # fmt: skip
            low, middle, high = (None if v is None else float(f"{v:.4g}") for v in values)
            assert middle is not None
            timed = clock if claim.startswith("time") else ""
            found.append(Row(f"per-sample: {claim}, {where}{timed}", middle, unit, low, high, aim, holds, *shared))

        mine = ratios(case, FAST)
        add("time of norms and sum, fast path", mine, "at most 1.2", mine[1] <= 1.2)
        others = [name for name in OTHERS if name in case["times"]]
        best = min(others, key=lambda name: ratios(case, name)[1])
        against = ratios(case, FAST, best)
        add(
            f"time of the fast path over the best other way ({best})",
            against,
            "at most 1.05 (level or ahead)",
            against[1] <= 1.05,
            "ratio",
        )
        for name in others:
            add(f"time of norms and sum, {name}", ratios(case, name), "none; shown for comparison", True)
        for name in EXTRAS:
            add(f"time, {name}", ratios(case, name), "none; shown for comparison", True)
        plain = case["memory"]["plain"]
        peak = case["memory"][FAST] / plain
        add("peak memory, fast path", (None, peak, None), "at most 1.5", peak <= 1.5)
        for name in (*others, EXTRAS[2]):
            peak = case["memory"][name] / plain
            add(f"peak memory, {name}", (None, peak, None), "none; shown for comparison", True)
        error = case["errors"][FAST]
        add("error of norms and sum, fast path", (None, error, None), "at most 1e-5", error <= 1e-5, "relative")
    return found


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


def _error(found: Tensor, true: Tensor) -> float:
    return float(((found - true).abs() / true).max())


def _status(field: str) -> int:
    """Bytes of a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="Per-sample gradient norms: time and memory of several ways.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: with --threads 1 only")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one small case, two rounds; writes nothing")
    parser.add_argument(
        "--memory", nargs=5, metavar=("WAY", "WIDTH", "DEPTH", "TOKENS", "BATCH"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.clock == "cpu" and (options.threads != 1 or options.device != "cpu"):
        parser.error("--clock cpu measures one thread of the CPU: add --threads 1")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.memory:
        name, *shape = options.memory
        print(memory(name, *map(int, shape), options.device))
        return
    if options.quick:
        options.repeats = 2
        report(run_case(192, 1, 17, 8, options))
        return
    cuda = options.device.startswith("cuda")
    path = PATH.with_name("per_sample-cuda.json") if cuda else PATH
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": []}
    depth = 12 if cuda else 6
    for width in WIDTHS:
        for tokens, batch in SHAPES:
            key = [width, depth, tokens, batch, options.clock, options.threads]
            fields = ("width", "depth", "tokens", "batch", "clock", "threads")
            if any([case[field] for field in fields] == key for case in results["cases"]):
                continue
            results["cases"].append(run_case(width, depth, tokens, batch, options))
            write_text(path, json.dumps(results, indent=1) + "\n")
    for case in results["cases"]:
        report(case)


def report(case: Mapping[str, Any]) -> None:
    shape = f"width {case['width']}, depth {case['depth']}, {case['tokens']} tokens x {case['batch']}"
    print(f"{shape}, load {case['load']:.1f}")
    for name in case["times"]:
        low, middle, high = ratios(case, name)
        error = case["errors"].get(name)
        print(
            f"  {name:36} {middle:6.2f} ({low:.2f} to {high:.2f}) x time, "
            f"{case['memory'][name] / case['memory']['plain']:6.2f} x memory"
            + (f", error {error:.0e}" if error is not None else "")
        )


if __name__ == "__main__":
    main()

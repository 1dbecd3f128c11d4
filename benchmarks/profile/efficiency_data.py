"""Gradients of many sub-batches under every strategy of the paper's grid, and their exact inner products.

The bundled trainer makes a mixed and an unaccelerated run on Fashion-MNIST enlarged to 120 pixels with a base
patch of 8 pixels: patches of 8, 10, 12, 15, 20 and 24 pixels give the token grids of the paper (15, 12, 10, 8, 6
and 5 a side, as 16 ... 48 pixels of 240 do), dropouts are the paper's. At some checkpoints the gradient of each
of M sub-batches of K samples is taken under each strategy, all strategies on the same sub-batches, and kept on
disk as float16 with a scale of its own. From these come Gram matrices: inner products of all pairs of
sub-batches of one strategy, and of that strategy and the reference, exact and in the library's sketch. Every
estimator over every subset of sub-batches follows from them (`efficiency_study`).

Shapes: M sub-batch, C strategy, P parameter, W metric, G parameter group, S sketch entry.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gradscope.checkpoints import list_checkpoints
from gradscope.config import Setting, TrainConfig
from gradscope.data import load_data, mocov3_views
from gradscope.engines import FlatParameters, SubBatchEngine, derive_seed
from gradscope.estimators import Sketch, optimizer_weights
from gradscope.progress import Progress
from gradscope.task import Checkpoint
from gradscope.tasks import PretrainTask
from gradscope.trainer import train
from gradscope.untouched import untouched
from schedulers import Grid, constant_schedule, mixed_schedule, token_cost

IMAGE_SIZE, PATCH = 120, 8
PATCHES, DROPOUTS = (8, 10, 12, 15, 20, 24), (0.0, 0.25, 0.5, 0.75, 0.9)
POINTS = (0.1, 0.5, 0.9)  # early, middle, late
RUNS = {"mixed": 300e3, "none": 200e3}  # budget in units
BATCH = 64
METRICS = ("euclidean", "optimizer")
ROUND = 32  # sub-batches of one checkpoint before the next has its turn
SEED = 0


def new_config(budget: float) -> TrainConfig:
    """Configuration of a run."""
    return TrainConfig(
        budget=budget,
        patch=PATCH,
        patches=PATCHES,
        dropouts=DROPOUTS,
        batch_size=BATCH,
        checkpoints=POINTS,
        evaluations=(1.0,),
        seed=SEED,
    )


def new_grid(scale: int = 1) -> Grid:
    """The grid of strategies, six patch sizes by five dropouts; with `scale` 2 the paper's, in pixels of 240."""
    config = TrainConfig(
        budget=1.0, patch=scale * PATCH, patches=tuple(scale * patch for patch in PATCHES), dropouts=DROPOUTS
    )
    return config.grid(scale * IMAGE_SIZE)


def new_setting(budget: float) -> Setting:
    """Configuration and enlarged data of a run."""
    small = load_data("fashion-mnist-10k")

    def enlarged(images_NCHW: Tensor) -> Tensor:
        parts = [
            F.interpolate(part.float(), size=IMAGE_SIZE, mode="bilinear", align_corners=False).round().to(torch.uint8)
            for part in torch.split(images_NCHW, 1000)
        ]
        return torch.cat(parts)

    data = dataclasses.replace(
        small, train_images=enlarged(small.train_images), test_images=enlarged(small.test_images)
    )
    return Setting(new_config(budget), data, mocov3_views(IMAGE_SIZE, data.mean, data.std, 1))


def make_run(name: str, work: Path, device: torch.device) -> Path:
    """Train (or finish) the run and return the folder of its checkpoints."""
    setting = new_setting(RUNS[name])
    config = setting.config
    strategies = config.grid(IMAGE_SIZE).strategies()
    costs = [token_cost(config.method, IMAGE_SIZE, PATCH, strategy) for strategy in strategies]
    schedule = (
        mixed_schedule(strategies, costs)
        if name == "mixed"
        else constant_schedule(config.reference, token_cost(config.method, IMAGE_SIZE, PATCH, config.reference))
    )
    with Progress(f"run {name}") as progress:
        train(setting, schedule, work / name, device=device, report=progress.update)
    return work / name


@dataclasses.dataclass
class Collection:
    """The gradients of one checkpoint on disk: float16 (M, C, P) with scales (M, C), grown sub-batch by sub-batch."""

    folder: Path
    capacity: int
    strategies: int
    parameters: int

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, shape = self.folder / "gradients.f16", (self.capacity, self.strategies, self.parameters)
        size = 2 * self.capacity * self.strategies * self.parameters
        if not path.exists() or path.stat().st_size < size:
            with path.open("ab") as stream:
                stream.truncate(size)
        self.values_MCP = np.memmap(path, np.float16, "r+", shape=shape)
        self.scales_MC: NDArray[np.float64] = np.zeros((self.capacity, self.strategies))
        self.count = 0
        state = self.folder / "scales.npy"
        if state.exists():
            known = np.load(state)
            self.count = min(len(known), self.capacity)
            self.scales_MC[: self.count] = known[: self.count]

    def add(self, gradients_CP: Tensor) -> None:
        """One more sub-batch; the scales are written after the gradients, so that a broken-off run resumes."""
        scale_C = gradients_CP.abs().amax(1).clamp(min=1e-30) / 1024
        self.values_MCP[self.count] = (gradients_CP / scale_C[:, None]).half().numpy()
        self.scales_MC[self.count] = scale_C.double().numpy()
        self.count += 1

    def save(self) -> None:
        self.values_MCP.flush()
        np.save(self.folder / "new.npy", self.scales_MC[: self.count])
        (self.folder / "new.npy").rename(self.folder / "scales.npy")

    def of(self, c: int, count: int) -> Tensor:
        """Float32 (count, P): the first gradients of strategy c."""
        values = torch.from_numpy(self.values_MCP[:count, c].astype(np.float32))
        return values * torch.from_numpy(self.scales_MC[:count, c].astype(np.float32))[:, None]


def chosen_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoint nearest to each of POINTS."""
    known = list_checkpoints(folder)
    return [min(known, key=lambda checkpoint: abs(checkpoint.progress - point)) for point in POINTS]


def collect(folder: Path, replicates: int) -> None:
    """Take gradients at the chosen checkpoints in turns until each has `replicates` sub-batches; resumes."""
    task = PretrainTask(new_setting(RUNS[folder.name]))
    strategies = task.grid.strategies()
    places = []
    for checkpoint in chosen_checkpoints(folder):
        model = task.load(checkpoint.path)
        parameters = FlatParameters.of(task, model)
        kept = Collection(gradient_folder(checkpoint), replicates, len(strategies), parameters.layout.total)
        batches = task.sub_batches(BATCH, SEED, first=kept.count)
        places.append((checkpoint, model, SubBatchEngine(task, model, parameters), batches, kept))
    total = len(places) * replicates
    with Progress(f"gradients of {folder.name}") as progress:
        while any(kept.count < replicates for *_, kept in places):
            for checkpoint, model, engine, batches, kept in places:
                with untouched(model):
                    for m in range(kept.count, min(kept.count + ROUND, replicates)):
                        batch = next(batches)
                        gradients = [
                            engine.gradient(batch, s, seed=derive_seed(SEED, checkpoint.step, m, s)) for s in strategies
                        ]
                        kept.add(torch.stack(gradients))
                        progress.update(sum(done.count for *_, done in places) / total, checkpoint.path.name)
                kept.save()


def gradient_folder(checkpoint: Checkpoint) -> Path:
    """Where the gradients of a checkpoint lie, beside it."""
    return checkpoint.path.with_suffix(".gradients")


def grams(task: PretrainTask, checkpoint: Checkpoint, kept: Collection, count: int) -> dict[str, Any]:
    """Inner products of the first `count` sub-batches of every strategy g with themselves and the reference's z.

    Returns float32 arrays (W, C, M, M): `gg` and `gz` exact, `sketch_gg` and `sketch_gz` in the library's sketch
    (of all parameter groups together), in the metrics METRICS.
    """
    model = task.load(checkpoint.path)
    parameters = FlatParameters.of(task, model)
    moment = task.second_moment(checkpoint.path, model)
    if moment is None:
        raise ValueError(f"{checkpoint.path}: has no second moment; choose a later checkpoint")
    roots = (torch.tensor(1.0), optimizer_weights(parameters.flatten(dict(moment))).sqrt())
    sketch = Sketch(parameters.layout, seed=derive_seed("sketch", SEED), device=torch.device("cpu"))
    strategies = task.grid.strategies()
    z_MP = kept.of(strategies.index(task.grid.reference), count)
    names = ("gg", "gz", "sketch_gg", "sketch_gz")
    found = {name: np.empty((len(METRICS), len(strategies), count, count), np.float32) for name in names}
    for w, root_P in enumerate(roots):
        weighted_z_MP = z_MP * root_P
        sketch_z_MS = torch.stack([sketch(row_P).flatten() for row_P in weighted_z_MP])
        for c in range(len(strategies)):
            g_MP = kept.of(c, count).mul_(root_P)
            sketch_g_MS = torch.stack([sketch(row_P).flatten() for row_P in g_MP])
            products = (g_MP @ g_MP.T, g_MP @ weighted_z_MP.T, sketch_g_MS @ sketch_g_MS.T, sketch_g_MS @ sketch_z_MS.T)
            for name, product in zip(names, products, strict=True):
                found[name][w, c] = product.numpy()
    return found

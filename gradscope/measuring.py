"""The cells of one checkpoint: all strategies side by side on the same sub-batches.

Sub-batch by sub-batch the reference's terms are computed once and every strategy is paired with them. At
every look the estimates of the strategies that are still measured are made, and a rule says which go on.
A cell's number is a function of checkpoint, strategy, seed, K and number of sub-batches alone: neither the
other strategies, nor their order, nor the number of ranks (up to the order of summation) enter it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradscope.checks import reason
from gradscope.engines import Engine, FlatParameters, SubBatchEngine, choose_engine, derive_seed
from gradscope.errors import GradscopeError, Interrupted, NonFiniteError, RankError, TaskError
from gradscope.estimators import (
    EUCLIDEAN,
    Estimates,
    GradientStream,
    Metrics,
    Sketch,
    estimate,
    optimizer_weights,
    second_moment_from,
)
from gradscope.ranks import ALONE, Ranks
from gradscope.task import Checkpoint, Task
from gradscope.untouched import untouched
from schedulers import Strategy

SECOND_MOMENT_REPLICATES = 4
DEVICE_SHARE = 0.5  # of the free device memory that the sums of all strategies may take before they are kept off it


@dataclass(frozen=True)
class Conditions:
    """What fixes a cell's number besides checkpoint, strategy and the number of sub-batches."""

    batch_size: int
    seed: int
    metrics: tuple[str, ...]
    estimator: str = "subbatch"
    precision: str = "float32"


@dataclass
class Look:
    """What is known after `blocks` sub-batches: estimates of the strategies measured so far, and why others failed.

    `reference`: the reference's, which is measured in any case, as all are paired with it. On ranks other than the
    first `found` is empty and `reference` None. Whoever looks may shorten `active`; those taken out are not measured
    further.
    """

    blocks: int
    found: dict[Strategy, Estimates]
    failures: dict[Strategy, str]
    active: list[Strategy]
    reference: Estimates | None = None


Looks = Generator[Look, None, None]


@dataclass
class CheckpointMeasurement:
    """Measures strategies at one checkpoint.

    `units` counts what this rank has spent, `units_elsewhere` what the others had at the last look. With `tolerant`
    nothing that a rank does by itself is raised there: it is told at the next look as the reason why all failed, on
    all ranks alike, so that none is left waiting for another.
    """

    task: Task
    checkpoint: Checkpoint
    model: nn.Module
    conditions: Conditions
    ranks: Ranks = ALONE
    accumulators: str = "auto"
    units: float = 0.0
    units_elsewhere: float = 0.0
    engine: Engine | None = None
    engine_reason: str = ""
    groups: tuple[str, ...] = ()
    tolerant: bool = False
    _failures: dict[Strategy, str] = field(default_factory=dict)
    _size: int = 0

    def run(self, strategies: Sequence[Strategy], looks: Sequence[int], step: Callable[[int], None]) -> Looks:
        """Measure `strategies`, stopping after each number of sub-batches in `looks` to yield a Look.

        `step(m)` is called before each sub-batch, on every rank equally often. The model is left untouched.
        Raises TaskError when the task breaks its contract, and what `step` raises.
        """
        with untouched(self.model):
            yield from self._run(list(strategies), looks, step)

    def _run(self, active: list[Strategy], looks: Sequence[int], step: Callable[[int], None]) -> Looks:
        task, ranks, size = self.task, self.ranks, self.conditions.batch_size
        parameters = FlatParameters.of(task, self.model)
        self.groups = parameters.layout.names
        broken, streams = "", dict[Strategy, GradientStream]()
        try:
            engine = self._open_engine(parameters)
            if self.tolerant:
                streams = self._streams(engine, parameters, active)
        except Exception as error:
            broken, engine = self._failure(error), None
        self._check_same_engine(engine)
        if engine is not None and not streams:
            streams = self._streams(engine, parameters, active)
        batches = task.sub_batches(size, self.conditions.seed, ranks.rank, ranks.size)
        done, term_samples = 0, size if isinstance(engine, SubBatchEngine) else 1
        for look in looks:
            for row in range(done // ranks.size, -(-look // ranks.size)):
                m = row * ranks.size + ranks.rank
                step(m)
                if not done <= m < look or broken or engine is None:
                    continue
                try:
                    batch = next(batches, None)
                    if batch is None:
                        raise TaskError(
                            f"batches(size={size}) ended before {look} sub-batches; ask for fewer samples or make it "
                            "endless"
                        )
                    broken = self._sub_batch(m, batch, engine, streams, active)
                except Exception as error:
                    if not self._tolerates(error):
                        raise
                    broken = reason(error)
            done = look
            gathered = ranks.gather((broken, dict(self._failures), self.units))
            broken = next((text for text, _, _ in gathered if text), "")
            failures = {s: text for _, failed, _ in reversed(gathered) for s, text in failed.items() if s in active}
            self.units_elsewhere = sum(units for _, _, units in gathered) - self.units
            if broken or engine is None:
                failures = {s: f"reference: {broken}" for s in active}
            active = [s for s in active if s not in failures]
            home = self.task.grid.reference
            wanted = list(dict.fromkeys([*active, home])) if engine is not None and active else []
            every = self._estimates(streams, wanted, term_samples) if wanted else {}
            found = {s: every[s] for s in active if s in every}
            seen = Look(look, found, failures, active, every.get(home))
            yield seen
            active = ranks.gather(seen.active)[0]
            if not active:
                return

    def _tolerates(self, error: Exception) -> bool:
        return self.tolerant and not isinstance(error, Interrupted | RankError)

    def _failure(self, error: Exception) -> str:
        if isinstance(error, Interrupted | RankError):
            raise error
        return reason(error) if self.tolerant else failure(error)

    def _sub_batch(
        self,
        m: int,
        batch: object,
        engine: Engine,
        streams: dict[Strategy, GradientStream],
        active: Sequence[Strategy],
    ) -> str:
        """Add sub-batch m to every stream; returns why the reference failed, or nothing."""
        reference, shared = self.task.grid.reference, set[str]()
        self._check_size(batch)
        try:
            z = engine.reference(batch, seed=self._seed(m, reference))
            streams[reference].add(m, z.block, z.block)
        except Exception as error:
            return self._failure(error)
        self._spend(reference, shared)
        for strategy in active:
            if strategy == reference or strategy in self._failures:
                continue
            try:
                block = engine.block(batch, strategy, seed=self._seed(m, strategy), reference=z)
                streams[strategy].add(m, block, z.block)
            except Exception as error:
                self._failures[strategy] = self._failure(error)
                continue
            self._spend(strategy, shared)
        return ""

    def _check_size(self, batch: object) -> None:
        """Raise TaskError for a sub-batch that is shorter than those before it (a loader's last one)."""
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
        size = len(leaves[0]) if leaves else 0
        self._size = self._size or size
        if size != self._size:
            raise TaskError(
                f"batches(size={self.conditions.batch_size}) gave sub-batches of {self._size} and then of {size} rows; "
                "leave out a short last one"
            )

    def _streams(
        self, engine: Engine, parameters: FlatParameters, active: Sequence[Strategy]
    ) -> dict[Strategy, GradientStream]:
        strategies = dict.fromkeys([self.task.grid.reference, *active])
        device = accumulator_device(parameters, len(strategies), self.accumulators)
        metrics: Metrics = engine.metrics
        sketch = Sketch(parameters.layout, seed=derive_seed("sketch", self.conditions.seed), device=parameters.device)
        return {
            s: GradientStream.empty(
                parameters.layout,
                metrics,
                sketch,
                torch.zeros(parameters.layout.total, dtype=torch.float64, device=device),
            )
            for s in strategies
        }

    def _estimates(
        self, streams: dict[Strategy, GradientStream], active: Sequence[Strategy], term_samples: int
    ) -> dict[Strategy, Estimates]:
        """Estimates on the first rank from the streams of all ranks; nothing on the others."""
        reference = self.task.grid.reference
        z = self._joined(streams[reference])
        found = {}
        for strategy in active:
            stream = z if strategy == reference else self._joined(streams[strategy])
            if self.ranks.first:
                try:
                    found[strategy] = estimate(
                        stream, z, term_samples=term_samples, independent=self.task.independent_terms
                    )
                except Exception as error:
                    if not self._tolerates(error):
                        raise
        return found

    def _joined(self, stream: GradientStream) -> GradientStream:
        if self.ranks.size == 1:
            return stream
        records = {m: record for part in self.ranks.collect(stream.records) for m, record in part.items()}
        total_P = self.ranks.total(stream.sum_P)
        return GradientStream(stream.layout, stream.metrics, stream.sketch, total_P, records)

    def _open_engine(self, parameters: FlatParameters) -> Engine:
        """The engine with its metrics' weights, chosen on a sub-batch of its own where there is a choice."""
        task, model, given = self.task, self.model, self.conditions
        plain = SubBatchEngine(task, model, parameters, EUCLIDEAN, given.precision)
        metrics = self._metrics(plain, parameters)
        seed = derive_seed("engine", given.seed)
        choice = given.estimator != "subbatch"
        batch = next(iter(task.batches(given.batch_size, seed % 2**31)), None) if choice else None
        self.engine, self.engine_reason = choose_engine(
            task, model, parameters, metrics,
            estimator=given.estimator, precision=given.precision, batch=batch, seed=seed,
        )  # fmt: skip
        return self.engine

    def _check_same_engine(self, engine: Engine | None) -> None:
        """Raise TaskError on all ranks unless those that have an engine have the same one."""
        names = {name for name in self.ranks.gather(engine.name if engine else "") if name}
        if len(names) > 1:
            chosen = " and ".join(sorted(names))
            raise TaskError(f"the ranks chose different engines, {chosen}; choose one with --estimator")

    def _metrics(self, engine: SubBatchEngine, parameters: FlatParameters) -> Metrics:
        """Each metric's weights; Adam's second moment is the checkpoint's, else estimated from a few sub-batches."""
        weights: dict[str, Tensor | None] = {}
        for name in self.conditions.metrics:
            if name == "euclidean":
                weights[name] = None
                continue
            known = self.task.second_moment(self.checkpoint.path, self.model)
            if known is None:
                # other sub-batches than those of the estimates, which would otherwise not be unbiased
                seed = derive_seed("metric", self.conditions.seed) % 2**31
                batches = self.task.batches(self.conditions.batch_size, seed)
                first = []
                for m, batch in zip(range(SECOND_MOMENT_REPLICATES), batches, strict=False):
                    first.append(
                        engine.gradient(
                            batch, self.task.grid.reference, seed=self._seed(-1 - m, self.task.grid.reference)
                        )
                    )
                    self._spend(self.task.grid.reference, set())
                second_P = second_moment_from(first, parameters.layout)
            else:
                missing = [n for n in parameters.names if n not in known]
                if missing:
                    raise TaskError(f"second_moment gives nothing for parameter {missing[0]!r}")
                wrong = [n for n in parameters.names if not (torch.isfinite(known[n]) & (known[n] >= 0)).all()]
                if wrong:
                    raise NonFiniteError(f"the second moment of parameter {wrong[0]!r} is not finite, or negative")
                second_P = parameters.flatten(known)
            weights[name] = optimizer_weights(second_P).to(parameters.dtype)
        return Metrics(weights)

    def _seed(self, m: int, strategy: Strategy) -> int:
        return derive_seed(self.conditions.seed, self.checkpoint.step, m, strategy)

    def _spend(self, strategy: Strategy, shared: set[str]) -> None:
        self.units += self.conditions.batch_size * unshared_cost(self.task, strategy, shared)


def failure(error: Exception) -> str:
    """Why a cell failed, in one line; errors that the user has to mend in the task are raised instead."""
    if isinstance(error, GradscopeError) and not isinstance(error, NonFiniteError):
        raise error
    return reason(error)


def unshared_cost(task: Task, strategy: Strategy, shared: set[str]) -> float:
    """Units per sample of a strategy less what earlier strategies of the sub-batch have paid; adds to `shared`."""
    parts = task.shared_costs(strategy)
    known = shared & parts.keys()
    shared.update(parts)
    return task.cost(strategy) - sum(parts[key] for key in known)


def accumulator_device(parameters: FlatParameters, strategies: int, choice: str = "auto") -> torch.device:
    """Where the sums of all strategies are kept: `device`, `cpu`, or `auto`: the device when they fit half of it."""
    device = parameters.device
    if choice == "cpu" or device.type != "cuda":
        return torch.device("cpu") if choice == "cpu" else device
    wanted = strategies * parameters.layout.total * torch.float64.itemsize
    free, _ = torch.cuda.mem_get_info(device)
    return device if choice == "device" or wanted <= DEVICE_SHARE * free else torch.device("cpu")

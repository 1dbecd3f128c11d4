"""The settings of the online policy, and what it answers with."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass, field
from typing import Any

from schedulers.criteria import get_criterion
from schedulers.errors import UsageError
from schedulers.strategy import Strategy

METRICS = ("optimizer", "euclidean")


@dataclass(frozen=True)
class AdaptiveRule:
    """How the online policy measures, explores and decides. All fractions and shares are of the budget.

    - `criterion` and `metric`: what strategies are compared by (design §4).
    - `overhead`: hard cap on what probes cost; 0: no probes, the candidates stay mixed.
    - `exploration`: share that is spread evenly over all candidates, in real training steps. `mix`: the stretch before
      a probe in which all candidates are mixed, at most a tenth of the way from the probe before.
    - `start`: where the first probe may come; before it all candidates are mixed. `finish`: the last part, which runs
      on the reference; 0: none.
    - `half_life`: after which a measurement weighs half.
    - `confidence`: standard errors by which an advantage must exceed `tolerance`, a share of the present score, to be
      worth a switch (the first choice needs only the latter); `dwell`: least distance between two switches;
      `monotone`: never to a cheaper strategy.
    - `minimum` and `maximum`: sub-batches of a probe; `sub_batch`: samples of one, 0: those of an optimizer step.
    - `frozen`: measure, but never decide: the candidates stay mixed throughout.

    Raises UsageError, naming the field, for values out of range.
    """

    criterion: str = "descent"
    metric: str = "optimizer"
    overhead: float = 0.03
    exploration: float = 0.05
    mix: float = 0.01
    start: float = 0.05
    finish: float = 0.1
    half_life: float = 0.1
    confidence: float = 1.0
    tolerance: float = 0.02
    dwell: float = 0.05
    monotone: bool = False
    minimum: int = 4
    maximum: int = 32
    sub_batch: int = 0
    frozen: bool = False

    def __post_init__(self) -> None:
        get_criterion(self.criterion)
        for field_ in dataclasses.fields(self):
            value, kind = getattr(self, field_.name), type(field_.default)
            number = numbers.Integral if kind is int else numbers.Real
            if kind in (int, float) and (isinstance(value, bool) or not isinstance(value, number)):
                what = "a whole number" if kind is int else "a number"
                raise UsageError(f"{field_.name}={value!r} is not {what}")
        if self.metric not in METRICS:
            raise UsageError(f"metric={self.metric!r}: use one of {', '.join(METRICS)}")
        for name in ("overhead", "exploration", "mix", "start", "finish", "dwell"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r} is not a share of the budget in [0, 1)")
        for name in ("confidence", "tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)!r} must be a number of at least 0")
        if not 0 < self.half_life < math.inf:
            raise UsageError(f"half_life={self.half_life!r} must be a positive share of the budget")
        if self.start + self.finish > 1:
            raise UsageError(f"start={self.start} and finish={self.finish} leave nothing of the budget between them")
        if self.sub_batch < 0:
            raise UsageError(f"sub_batch={self.sub_batch} must be a number of samples, or 0 for those of a step")
        if not 3 <= self.minimum <= self.maximum:
            raise UsageError(
                f"minimum={self.minimum} and maximum={self.maximum} sub-batches: standard errors need at least 3, "
                "and the minimum may not exceed the maximum"
            )

    @classmethod
    def parse(cls, text: str) -> AdaptiveRule:
        """Read `name=value,name=value`; an empty text is the default. Raises UsageError naming what is wrong."""
        types = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for piece in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = (part.strip() for part in piece.partition("="))
            if not equals and name in types:
                raise UsageError(f"online: {name} needs a value, as in {name}={getattr(cls, name)!r}")
            if not equals or name not in types:
                raise UsageError(f"online: {piece!r} is not one of its settings, {', '.join(types)}, as name=value")
            if name in values:
                raise UsageError(f"online: {name} is given twice")
            values[name] = _read(name, value, types[name])
        return cls(**values)

    def __str__(self) -> str:
        """What differs from the default, as `parse` reads it."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in changed)


def _read(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"online: {name}={text!r} is neither true nor false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        kinds = "a whole number" if kind is int else "a number"
        raise UsageError(f"online: {name}={text!r} is not {kinds}") from None


@dataclass(frozen=True)
class ProbePlan:
    """A probe that is due: what to measure, on at most how many sub-batches, and the most units that it may cost."""

    strategies: tuple[Strategy, ...]
    sub_batches: int
    units: float


@dataclass(frozen=True)
class Decision:
    """From optimizer step `step` on, at `fraction` of the budget: `strategy`, or all `candidates` mixed (None).

    `why`: start, first, switch, mix (before a probe), resume (after it), finish, or what happened to the candidates.
    """

    step: int
    fraction: float
    strategy: Strategy | None
    candidates: tuple[Strategy, ...]
    exploration: float
    why: str


@dataclass(frozen=True)
class Verdict:
    """What a probe led to: the best strategy by all that is known and its advantage, and whether it was switched to.

    `advantage`: its worth (the score, its sign such that larger is better) less that of what ran before (of the mixture
    of all candidates where nothing was chosen yet), and `standard_error` of it; None where nothing can be said.
    `scores`: score of every strategy, as pooled over probes; `errors`: one standard error of each; `effective`: the
    effective number of sub-batches behind it.
    """

    best: Strategy | None
    advantage: float | None
    standard_error: float | None
    switched: bool
    scores: dict[Strategy, float]
    errors: dict[Strategy, float] = field(default_factory=dict)
    effective: dict[Strategy, float] = field(default_factory=dict)

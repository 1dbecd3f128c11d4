"""Learning-rate decay over the budget: a stateless factor of the spent fraction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from schedulers.errors import UsageError

DECAY_KINDS = ("cosine", "polynomial", "constant")


@dataclass(frozen=True)
class Decay:
    """Factor on the base learning rate at a fraction of the budget, after a linear warm-up from 0.

    With t = (fraction − warmup) / (1 − warmup): cosine (1 + cos πt) / 2; polynomial 1 − t^alpha;
    constant 1. The paper's "polynomial (alpha = 2)" (Sec. 6.1, Fig. 6) keeps the rate high late in
    training, which 1 − t² does (0.44 at t = .75 against cosine's 0.15) and (1 − t)² does not (0.06).

    `warmup` is a fraction of the budget in [0, 1); `alpha` > 0 matters to polynomial alone. It has no
    state: a loop sets base_lr · factor(spent / budget) before each step.

    >>> decay = Decay("cosine", warmup=0.1)
    >>> [round(0.3 * decay.factor(spent / 1000), 3) for spent in (0, 50, 100, 550, 1000)]
    [0.0, 0.15, 0.3, 0.15, 0.0]
    """

    kind: str = "polynomial"
    alpha: float = 2.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in DECAY_KINDS:
            raise UsageError(f"decay kind {self.kind!r} is not one of {', '.join(DECAY_KINDS)}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"decay alpha={self.alpha!r} must be a positive number")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"decay warmup={self.warmup!r} is not a fraction of the budget in [0, 1)")

    def factor(self, fraction: float) -> float:
        """Factor in [0, 1] at `fraction` of the budget spent; past 1 the value at 1.

        Raises UsageError for a fraction that is negative or NaN.
        """
        if not fraction >= 0:
            raise UsageError(f"fraction={fraction!r} of the budget must be at least 0")
        if fraction < self.warmup:
            return fraction / self.warmup
        t = min((fraction - self.warmup) / (1 - self.warmup), 1.0)
        if self.kind == "cosine":
            return (1 + math.cos(math.pi * t)) / 2
        if self.kind == "polynomial":
            return float(1 - t**self.alpha)
        return 1.0

"""What an engine is: it turns a sub-batch and a strategy into sums over the terms of that sub-batch.

A *term* is one gradient that the estimators treat as a draw: the gradient of a sub-batch's mean loss
(`subbatch`, one term per sub-batch) or of one sample's loss (the per-sample engines, K terms).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from gradscope.engines.flat import FlatParameters
from gradscope.estimators import Block, Metrics
from schedulers import Strategy


@dataclass(frozen=True)
class Reference:
    """The reference's block on one sub-batch and what the engine keeps to pair other strategies with it."""

    block: Block
    kept: Any


class Engine(Protocol):
    """Gradients of (batch, strategy) as a Block; randomness comes from `seed` alone, the model's buffers stay.

    Both methods raise NonFiniteError on a loss or gradient that is not finite, and TaskError when the task
    breaks its contract. Call them inside `untouched`: torch's own random streams are seeded, too.
    """

    name: str
    metrics: Metrics
    parameters: FlatParameters

    def reference(self, batch: Any, *, seed: int) -> Reference:
        """The reference's terms; raises TaskError when a trainable parameter receives no gradient."""
        ...

    def block(self, batch: Any, strategy: Strategy, *, seed: int, reference: Reference) -> Block:
        """A strategy's terms, paired with the reference's on the same batch."""
        ...

"""Engines: the gradients of a sub-batch under a strategy, one small contract and several bodies."""

from gradscope.engines.contract import Engine, Reference
from gradscope.engines.flat import FlatParameters, derive_seed
from gradscope.engines.subbatch import SubBatchEngine

__all__ = ["Engine", "FlatParameters", "Reference", "SubBatchEngine", "derive_seed"]

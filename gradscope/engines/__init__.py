"""Engines: the gradients of a sub-batch under a strategy, one small contract and several bodies."""

from gradscope.engines.choose import choose_engine
from gradscope.engines.contract import Engine, Reference
from gradscope.engines.fast import FastPerSampleEngine
from gradscope.engines.flat import FlatParameters, derive_seed
from gradscope.engines.per_sample import PerSampleEngine
from gradscope.engines.subbatch import SubBatchEngine

__all__ = [
    "Engine",
    "FastPerSampleEngine",
    "FlatParameters",
    "PerSampleEngine",
    "Reference",
    "SubBatchEngine",
    "choose_engine",
    "derive_seed",
]

"""The fast per-sample path: moments of K gradients from one backward pass, without forming K of them."""

from gradscope.engines.fast.engine import FastPerSampleEngine, PerSampleMoments, PerSampleStream, per_sample_moments

__all__ = ["FastPerSampleEngine", "PerSampleMoments", "PerSampleStream", "per_sample_moments"]

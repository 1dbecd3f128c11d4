"""The online mode: probes the model while it trains, and lets `schedulers.AdaptivePolicy` choose its acceleration."""

from gradscope.adaptive.controller import AdaptiveController, ProbeRecord
from gradscope.adaptive.loop_task import LoopTask

__all__ = ["AdaptiveController", "LoopTask", "ProbeRecord"]

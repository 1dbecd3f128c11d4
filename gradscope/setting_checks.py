"""Which values the settings of a pre-training run may have."""

from __future__ import annotations

import math
import typing
from typing import TYPE_CHECKING, Any

from gradscope.errors import UsageError
from gradscope.methods import METHODS
from gradscope.models import POSITIONS, VIT_SIZES
from schedulers import Decay
from schedulers.tokens import MOST_PIXELS

if TYPE_CHECKING:
    from gradscope.config import TrainConfig

PRECISIONS = ("float32", "bf16")
CHOICES = {"method": tuple(METHODS), "model": tuple(VIT_SIZES), "positions": POSITIONS, "precision": PRECISIONS}
LEAST = {
    "batch_size": 2, "accumulate": 1, "head_hidden": 1, "head_width": 1, "prototypes": 2, "patch": 1, "width": 0,
    "depth": 0, "heads": 0, "mlp_ratio": 0, "image_size": 0, "small_crops": 0, "small_size": 0, "weight_decay": 0,
    "clip": 0, "lr_end": 0,
}  # fmt: skip
MOST = {
    "batch_size": 1 << 24, "head_hidden": 1 << 20, "head_width": 1 << 20, "prototypes": 1 << 24, "patch": MOST_PIXELS,
    "width": 1 << 16, "depth": 1000, "heads": 1 << 12, "mlp_ratio": 1000, "image_size": MOST_PIXELS,
    "small_crops": 1000, "small_size": MOST_PIXELS,
}  # fmt: skip
"""Beyond these no machine has the memory, or nobody the patience."""
POSITIVE = ("lr", "temperature", "teacher_temperature", "teacher_temperature_start")
SHARES = (
    "checkpoints", "evaluations", "momentum", "centre_momentum", "freeze_last_layer", "teacher_temperature_warmup",
    "crop_scale", "small_scale",
)  # fmt: skip
OF_METHODS = {
    "momentum": ("mocov3", "dino"),
    **dict.fromkeys(
        (
            "prototypes", "fixed_norm", "head_batchnorm", "teacher_temperature", "teacher_temperature_start",
            "teacher_temperature_warmup", "centre_momentum", "freeze_last_layer", "small_crops", "small_size",
            "small_scale",
        ),
        ("dino",),
    ),
}  # fmt: skip
"""Settings that only some methods have; for the others they stay at their defaults."""


def check_settings(config: TrainConfig) -> None:
    """Raise UsageError, naming the setting, its value and what it may be, for the first that is out of range."""
    for name, hint in typing.get_type_hints(type(config)).items():
        _check_type(name, getattr(config, name), hint)
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise UsageError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(known)}")
    if not config.budget > 0:
        raise UsageError(f"budget {config.budget!r} must be a positive number of units, such as 300K")
    for name, low in LEAST.items():
        if getattr(config, name) < low:
            raise UsageError(f"{name} is {getattr(config, name)!r}; it must be at least {low}")
    for name, high in MOST.items():
        if getattr(config, name) > high:
            raise UsageError(f"{name} is {getattr(config, name)!r}; it must be at most {high:,}")
    for name in POSITIVE:
        if not getattr(config, name) > 0:
            raise UsageError(f"{name} is {getattr(config, name)!r}; it must be positive")
    for name in SHARES:
        values = getattr(config, name)
        if any(not 0 <= point <= 1 for point in (values if isinstance(values, tuple) else (values,))):
            raise UsageError(f"{name}: {values} must lie in [0, 1]")
    if not 0 <= config.drop_path < 1:
        raise UsageError(f"drop_path is {config.drop_path!r}; it must lie in [0, 1)")
    if len(config.betas) != 2 or any(not 0 <= beta < 1 for beta in config.betas):
        raise UsageError(f"betas: {config.betas} must be two numbers in [0, 1)")
    for name in ("crop_scale", "small_scale"):
        scale = getattr(config, name)
        if scale and not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
            raise UsageError(f"{name}: {scale} must be the least and the most share of the image, or empty")
    for name, methods in OF_METHODS.items():
        default = type(config).__dataclass_fields__[name].default
        if config.method not in methods and getattr(config, name) != default:
            have = f"{methods[0]} has" if len(methods) == 1 else f"{' and '.join(methods)} have"
            raise UsageError(f"{name} is {getattr(config, name)!r}; only {have} it, not {config.method}")
    if config.accumulate > 1 and METHODS[config.method].two_sided:
        raise UsageError(
            f"accumulate is {config.accumulate}: SimCLR's gradient flows into the negatives, so its loss cannot be had "
            "in parts; take a smaller batch, more ranks, or precision bf16 (mocov3 keeps its keys and dino has no "
            "negatives, so those two accumulate)"
        )
    if config.batch_size % config.accumulate:
        raise UsageError(f"batch_size {config.batch_size} is not a multiple of accumulate {config.accumulate}")
    Decay(kind=config.decay, alpha=config.decay_alpha, warmup=config.warmup)


def _check_type(name: str, value: object, hint: Any) -> None:
    """Raise UsageError unless `value` is what the type of a setting says; a whole number counts as a float."""
    several = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if several else hint
    items = value if several and isinstance(value, tuple) else (value,)
    right = not several or isinstance(value, tuple)
    for item in items:
        finite = not isinstance(item, float) or math.isfinite(item)
        accepted = (int, float) if kind is float else kind
        right = right and isinstance(item, accepted) and finite and (kind is bool or not isinstance(item, bool))
    if not right:
        words = {float: "a number", int: "a whole number", str: "a text", bool: "True or False"}
        raise UsageError(f"{name} is {value!r}; it must be {'several of: ' if several else ''}{words[kind]}")

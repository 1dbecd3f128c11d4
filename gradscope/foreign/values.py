"""Plain numbers out of what stands beside a checkpoint's tensors: argparse namespaces and JSON files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def values_of(settings: Any) -> dict[str, Any]:
    """A Namespace or dict of settings as a dict, {} for anything else."""
    if isinstance(settings, argparse.Namespace):
        return vars(settings)
    return {str(name): value for name, value in settings.items()} if isinstance(settings, Mapping) else {}


def number_in(values: Mapping[str, Any], *names: str) -> float | None:
    """The first of these entries (`a.b` goes into the dict `a`) that is a number of at least 0, else None."""
    for name in names:
        inner: Any = values
        for key in name.split("."):
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Tensor) and inner.numel() == 1:
            inner = inner.item()
        if isinstance(inner, int | float | np.number) and not isinstance(inner, bool) and float(inner) >= 0:
            return float(inner)
    return None


def json_beside(path: Path, *names: str) -> dict[str, Any]:
    """The first JSON object of these names in the folder of `path`; {} where there is none that can be read."""
    for name in names:
        try:
            found = json.loads((path.parent / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}

"""What a benchmark ran on, in words, for the `device` field of its rows."""

from __future__ import annotations

import platform
from pathlib import Path


def device_text(device: str, threads: int) -> str:
    """Name of the device behind a torch device string: the GPU's, or the processor's with the threads used."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()

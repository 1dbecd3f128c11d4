"""What a benchmark ran on, in words, for the `device` field of its rows."""

from __future__ import annotations


def device_text(device: str, threads: int) -> str:
    """Name of the device behind a torch device string: the GPU's, or the processor's with the threads used."""
    import torch

    from gradscope.timing import device_name

    name = device_name(torch.device(device))
    return name if device.startswith("cuda") else f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    import platform

    import torch

    from schedulers.schedule import library_version

    return {"gradscope": library_version(), "torch": torch.__version__, "python": platform.python_version()}

"""Leave a model and the random streams exactly as they were found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """On leaving, also by an exception, restore what a forward and backward pass may change.

    Parameters' values and `.grad`, buffers, train/eval mode of every module, `requires_grad`, and the
    random-number state of the CPU and of every CUDA device that has been used.
    """
    parameters = [
        (p, p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad)
        for p in model.parameters()
    ]
    restore = buffer_guard(model)
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value, grad, grad_value, requires_grad in parameters:
                    parameter.requires_grad_(requires_grad)
                    if not torch.equal(parameter, value):
                        parameter.copy_(value)
                    if grad is not None and grad_value is not None:
                        grad.copy_(grad_value)
                    parameter.grad = grad
            restore()
            for module, training in modes:
                module.training = training


def buffer_guard(model: nn.Module) -> Callable[[], None]:
    """Take a snapshot of a model's buffers; calling the result puts them back, as often as wanted.

    A buffer that the model has replaced by another tensor since (as an exponential average often is) is put
    back as the same object with its old values.
    """
    saved = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    @torch.no_grad()
    def restore() -> None:
        for module, name, buffer, value in saved:
            buffer.copy_(value)
            module._buffers[name] = buffer

    return restore

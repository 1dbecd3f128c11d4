"""Leave a model and the random streams exactly as they were found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Restore = Callable[[], None]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """On leaving, also by an exception, put back whatever a loss, an engine or a hook may have changed.

    Of every parameter: the object in its place, value, storage, `.grad`, `requires_grad`, hooks and attributes.
    Of every module: submodules, buffers (persistent or not) with their values, train/eval mode, hooks, and every
    attribute; dicts, lists, sets and tensors among the attributes with their contents, other objects as the same
    object. Of the random streams: torch's on the CPU and on every CUDA device, NumPy's global one and
    Python's `random`.

    Memory: one copy of all parameters and buffers (momentum encoders included), on the CPU wherever the model
    is, and of `.grad` where there is one. Version counters would need none but miss writes through `.data`.
    """
    modules = [_module_guard(module) for module in model.modules()]
    tensors = [_parameter_guard(parameter) for parameter in model.parameters()]
    buffers = buffer_guard(model)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for restore in (*modules, *tensors, buffers):  # modules first: they say which tensors are whose
                restore()
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def buffer_guard(model: nn.Module) -> Restore:
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
            if not torch.equal(buffer, value):  # an expanded buffer cannot be written, and need not be
                buffer.copy_(value)
            module._buffers[name] = buffer

    return restore


def _module_guard(module: nn.Module) -> Restore:
    """Snapshot of one module's attributes, which hold its submodules, parameters, buffers, mode and hooks."""
    attributes = dict(vars(module))
    contents = [_content_guard(value) for value in attributes.values()]

    def restore() -> None:
        vars(module).clear()
        vars(module).update(attributes)
        for content in contents:
            content()

    return restore


def _content_guard(value: Any) -> Restore:
    """Snapshot of what a dict, list, set or plain tensor holds; of other values nothing."""
    if isinstance(value, Tensor) and not value.requires_grad:
        return _value_guard(value)
    if not isinstance(value, dict | list | set):
        return lambda: None
    before = value.copy()

    def restore() -> None:
        value.clear()
        if isinstance(value, list):
            value.extend(before)
        else:
            value.update(before)

    return restore


def _parameter_guard(parameter: nn.Parameter) -> Restore:
    """Snapshot of one parameter."""
    value = _value_guard(parameter)
    grad, requires_grad = parameter.grad, parameter.requires_grad
    grad_value = None if grad is None else _value_guard(grad)
    attributes, hooks = dict(vars(parameter)), _hooks(parameter)

    def restore() -> None:
        value()
        if grad_value is not None:
            grad_value()
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad
        vars(parameter).clear()
        vars(parameter).update(attributes)
        for name, before in hooks.items():
            if _hooks(parameter)[name] != before:
                setattr(parameter, name, before)

    return restore


def _hooks(tensor: Tensor) -> dict[str, Any]:
    """A tensor's own hooks: what `register_hook` and `register_post_accumulate_grad_hook` keep, copied."""
    found = {name: getattr(tensor, name) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")}
    return {name: None if hooks is None else hooks.copy() for name, hooks in found.items()}


def _value_guard(tensor: Tensor) -> Restore:
    """Snapshot, on the CPU, of a tensor's numbers and of the place where they lie."""
    place, value = tensor.data, tensor.detach().to("cpu", copy=True)
    dense = tensor.layout == torch.strided  # a sparse gradient has no one place

    def where(data: Tensor) -> tuple[object, ...]:
        return data.data_ptr(), data.shape, data.stride(), data.dtype

    @torch.no_grad()
    def restore() -> None:
        if dense and where(tensor.data) != where(place):  # model.half(), or `.data` set to another tensor
            tensor.data = place
        if not dense or not torch.equal(place.cpu(), value):
            tensor.copy_(value)

    return restore

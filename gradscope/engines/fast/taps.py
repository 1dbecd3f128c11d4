"""See every use of a parameter in a forward pass, and the signal that comes back to it.

`Taps` is a mode under which torch functions report themselves. A function that reads a tracked parameter and
data runs with the parameter detached, and leaves a `Use` that waits for the signal at the function's output. A
function that reads parameters and constants only yields a *derived* tensor, tracked like a parameter, whose gradients
are mapped back through its computation. What carries data is known from the batch's tensors on. Errors of that
knowledge cost speed, not exactness: a parameter that is read unseen still gets a gradient from autograd itself,
which the caller finds and handles.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from gradscope.engines.fast.calls import Call, UnsupportedUse
from gradscope.engines.fast.layout import Layout
from gradscope.engines.fast.rules import IN_PLACE, RULES, Build, masked
from gradscope.engines.fast.terms import Mapped, Outer, Part


@dataclass(frozen=True)
class Source:
    """A tracked tensor: a parameter by name, or a tensor derived from parameters (`version` as it was then)."""

    tensor: Tensor
    names: tuple[str, ...]
    derived: bool
    version: int

    def parts(self, part: Part, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        """What a part of this tensor's gradients contributes, by parameter."""
        if not self.derived:
            yield self.names[0], part
            return
        if self.tensor._version != self.version:
            raise NamedUnsupported(self.names, "a tensor computed from parameters is overwritten")
        for name in self.names:
            parameter = parameters[name]
            same = self.tensor.data_ptr() == parameter.data_ptr() and self.tensor.numel() == parameter.numel()
            if same and self.tensor.dtype == parameter.dtype and parameter.is_contiguous():
                if self.tensor.is_contiguous():  # another shape of the same numbers in the same order
                    yield name, part
                    continue
                if isinstance(part, Outer) and self.tensor.ndim == 2 and self.tensor.mT.is_contiguous():
                    yield name, Outer(part.right_KTI, part.left_KTO)
                    continue
            yield name, Mapped(part, self.tensor, parameter)


class NamedUnsupported(Exception):
    """`names`: the parameters whose gradients need another way, and why."""

    def __init__(self, names: Iterable[str], reason: str) -> None:
        super().__init__(reason)
        self.names = tuple(names)


@dataclass
class Use:
    """One function call that read parameters and data."""

    function: str
    sources: tuple[Source, ...]
    ndim: int
    build: Build
    layout: Layout | None = None
    arrived: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for source in self.sources for name in source.names))

    @property
    def signature(self) -> tuple[object, ...]:
        return self.function, tuple((s.names, s.derived) for s in self.sources), self.ndim


@dataclass
class Taps(TorchFunctionMode):
    """The uses of `parameters` in the forward pass that runs under this mode, on a batch of `samples`.

    `others`: parameters that are not watched. `receive(use, signal)` is called in the backward pass for every use,
    if `active`.
    """

    parameters: Mapping[str, Tensor]
    others: Iterable[Tensor]
    batch: Any
    samples: int | None
    receive: Callable[[Use, Tensor], None]
    uses: list[Use] = field(default_factory=list)
    active: bool = True

    def __post_init__(self) -> None:
        super().__init__()
        self._sources = {id(p): Source(p, (name,), False, 0) for name, p in self.parameters.items()}
        self._data = WeakIdKeyDictionary()
        self._unwatched = WeakIdKeyDictionary()  # the others, and what is computed from them alone
        self._anchor: Tensor | None = None
        for other in self.others:
            self._unwatched[other] = True
        for leaf in _tensors(self.batch):
            self._data[leaf] = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args) + _tensors(kwargs)
        sources = [self._sources[id(t)] for t in tensors if id(t) in self._sources]
        data = any(self._carries_data(t) for t in tensors)
        if not sources or not torch.is_grad_enabled() or func is Tensor.requires_grad_:
            out = func(*args, **kwargs)
            if data:
                self._mark(self._data, func, args, out)
            elif any(t in self._unwatched for t in tensors):
                self._mark(self._unwatched, func, args, out)
            return out
        names = [name for source in sources for name in source.names]
        if "out" in kwargs:
            raise NamedUnsupported(names, f"{_name(func)} with out=")
        rule = RULES.get(func)
        if not data and not (rule is RULES[torch.broadcast_to] and self.samples):
            return self._derive(func, args, kwargs, tensors, sources)
        call = Call(func, args, kwargs, self._tracked, self._carries_data, self.samples)
        try:
            if _writes(func) and (func not in IN_PLACE or self._tracked(args[0])):
                raise UnsupportedUse(f"{_name(func)} writes in place")
            found = rule(call) if rule else None
            if found is None and not data:
                return self._derive(func, args, kwargs, tensors, sources)
            if found is None and (opened := _opened(func)):
                with self:
                    return opened(*args, **kwargs)
            if found is None:
                found = masked(call)
                if found is None:
                    out = func(*args, **kwargs)
                    self._mark(self._data, func, args, out)
                    return out
        except UnsupportedUse as reason:
            raise NamedUnsupported(names, str(reason)) from reason
        return self._watch(func, args, sources, *found)

    def close(self) -> None:
        """Let go of what is kept for signals that have not come."""
        for use in self.uses:
            use.build = _released
        self.uses = []
        self._sources.clear()

    def _watch(self, func: Any, args: tuple[Any, ...], sources: list[Source], out: Tensor, build: Build) -> Tensor:
        if not out.requires_grad:
            if not (out.is_floating_point() or out.is_complex()):
                return out
            if self._anchor is None or self._anchor.device != out.device:
                self._anchor = torch.zeros((), device=out.device, requires_grad=True)
            # `.data` has a version counter of its own: an expanded parameter must not look overwritten.
            out = _Attached.apply(out if _writes(func) else out.data, self._anchor)  # type: ignore[no-untyped-call]
        elif out._is_view() and not _writes(func):
            # A hook on a view is lost when the view is overwritten. The base is this function's own.
            out = torch.ops.aten._unsafe_view(out, out.shape)
        use = Use(_name(func), tuple({id(s.tensor): s for s in sources}.values()), out.ndim, build)
        self.uses.append(use)

        def arrive(signal: Tensor) -> None:
            if self.active and not use.arrived:
                use.arrived = True
                try:
                    self.receive(use, signal.detach())
                except UnsupportedUse as reason:
                    raise NamedUnsupported(use.names, str(reason)) from reason
                finally:
                    use.build = _released  # frees the activation

        out.register_hook(arrive)  # type: ignore[no-untyped-call]
        self._mark(self._data, func, args, out)
        return out

    def _derive(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], sources: list[Source]
    ) -> Any:
        """A computation on parameters and constants."""
        foreign = any(t in self._unwatched for t in tensors)
        out = func(*args, **kwargs)
        names = tuple(dict.fromkeys(name for source in sources for name in source.names))
        results = [t for t in _tensors((out, args[0]) if _writes(func) else (out,)) if t.requires_grad]
        if results and foreign:
            raise NamedUnsupported(names, f"{_name(func)} mixes them with other parameters")
        for tensor in results:
            if id(tensor) not in self._sources or tensor is not self._sources[id(tensor)].tensor or _writes(func):
                self._sources[id(tensor)] = Source(tensor, names, True, tensor._version)
        return out

    def _tracked(self, value: Any) -> bool:
        return id(value) in self._sources

    def _carries_data(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        # What requires a gradient and comes from nowhere else is the result of code that reports nothing.
        unseen = value.requires_grad and id(value) not in self._sources and value not in self._unwatched
        return unseen or value in self._data

    def _mark(self, known: Any, func: Any, args: tuple[Any, ...], out: Any) -> None:
        for tensor in _tensors((out, args[0]) if args and _writes(func) else (out,)):
            known[tensor] = True


class _Attached(torch.autograd.Function):
    """Makes a tensor require grad without a copy: first layers read data only, and their parameters are detached."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[None, None]:
        return None, None


def _tensors(values: Any) -> list[Tensor]:
    """The tensors of a nest of lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            found += _tensors(value)
    return found


def _name(func: Any) -> str:
    return getattr(func, "__name__", repr(func))


@cache
def _writes(func: Any) -> bool:
    """Whether a function changes its first argument."""
    name = _name(func)
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name == "__setitem__"
        or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    )


def _opened(func: Any) -> Callable[..., Any] | None:
    """A function of torch that is written in Python, so that the functions it calls report themselves; else None.

    It would hand itself back to the mode at once; its copy believes that there is none.
    """
    if not isinstance(func, types.FunctionType) or not (func.__module__ or "").startswith("torch."):
        return None
    blind = {name: _no_mode for name in func.__globals__ if name.startswith("has_torch_function")}
    if not blind:
        return None
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **blind}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _released(signal: Tensor, layout: Layout) -> list[tuple[Tensor, Part]]:
    raise RuntimeError("the signal of a use has arrived twice")


def _no_mode(*values: object) -> bool:
    return False

"""How an operation turns the signal at its output into per-sample gradients of the parameters it reads.

A rule takes a `Call` and returns `(output, build)`, or None where it does not apply. The output is computed with the
parameters detached, so autograd computes no gradient of theirs; `build(signal, layout)` yields the parts of
`terms` when the signal has arrived. It must not hold the call, whose arguments hold the graph. What no rule covers
is differentiated sample by sample (`masked`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradscope.engines.fast.calls import Call, Saved, UnsupportedUse, reduced
from gradscope.engines.fast.layout import Layout
from gradscope.engines.fast.terms import Contracted, Convolved, Embedded, Outer, Part, Rows, unfolder, wide

Build = Callable[[Tensor, Layout], list[tuple[Tensor, Part]]]
MASKED_BYTES = 256 * 2**20  # of K gradients of one parameter; beyond it the whole model is differentiated instead


Rule = Callable[[Call], tuple[Tensor, Build] | None]


def linear(call: Call) -> tuple[Tensor, Build] | None:
    given = call.bound("input", "weight", "bias")
    return _affine(call, given["input"], given["weight"], given.get("bias"), transposed=True)


def matmul(call: Call) -> tuple[Tensor, Build] | None:
    if len(call.args) != 2 or call.kwargs:
        return None
    return _affine(call, *call.args, None, transposed=False)


def addmm(call: Call) -> tuple[Tensor, Build] | None:
    if len(call.args) != 3 or call.kwargs:
        return None
    bias, x, weight = call.args
    return _affine(call, x, weight, bias, transposed=False)


def _affine(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool
) -> tuple[Tensor, Build] | None:
    """x W' + b (transposed) or x W + b."""
    if (
        not call.data(x)
        or call.data(weight)
        or weight.ndim != 2
        or x.ndim < 2
        or (bias is not None and call.data(bias))
    ):
        return None
    kept = Saved.of(x) if call.tracked(weight) else None
    has_bias = bias is not None and call.tracked(bias)

    def build(signal: Tensor, layout: Layout) -> list[tuple[Tensor, Part]]:
        parts: list[tuple[Tensor, Part]] = []
        rows = wide(layout.rows(signal))
        if kept is not None:
            signal_KTO = rows.flatten(1, -2)
            if layout.dim == signal.ndim - 1:
                raise UnsupportedUse("the samples lie along the features of a linear map")
            x_KTI = wide(layout.rows(kept.get())).flatten(1, -2).to(signal_KTO.dtype)
            parts.append((weight, Outer(signal_KTO, x_KTI) if transposed else Outer(x_KTI, signal_KTO)))
        if has_bias and bias is not None:
            parts.append((bias, Rows(reduced(rows, bias.shape, layout))))
        return parts

    return call.run(), build


def convolution(call: Call) -> tuple[Tensor, Build] | None:
    given = call.bound("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    spatial = weight.ndim - 2
    if not call.data(x) or call.data(weight) or x.ndim != weight.ndim or spatial > 2:
        return None

    def each(value: Any) -> Any:
        return value if isinstance(value, str) else (value,) * spatial if isinstance(value, int) else tuple(value)

    stride, padding = each(given.get("stride", 1)), each(given.get("padding", 0))
    padding = padding * spatial if isinstance(padding, tuple) and len(padding) == 1 else padding
    unfold = unfolder(weight, stride * spatial if len(stride) == 1 else stride, padding, each(given.get("dilation", 1)))
    groups, kernel = given.get("groups", 1), weight[0, 0].numel()
    kept = Saved.of(x) if call.tracked(weight) else None
    has_bias = bias is not None and call.tracked(bias)

    def build(signal: Tensor, layout: Layout) -> list[tuple[Tensor, Part]]:
        parts: list[tuple[Tensor, Part]] = []
        rows = wide(layout.rows(signal))
        if layout.dim:
            raise UnsupportedUse("the samples of a convolution do not come first")
        if kept is not None:
            image = wide(layout.rows(kept.get())).to(rows.dtype)
            positions = signal[0, 0].numel()
            columns = image.shape[1] * image.shape[2] * kernel * positions
            if groups == 1 and columns <= image[0].numel():  # patches that do not overlap
                columns_KLI = torch.unflatten(unfold(image.flatten(0, 1)).mT, 0, image.shape[:2]).flatten(1, 2)
                parts.append((weight, Outer(rows.flatten(3).mT.flatten(1, 2), columns_KLI)))
            else:
                parts.append((weight, Convolved(image, rows, unfold, groups, columns)))
        if has_bias and bias is not None:
            parts.append((bias, Rows(reduced(rows, (len(bias), *[1] * spatial), layout))))
        return parts

    return call.run(), build


def layer_norm(call: Call) -> tuple[Tensor, Build] | None:
    given = call.bound("input", "normalized_shape", "weight", "bias", "eps")
    shape, eps = given["normalized_shape"], given.get("eps", 1e-5)
    return _normalised(call, given, lambda x: F.layer_norm(x, shape, eps=eps), shape, by_rows=True)


def rms_norm(call: Call) -> tuple[Tensor, Build] | None:
    given = call.bound("input", "normalized_shape", "weight", "eps")
    shape, eps = given["normalized_shape"], given.get("eps")
    return _normalised(call, given, lambda x: F.rms_norm(x, shape, eps=eps), shape, by_rows=True)


def group_norm(call: Call) -> tuple[Tensor, Build] | None:
    given = call.bound("input", "num_groups", "weight", "bias", "eps")
    x, groups, eps = given["input"], given["num_groups"], given.get("eps", 1e-5)
    shape = (x.shape[1], *[1] * (x.ndim - 2))
    return _normalised(call, given, lambda x: F.group_norm(x, groups, eps=eps), shape, by_rows=False)


def batch_norm(call: Call) -> tuple[Tensor, Build] | None:
    given = call.bound("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
    x, training, eps = given["input"], given["training"], given["eps"]
    mean, var = (None, None) if training else (given["running_mean"].clone(), given["running_var"].clone())
    shape = (x.shape[1], *[1] * (x.ndim - 2))
    return _normalised(
        call, given, lambda x: F.batch_norm(x, mean, var, training=training, eps=eps), shape, by_rows=False
    )


def _normalised(
    call: Call, given: dict[str, Any], normalise: Callable[[Tensor], Tensor], shape: Sequence[int], *, by_rows: bool
) -> tuple[Tensor, Build] | None:
    """normalise(x) * weight + bias; `by_rows`: the rows of x may be normalised in any order."""
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    if not call.data(x) or any(p is not None and call.data(p) for p in (weight, bias)):
        return None
    kept = Saved.of(x) if weight is not None and call.tracked(weight) else None
    has_bias = bias is not None and call.tracked(bias)

    def build(signal: Tensor, layout: Layout) -> list[tuple[Tensor, Part]]:
        parts: list[tuple[Tensor, Part]] = []
        rows = wide(layout.rows(signal))
        if kept is not None and weight is not None:
            if by_rows:
                x_rows = layout.rows(wide(kept.get()))
                g_KP = reduced(rows, shape, layout, lambda lo, hi: normalise(x_rows[lo:hi]))
            else:
                normal = layout.rows(normalise(wide(kept.get())))
                g_KP = reduced(rows, shape, layout, lambda lo, hi: normal[lo:hi])
            parts.append((weight, Rows(g_KP)))
        if has_bias and bias is not None:
            parts.append((bias, Rows(reduced(rows, shape, layout))))
        return parts

    return call.run(), build


def add(call: Call) -> tuple[Tensor, Build] | None:
    return _broadcast(call, lambda other: None, (1.0, 1.0))


def subtract(call: Call) -> tuple[Tensor, Build] | None:
    return _broadcast(call, lambda other: None, (1.0, -1.0))


def reverse_subtract(call: Call) -> tuple[Tensor, Build] | None:
    return _broadcast(call, lambda other: None, (-1.0, 1.0))


def multiply(call: Call) -> tuple[Tensor, Build] | None:
    return _broadcast(call, Saved.of, (1.0, 1.0))


def multiply_in_place(call: Call) -> tuple[Tensor, Build] | None:
    return _broadcast(call, lambda other: Saved.of(other.detach().clone()), (1.0, 1.0))


def _broadcast(
    call: Call, keep: Callable[[Tensor], Saved | None], signs: tuple[float, float]
) -> tuple[Tensor, Build] | None:
    """A parameter added to, or multiplied with, every sample."""
    if len(call.args) != 2 or set(call.kwargs) - {"alpha"} or not all(isinstance(a, Tensor) for a in call.args):
        return None
    mine = [i for i, a in enumerate(call.args) if call.tracked(a)]
    if len(mine) != 1 or not call.data(call.args[1 - mine[0]]):
        return None
    at = mine[0]
    parameter, other = call.args[at], call.args[1 - at]
    if "alpha" in call.kwargs and signs[0] < 0:
        return None
    factor = signs[at] * (call.kwargs.get("alpha", 1) if at == 1 else 1)
    if parameter.ndim > other.ndim or (parameter.ndim == other.ndim and parameter.shape[0] != 1 < other.ndim):
        return None
    kept = keep(other)

    def build(signal: Tensor, layout: Layout) -> list[tuple[Tensor, Part]]:
        rows = wide(layout.rows(signal))
        if kept is None:
            g_KP = reduced(rows, parameter.shape, layout)
        else:
            others = layout.rows(kept.get().expand_as(signal))
            g_KP = reduced(rows, parameter.shape, layout, lambda lo, hi: others[lo:hi])
        return [(parameter, Rows(g_KP * factor if factor != 1 else g_KP))]

    return call.run(), build


def expand(call: Call) -> tuple[Tensor, Build] | None:
    """A parameter repeated once per sample, as class tokens are."""
    parameter = call.args[0]
    if not call.tracked(parameter) or not call.samples or call.samples == 1:
        return None
    out = call.run()
    shape = (*[1] * (out.ndim - parameter.ndim), *parameter.shape)
    if shape[0] != 1 or out.shape[0] % call.samples or (out.shape[1:] != shape[1:] and call.function not in EXPANDS):
        return None

    def build(signal: Tensor, layout: Layout) -> list[tuple[Tensor, Part]]:
        return [(parameter, Rows(reduced(wide(layout.rows(signal)), parameter.shape, layout)))]

    return out, build


def embedding(call: Call) -> tuple[Tensor, Build] | None:
    given = call.bound("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    weight, ids = given["weight"], given["indices"]
    if given.get("scale_grad_by_freq") or given.get("sparse"):
        raise UnsupportedUse("an embedding with scale_grad_by_freq or sparse gradients")
    padding = given.get("padding_idx", -1)

    def build(signal: Tensor, layout: Layout) -> list[tuple[Tensor, Part]]:
        ids_KT = layout.rows(ids).flatten(1)
        signal_KTD = wide(layout.rows(signal)).flatten(1, -2)
        if padding >= 0:
            signal_KTD = signal_KTD * (ids_KT != padding)[:, :, None]
        return [(weight, Embedded(ids_KT, signal_KTD, len(weight)))]

    return call.run(), build


def einsum(call: Call) -> tuple[Tensor, Build] | None:
    equation, *rest = call.args
    operands = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
    equation = equation.replace(" ", "")
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    labels, result = equation.split("->")
    mine = [i for i, a in enumerate(operands) if call.tracked(a)]
    if len(mine) != 1 or not call.data(operands[1 - mine[0]]):
        return None
    w, x = labels.split(",")[mine[0]], labels.split(",")[1 - mine[0]]
    if any(len(set(part)) < len(part) for part in (w, x, result)) or not set(w) <= set(x) | set(result):
        return None
    weight, kept = operands[mine[0]], Saved.of(operands[1 - mine[0]])

    def build(signal: Tensor, layout: Layout) -> list[tuple[Tensor, Part]]:
        batch = result[layout.dim]
        if signal.shape[layout.dim] != layout.samples or batch not in x or batch in w:
            raise UnsupportedUse("an einsum whose batch is no index of its own")
        x_tensor = wide(kept.get()).to(wide(signal).dtype)
        return [(weight, Contracted(f"{x},{result}->{batch}{w}", x_tensor, x.index(batch), wide(signal), layout.dim))]

    return call.run(), build


def masked(call: Call) -> tuple[Tensor, Build] | None:
    """Any other operation: its vector-Jacobian product with the signal of one sample at a time, exactly.

    None where the result carries no gradient.
    """
    leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def leaf(tensor: Tensor) -> Tensor:
        return leaves.setdefault(id(tensor), (tensor, tensor.detach().requires_grad_()))[1]

    out = call.run_with(leaf)
    if not isinstance(out, Tensor):
        if any(isinstance(o, Tensor) and o.requires_grad for o in (out if isinstance(out, list | tuple) else ())):
            raise UnsupportedUse(f"{_name(call.function)} has several results")
        return None
    if not out.requires_grad:
        return None
    numbers = sum(tensor.numel() for tensor, _ in leaves.values()) * (call.samples or 1)
    if numbers * out.element_size() > MASKED_BYTES:
        raise UnsupportedUse(f"{_name(call.function)} on large parameters")
    version, name = out._version, _name(call.function)

    def build(signal: Tensor, layout: Layout) -> list[tuple[Tensor, Part]]:
        if out._version != version:
            raise UnsupportedUse(f"the result of {name} is overwritten")
        gradients: list[list[Tensor]] = [[] for _ in leaves]
        for i in range(layout.samples):
            one = torch.zeros_like(signal, memory_format=torch.contiguous_format)
            layout.rows(one)[i] = layout.rows(signal)[i]
            found = torch.autograd.grad(
                out, [leaf for _, leaf in leaves.values()], one, retain_graph=True, materialize_grads=True
            )
            for rows, g in zip(gradients, found, strict=True):
                rows.append(wide(g).flatten())
        return [
            (tensor, Rows(torch.stack(rows), "op-vmap"))
            for (tensor, _), rows in zip(leaves.values(), gradients, strict=True)
        ]

    return out, build


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


_T: Any = Tensor
_N: Any = torch._C._nn
_V: Any = torch._C._VariableFunctions
EXPANDS = {_T.expand, _T.expand_as, torch.broadcast_to, _T.broadcast_to}
IN_PLACE = {_T.add_, _T.__iadd__, _T.sub_, _T.__isub__, _T.mul_, _T.__imul__}
RULES: dict[Callable[..., Any], Rule] = {
    _N.linear: linear,
    F.linear: linear,
    torch.matmul: matmul,
    _T.matmul: matmul,
    _T.__matmul__: matmul,
    torch.mm: matmul,
    _T.mm: matmul,
    torch.addmm: addmm,
    _T.addmm: addmm,
    torch.conv1d: convolution,
    torch.conv2d: convolution,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    torch.batch_norm: batch_norm,
    torch.embedding: embedding,
    torch.einsum: einsum,
    _V.einsum: einsum,
    torch.sub: subtract,
    _T.sub: subtract,
    _T.sub_: subtract,
    _T.__sub__: subtract,
    _T.__isub__: subtract,
    torch.subtract: subtract,
    _T.subtract: subtract,
    torch.rsub: reverse_subtract,
    _T.__rsub__: reverse_subtract,
    _T.mul_: multiply_in_place,
    _T.__imul__: multiply_in_place,
    **dict.fromkeys([torch.add, _T.add, _T.add_, _T.__add__, _T.__radd__, _T.__iadd__], add),
    **dict.fromkeys([torch.mul, _T.mul, _T.__mul__, _T.__rmul__, torch.multiply, _T.multiply], multiply),
    **dict.fromkeys([*EXPANDS, _T.repeat, torch.tile, _T.tile], expand),
}

"""One forward and one backward pass of a sub-batch, and the moments of its per-sample gradients.

`Passes` decides per parameter how its gradients are found and proves the decision on the first sub-batch of every
strategy (`_probe`). Whatever it cannot intercept is differentiated sample by sample (`loop`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.engines._samples import check_shape
from gradscope.engines.fast.coupled import refuse_coupling
from gradscope.engines.fast.layout import Layout, choose_samples, find_layout
from gradscope.engines.fast.moments import Moments, Workspace, moments
from gradscope.engines.fast.taps import NamedUnsupported, Taps, Use
from gradscope.engines.fast.terms import Part, Rows, wide
from gradscope.errors import NonFiniteError, TaskError

LOOP_BYTES = 2**30  # of K gradients of parameters without a rule, where the reference has to keep them
PROBES = 3  # with other random samples, until all signals have been seen
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
TOLERANCE_HALF = 5e-2

Losses = Callable[[Any], Tensor]


class Undetermined(Exception):
    """A signal that was zero when the samples' places were found out no longer is."""


@dataclass
class Collector:
    """Parts of the gradients as the signals arrive; a parameter is finished with its last signal, to free memory."""

    parameters: Mapping[str, Tensor]
    weights: Mapping[str, Sequence[Tensor | None]]
    other: Mapping[str, Part] | None
    keep: bool
    waiting: Counter[str] = field(default_factory=Counter)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    found: dict[str, Moments] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)  # those whose signal was zero wherever its samples are not known
    samples: int = 0
    work: Workspace = field(default_factory=Workspace)

    def expect(self, uses: Sequence[Use], plan: Sequence[Layout | None] = (), samples: int = 0) -> None:
        """Take note of the uses that are to come, and of where their samples lie."""
        for use, layout in zip(uses, plan, strict=bool(plan)):
            use.layout = layout and Layout(samples, layout.dim, layout.major)
        self.samples = samples
        self.waiting.update(name for use in uses for name in use.names)
        # Gradients of derived tensors need autograd again: not from inside a backward pass.
        self.waiting.update(name for use in uses for s in use.sources if s.derived for name in s.names)

    def receive(self, use: Use, signal: Tensor) -> None:
        if use.layout is None:
            if not bool((signal != 0).any()):
                self.silent.update(use.names)
                return
            raise Undetermined
        by_tensor = {id(source.tensor): source for source in use.sources}
        for tensor, part in use.build(signal, use.layout):
            for name, mapped in by_tensor[id(tensor)].parts(part, self.parameters):
                self.parts.setdefault(name, []).append(mapped)
        for name in use.names:
            self.waiting[name] -= 1
            if not self.waiting[name]:
                self._finish(name)

    def finish(self) -> dict[str, Moments]:
        for name in list(self.parts):
            self._finish(name)
        for name in self.silent - self.found.keys():
            parameter, metrics = self.parameters[name], len(self.weights[name])
            zeros_WK = parameter.new_zeros(metrics, self.samples, dtype=torch.float64)
            self.found[name] = Moments(wide(torch.zeros_like(parameter)).flatten(), zeros_WK, None, "reduced", None)
        return self.found

    def _finish(self, name: str) -> None:
        if name in self.parts:
            other = None if self.other is None else self.other.get(name)
            self.found[name] = moments(
                self.parts.pop(name),
                self.weights[name],
                self.parameters[name].numel(),
                other=other,
                keep=self.keep,
                work=self.work,
            )


class Passes:
    """Moments of the gradients of loss terms with respect to `parameters`, in the metrics of `weights` (each (P)).

    `half`: the losses compute in half precision, where autograd's own gradients are rounded.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        weights: Mapping[str, Sequence[Tensor | None]],
        *,
        half: bool = False,
    ) -> None:
        self.model, self.parameters, self.weights, self.half = model, parameters, weights, half
        self.loops: dict[object, dict[str, str]] = {}  # strategy -> parameter -> reason
        self._plans: dict[tuple[object, object], list[Layout | None]] = {}
        self._probes = 0

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why parameters are differentiated sample by sample, under whatever strategy."""
        return {name: why for loops in self.loops.values() for name, why in loops.items()}

    def run(
        self,
        losses: Losses,
        batch: Any,
        *,
        key: object = None,
        keep: bool = False,
        other: Mapping[str, Part] | None = None,
    ) -> tuple[int, dict[str, Moments]]:
        """(K, moments by parameter) of the terms `losses(batch)`, (K).

        A parameter that the terms do not reach is left out. `key` names the strategy; `losses` must repeat
        itself, random draws included. Raises TaskError where terms couple samples.
        """
        loops = self.loops.setdefault(key, {})
        while True:
            try:
                return self._attempt(losses, batch, key, keep, other)
            except NamedUnsupported as found:
                fresh = [name for name in found.names if name not in loops]
                reason = str(found)
                if not fresh:
                    fresh = [name for name in self.parameters if name not in loops]
            except (TaskError, NonFiniteError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                fresh, reason = [name for name in self.parameters if name not in loops], f"{error}"
                if not fresh:
                    raise
            loops.update(dict.fromkeys(fresh, reason))

    def _attempt(
        self,
        losses: Losses,
        batch: Any,
        key: object,
        keep: bool,
        other: Mapping[str, Part] | None,
        again: int = 0,
    ) -> tuple[int, dict[str, Moments]]:
        loops = self.loops[key]
        tracked = {name: p for name, p in self.parameters.items() if name not in loops}
        with self._own_gradients():
            for _ in range(2):
                with self._forward(losses, batch, tracked, keep, other) as (taps, losses_K, collector):
                    signature = _signature(taps.uses)
                    plan = self._plans.get((key, signature))
                    if plan is not None:
                        collector.expect(taps.uses, plan, len(losses_K))
                        found = self._loop(losses_K, taps, keep, other, loops)
                        try:
                            if losses_K.requires_grad:
                                losses_K.sum().backward()  # type: ignore[no-untyped-call]
                        except Undetermined:
                            del self._plans[key, signature]
                            break
                        found |= collector.finish()
                        _all_seen(tracked)
                        return len(losses_K), found
                del taps, losses_K, collector
                known = any(other_signature == signature for _, other_signature in self._plans)
                self._probe(losses, batch, tracked, key, compare=not known)
            else:
                raise NamedUnsupported(tracked, "the model does not call the same functions twice")
        if again == PROBES:
            raise NamedUnsupported(tracked, "where its samples lie could not be found out")
        return self._attempt(losses, batch, key, keep, other, again + 1)

    @contextmanager
    def _forward(
        self,
        losses: Losses,
        batch: Any,
        tracked: Mapping[str, Tensor],
        keep: bool = False,
        other: Mapping[str, Part] | None = None,
    ) -> Iterator[tuple[Taps, Tensor, Collector]]:
        """A forward pass under watch; the graph is let go at the end."""
        collector = Collector(tracked, self.weights, other, keep)
        others = [p for name, p in self.parameters.items() if name not in tracked]
        taps = Taps(tracked, others, batch, _batch_size(batch), collector.receive)
        try:
            with taps:
                losses_K = losses(batch)
            yield taps, _checked(losses_K, batch), collector
        finally:
            taps.close()

    def _loop(
        self,
        losses_K: Tensor,
        taps: Taps,
        keep: bool,
        other: Mapping[str, Part] | None,
        loops: Mapping[str, str],
    ) -> dict[str, Moments]:
        """One backward pass per sample for the parameters that nothing else covers."""
        if not loops or not losses_K.requires_grad:
            return {}
        tensors = {name: self.parameters[name] for name in loops}
        size = sum(p.numel() * p.element_size() for p in tensors.values()) * len(losses_K)
        if keep and size > LOOP_BYTES:
            name = max(tensors, key=lambda n: tensors[n].numel())
            raise TaskError(
                f"parameter {name!r} needs one backward pass per sample ({loops[name]}), and {size / 2**30:.1f} GiB "
                "to pair strategies with the reference; use --estimator subbatch"
            )
        taps.active = False
        singles: dict[str, list[Moments]] = {name: [] for name in tensors}
        used: set[str] = set()
        for i in range(len(losses_K)):
            gradients = torch.autograd.grad(losses_K[i], list(tensors.values()), retain_graph=True, allow_unused=True)
            for (name, parameter), g in zip(tensors.items(), gradients, strict=True):
                used |= {name} if g is not None else set()
                row = wide(torch.zeros_like(parameter) if g is None else g).reshape(1, -1)
                kept = None if other is None or name not in other else Rows(other[name].gradients(i, i + 1))
                singles[name].append(moments([Rows(row)], self.weights[name], row.shape[1], other=kept, keep=keep))
        taps.active = True
        return {name: _joined(singles[name]) for name in tensors if name in used}

    def _probe(self, losses: Losses, batch: Any, tracked: Mapping[str, Tensor], key: object, *, compare: bool) -> None:
        """Find where the samples lie in every signal, refuse coupled terms, and check the results against autograd.

        The losses of a random subset of the samples must leave the signals of all others exactly zero; to `compare`,
        the sum of its gradients and the norm of one must be autograd's.
        """
        samples = _batch_size(batch) or len(_checked(losses(batch), batch))
        chosen_K = choose_samples(samples, torch.Generator().manual_seed(self._probes))
        self._probes += 1
        one = int(chosen_K.nonzero()[0])
        if compare:
            plain_K = _checked(losses(batch), batch)
            expected = _gradients(plain_K[chosen_K.to(plain_K.device)].sum(), tracked)
            expected_one = _gradients(plain_K[one], tracked)
            del plain_K
        mixed: list[Use] = []
        reached = False
        with self._forward(losses, batch, tracked) as (taps, losses_K, collector):
            chosen_K = chosen_K.to(losses_K.device)

            def receive(use: Use, signal: Tensor) -> None:
                nonlocal reached
                if not bool(torch.isfinite(signal).all()):
                    raise NonFiniteError("the gradient is not finite")
                if bool((signal != 0).any()):
                    reached = True
                    use.layout = find_layout(signal, chosen_K)
                    if use.layout is None:
                        mixed.append(use)
                    else:
                        collector.receive(use, signal)

            taps.receive = receive
            collector.expect(taps.uses)
            if losses_K.requires_grad:
                losses_K[chosen_K].sum().backward()  # type: ignore[no-untyped-call]
            uses = list(taps.uses)
            found = {} if mixed else collector.finish()
        if mixed or not reached:
            refuse_coupling(self.model, losses, batch, chosen_K, [use.names for use in uses if use in mixed])
        if mixed:
            raise NamedUnsupported({n for use in mixed for n in use.names}, "its signal is not ordered by samples")
        _all_seen(tracked)
        if compare and (wrong := _disagreeing(found, expected, expected_one, one, self.weights, self.half)):
            raise NamedUnsupported(wrong, "its gradients did not agree with autograd's")
        self._plans[key, _signature(uses)] = [use.layout for use in uses]

    @contextmanager
    def _own_gradients(self) -> Iterator[None]:
        """`.grad` empty inside and as before outside; other parameters of the model get no gradient."""
        mine = {id(p) for p in self.parameters.values()}
        saved = [(p, p.grad) for p in self.parameters.values()]
        frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in mine]
        try:
            for parameter, _ in saved:
                parameter.grad = None
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, grad in saved:
                parameter.grad = grad
            for parameter in frozen:
                parameter.requires_grad_(True)


def _signature(uses: Sequence[Use]) -> tuple[object, ...]:
    return tuple(use.signature for use in uses)


def _all_seen(tracked: Mapping[str, Tensor]) -> None:
    """Parameters are read detached: what autograd gives one of them nevertheless, no use has accounted for."""
    missed = [name for name, p in tracked.items() if p.grad is not None]
    if missed:
        raise NamedUnsupported(missed, "it is read where no torch function reports it")


def _batch_size(batch: Any) -> int | None:
    leaf = next((t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim), None)
    return None if leaf is None else len(leaf)


def _checked(losses_K: object, batch: Any) -> Tensor:
    size = _batch_size(batch)
    if not isinstance(losses_K, Tensor) or size is not None:
        check_shape(losses_K, size or 0)
    assert isinstance(losses_K, Tensor)
    if not torch.isfinite(losses_K).all():
        at = int((~torch.isfinite(losses_K)).nonzero()[0])
        raise NonFiniteError(f"the loss of sample {at} is {losses_K[at].item()}")
    return losses_K


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not loss.requires_grad or not parameters:
        return {}
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {n: wide(g).flatten() for n, g in zip(parameters, gradients, strict=True) if g is not None}


def _joined(singles: Sequence[Moments]) -> Moments:
    """Moments of single samples as those of all of them."""
    cross = [m.cross_WK for m in singles if m.cross_WK is not None]
    kept = [m.kept.gradients(0, 1) for m in singles if m.kept is not None]
    return Moments(
        torch.stack([m.total_P for m in singles]).sum(0),
        torch.cat([m.squares_WK for m in singles], 1),
        torch.cat(cross, 1) if cross else None,
        "loop",
        Rows(torch.cat(kept)) if kept else None,
    )


def _disagreeing(
    found: Mapping[str, Moments],
    expected: Mapping[str, Tensor],
    expected_one: Mapping[str, Tensor],
    one: int,
    weights: Mapping[str, Sequence[Tensor | None]],
    half: bool,
) -> list[str]:
    """Parameters whose sum, or squared norm of one sample, is not autograd's up to rounding."""
    scales = {name: float(g.double().norm()) for name, g in expected_one.items()}
    floor = 1e-3 * max(scales.values(), default=0.0)
    wrong = []
    for name in {**expected, **found}:
        mine, sum_P, one_P = found.get(name), expected.get(name), expected_one.get(name)
        if mine is None:
            wrong += [name] if sum_P is not None and bool(sum_P.any()) else []
            continue
        total_P = mine.total_P.double()
        sum_P = torch.zeros_like(total_P) if sum_P is None else sum_P.double()
        one_P = torch.zeros_like(total_P) if one_P is None else one_P.double()
        tolerance = TOLERANCE_HALF if half else TOLERANCE[mine.total_P.dtype]
        scale = float(mine.squares_WK[0].sum().clamp(min=0).sqrt()) if weights[name][0] is None else 0.0
        scale = max(scale, float(sum_P.norm()), floor)
        if float((total_P - sum_P).norm()) > tolerance * scale * 10:
            wrong.append(name)
            continue
        for w_P, square in zip(weights[name], mine.squares_WK[:, one], strict=True):
            true = float((one_P.square() if w_P is None else one_P.square() * w_P).sum())
            unit = 1.0 if w_P is None else float(w_P.double().mean())
            if abs(float(square) - true) > 10 * tolerance * max(true, floor**2 * unit):
                wrong.append(name)
                break
    return wrong

"""The exact dynamic program: the cheapest sequence of strategies under constraints, on plain arrays.

Shape legend: N slices, C strategies, U switches used so far, D slices spent in the current strategy
(the last index stands for "min_dwell or more").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from schedulers.errors import InfeasibleError, UsageError


def solve(
    loss: ArrayLike,
    *,
    follows: ArrayLike | None = None,
    max_switches: int | None = None,
    min_dwell: int = 1,
    final: tuple[int, int] | None = None,
) -> NDArray[np.intp]:
    """The path (N,) of strategy indices with the smallest sum of `loss` (N, C) that keeps the constraints.

    A cell of `loss` that is NaN or infinite cannot be used. `follows[a, b]` says whether b may come
    right after a (None: always; staying always may). At most `max_switches` changes of strategy, each
    run of one strategy, the last one included, at least `min_dwell` slices long, and with
    `final = (first, index)` every slice from `first` on runs strategy `index`.

    The recursion runs backwards over slices. With V[d, c, u] the smallest loss of the slices k.. when
    slice k is the (d+1)-th in strategy c after u switches, and V' that of slice k+1:

        V[d, c, u] = loss[k, c] + V'[d + 1, c, u]                                       d < min_dwell - 1
        V[d, c, u] = loss[k, c] + min( V'[d, c, u], min over follows of V'[0, b, u + 1] )   at the last d

    Time O(N · U · (C² + C · min_dwell)), memory O(N · U · C). Ties are broken towards staying, then
    towards the first strategy; the path found is the first of the optimal ones in that order. Every
    sum adds the slices from the last to the first, so equal losses are equal to the last bit.

    Raises InfeasibleError when no path keeps the constraints, UsageError for arguments out of range.
    """
    loss_NC = np.array(loss, dtype=np.float64)
    if loss_NC.ndim != 2 or 0 in loss_NC.shape:
        raise UsageError(f"loss has shape {loss_NC.shape}; it needs at least one slice and one strategy")
    slices, strategies = loss_NC.shape
    loss_NC[~np.isfinite(loss_NC)] = np.inf
    if min_dwell < 1 or (max_switches is not None and max_switches < 0):
        raise UsageError(f"min_dwell={min_dwell} must be at least 1 and max_switches={max_switches} at least 0")
    if final is not None:
        first, index = final
        if not (first >= 0 and 0 <= index < strategies):
            raise UsageError(f"final={final} is not a slice and one of {strategies} strategies")
        loss_NC[first:, np.arange(strategies) != index] = np.inf
    may_follow_CC = np.ones((strategies, strategies), bool) if follows is None else np.array(follows, dtype=bool)
    if may_follow_CC.shape != (strategies, strategies):
        raise UsageError(f"follows has shape {may_follow_CC.shape}; {strategies} strategies need a square of them")
    np.fill_diagonal(may_follow_CC, False)

    # More switches than stages of min_dwell slices fit in can never be used: then they need no counting.
    counted = max_switches is not None and max_switches < slices // min_dwell - 1
    used = max_switches + 1 if counted and max_switches is not None else 1

    value_DCU = np.full((min_dwell, strategies, used), np.inf)
    value_DCU[-1] = loss_NC[-1][:, None]
    next_NCU = np.empty((slices - 1, strategies, used), dtype=np.intp)
    stay_C = np.arange(strategies)
    for k in range(slices - 2, -1, -1):
        entered_CU = value_DCU[0]
        if counted:
            entered_CU = np.concatenate([entered_CU[:, 1:], np.full((strategies, 1), np.inf)], axis=1)
        reach_CCU = np.where(may_follow_CC[:, :, None], entered_CU[None, :, :], np.inf)
        target_CU = reach_CCU.argmin(axis=1)
        switch_CU = np.take_along_axis(reach_CCU, target_CU[:, None, :], axis=1)[:, 0]
        stays_CU = value_DCU[-1] <= switch_CU
        next_NCU[k] = np.where(stays_CU, stay_C[:, None], target_CU)
        freed_CU = np.where(stays_CU, value_DCU[-1], switch_CU)
        value_DCU = loss_NC[k][None, :, None] + np.concatenate([value_DCU[1:], freed_CU[None]])

    if not np.isfinite(value_DCU[0, :, 0]).any():
        raise InfeasibleError("no sequence of strategies keeps all the constraints")
    return _follow(next_NCU, int(value_DCU[0, :, 0].argmin()), min_dwell, counted)


def _follow(next_NCU: NDArray[np.intp], start: int, min_dwell: int, counted: bool) -> NDArray[np.intp]:
    """The path that the stored choices describe, from strategy `start` on."""
    path = np.empty(len(next_NCU) + 1, dtype=np.intp)
    path[0] = current = start
    used, run = 0, 1
    for k, choice_CU in enumerate(next_NCU):
        following = int(choice_CU[current, used]) if run >= min_dwell else current
        run = run + 1 if following == current else 1
        used += int(counted and following != current)
        path[k + 1] = current = following
    return path

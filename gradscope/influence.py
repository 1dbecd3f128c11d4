"""How much each sub-batch moves a strategy's estimates: from it follow covariances within and between cells.

With t_m the moments when sub-batch m of M is left out, and t their mean over m,

    psi_m = sqrt((M-1)/M) (t_m - t),      sum_m psi_m psi_m' = the delete-one jackknife covariance.

All strategies of a checkpoint are measured on the same sub-batches. Cells A and B of M_A and M_B of them have in
common the first min(M_A, M_B), and sum over those of psi_A,m psi_B,m' estimates the covariance BETWEEN them
(Efron, Stein 1981: t_m - t is -1/(M-1) times the empirical influence of sub-batch m).

A cube has room for R replicates; sub-batch m is added to replicate m mod R. Independent terms that are added up
keep the sum of their products in expectation, so a cell of more than R sub-batches keeps its covariances in
expectation, only known less precisely; one of at most R keeps them exactly.

Shapes: M sub-batch, W metric, E moment in the order of MOMENTS, R replicate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray as xr

MOST_REPLICATES = 256
SMALLEST, LARGEST = 1e-32, 3e38  # of an influence: float32 holds it, with six digits
Floats = TypeVar("Floats", NDArray[np.float64], NDArray[np.float32])


def influence_of(deleted_MWE: NDArray[np.float64], replicates: int) -> NDArray[np.float32] | NDArray[np.float64]:
    """psi of every sub-batch in its replicate, 0 in replicates without one: (M, W, E) -> (W, E, R).

    In float32; in float64 where that would not hold it (moments of gradients of a norm near 1e19 or 1e-19).
    """
    count = len(deleted_MWE)
    psi_MWE = math.sqrt((count - 1) / count) * (deleted_MWE - deleted_MWE.mean(0))
    psi_WER = folded(np.moveaxis(psi_MWE, 0, -1), replicates)
    most = np.abs(psi_WER).max(initial=0.0)
    return psi_WER if most > LARGEST or 0 < most < SMALLEST else np.asarray(psi_WER, np.float32)


def folded(psi: Floats, replicates: int) -> Floats:
    """Add number m of the last axis to number m mod `replicates` of the result, whose last axis is that long."""
    result = np.zeros((*psi.shape[:-1], replicates), psi.dtype)
    for start in range(0, psi.shape[-1], replicates):
        part = psi[..., start : start + replicates]
        result[..., : part.shape[-1]] += part
    return result


def common_replicates(cubes: Sequence[xr.Dataset], wanted: int) -> int:
    """Replicates in which all of `cubes` fit together: the most of any of them and of `wanted`.

    A cube with cells of more sub-batches than it has replicates has these added up already, and can only be added up
    further: then it is the greatest common divisor of such cubes' numbers.
    """
    kept = [cube for cube in cubes if "influence" in cube]
    added_up = [
        cube.sizes["replicate"]
        for cube in kept
        if int(cube["n_samples"].max()) > cube.sizes["replicate"] * int(cube.attrs["batch_size"])
    ]
    return math.gcd(*added_up) if added_up else max([wanted, *(cube.sizes["replicate"] for cube in kept)])

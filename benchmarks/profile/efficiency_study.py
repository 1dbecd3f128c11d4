"""What each way of estimating chooses from n sub-batches, and how good the choice is.

Two designs. *Resampled*: the M measured sub-batches are taken for the whole population, a trial draws from
them with replacement, and the truth is the population's, without error; any n is possible. *Halves*: a trial puts
the sub-batches in a random order and draws from the first half without replacement; the second half judges,
so that choice and judge share no data, but the judge has errors of its own and n ends at M/2. (In both, trials
share sub-batches: their number makes the figures smooth, not independent.)

Everything is computed from Gram matrices by sums over weights of the sub-batches. Scores are taken with
norm_sq_ref = 1, a factor common to all strategies.

Shapes: M sub-batch, C strategy, T trial, N drawn sub-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schedulers import Grid, paper_cost, patch_tokens, token_counts
from schedulers.costs import PAPER_BASE_TOKENS
from schedulers.criteria import CRITERIA, FloatArray, Moments
from schedulers.racing import RaceRule, contenders

Index = NDArray[np.int64]

INDEPENDENT, PAIRED, UNBIASED = "independent plug-in", "paired plug-in", "unbiased paired"
ESTIMATORS = (INDEPENDENT, PAIRED, UNBIASED)


@dataclass(frozen=True)
class Costs:
    """Units per sample: `query_C` spent for each strategy, `key_C` once for all strategies of one `patch_C`.

    A forward pass of the reference sequence is one unit; query 3 L_q / L_base, key L_k / L_base.
    """

    query_C: FloatArray
    key_C: FloatArray
    patch_C: FloatArray

    @classmethod
    def of(cls, grid: Grid, image_size: int, patch: int) -> Costs:
        counts = [token_counts(image_size, patch, strategy) for strategy in grid.strategies()]
        return cls(
            np.array([3 * count.query / count.base for count in counts]),
            np.array([count.key / count.base for count in counts]),
            np.array([strategy.number("patch") for strategy in grid.strategies()]),
        )

    @classmethod
    def paper(cls, grid: Grid, image_size: int, patch: int) -> Costs:
        """The paper's convention: an uncompressed key, the same for all strategies, and other roundings."""
        key = (patch_tokens(image_size, patch) + 1) / PAPER_BASE_TOKENS
        total_C = np.array([paper_cost("mocov3", image_size, patch, strategy) for strategy in grid.strategies()])
        return cls(total_C - key, np.full(len(grid), key), np.zeros(len(grid)))

    @property
    def total_C(self) -> FloatArray:
        return self.query_C + self.key_C

    def spent(self, samples_TC: FloatArray) -> FloatArray:
        """Units (T) of a profile with that many samples a cell, keys shared among the strategies of a patch."""
        units_T = samples_TC @ self.query_C
        for patch in np.unique(self.patch_C):
            same_C = self.patch_C == patch
            units_T = units_T + samples_TC[:, same_C].max(1) * self.key_C[same_C][0]
        return np.asarray(units_T)


@dataclass(frozen=True)
class Case:
    """One checkpoint in one metric under one criterion: Gram matrices (C, M, M) and what a score needs.

    `sketch_*` have the exact diagonals: a jackknife takes only pairs of different sub-batches from a sketch.
    """

    name: str
    criterion: str
    gg_CMM: FloatArray
    gz_CMM: FloatArray
    sketch_gg_CMM: FloatArray
    sketch_gz_CMM: FloatArray
    reference: int
    costs: Costs
    paper_costs: Costs
    batch_size: int

    @property
    def sub_batches(self) -> int:
        return int(self.gg_CMM.shape[1])

    @property
    def lower_is_better(self) -> bool:
        return CRITERIA[self.criterion].lower_is_better

    def score(self, moments: Mapping[str, FloatArray]) -> FloatArray:
        """Scores (..., C) of moments (..., C); NaN where they are undefined."""
        reference_cost = float(self.costs.total_C[self.reference])
        values = Moments(
            **{name: moments[name] for name in ("bias_sq", "variance", "norm_sq", "inner")},
            norm_sq_ref=np.float64(1.0),  # type: ignore[arg-type]
        )
        return CRITERIA[self.criterion].score(
            values,
            self.costs.total_C,
            beta=self.batch_size * reference_cost,
            batch_size=self.batch_size,
            reference_cost=reference_cost,
        )

    def best(self, score: FloatArray) -> Index:
        """Index of the best strategy of scores (..., C)."""
        return np.asarray(np.nanargmin(score, -1) if self.lower_is_better else np.nanargmax(score, -1))


def paired_moments(case: Case, weights_TM: FloatArray, *, unbiased: bool) -> dict[str, FloatArray]:
    """Moments (T, C) from sub-batches drawn as often as weighted, the same for the reference and the strategies."""
    count = weights_TM.sum(1)[:, None]
    sum_gg, gg = _sums(case.gg_CMM, weights_TM, weights_TM)
    sum_gz, gz = _sums(case.gz_CMM, weights_TM, weights_TM)
    return _moments(case, count, (sum_gg, sum_gz), (gg, gz), unbiased=unbiased)


def independent_moments(case: Case, reference_TM: FloatArray, strategy_TM: FloatArray) -> dict[str, FloatArray]:
    """The plug-in's moments (T, C): means over other sub-batches for the reference than for the strategies.

    The reference as a strategy has no bias by definition.
    """
    count = strategy_TM.sum(1)[:, None]
    sum_gg, gg = _sums(case.gg_CMM, strategy_TM, strategy_TM)
    sum_gz, _ = _sums(case.gz_CMM, strategy_TM, reference_TM)
    sum_zz, _ = _sums(case.gg_CMM[case.reference][None], reference_TM, reference_TM)
    bias_sq = (sum_gg - 2 * sum_gz + sum_zz) / count**2
    bias_sq[:, case.reference] = 0
    return {
        "bias_sq": bias_sq,
        "variance": case.batch_size / (count - 1) * (gg - sum_gg / count),
        "norm_sq": sum_gg / count**2,
        "inner": sum_gz / count**2,
    }


def _sums(gram_CMM: FloatArray, left_TM: FloatArray, right_TM: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Sum over all pairs, and over m with itself (of the left weights): (T, C) each."""
    pairs = np.stack([((left_TM @ gram_MM) * right_TM).sum(1) for gram_MM in gram_CMM], axis=1)
    return pairs, left_TM @ np.diagonal(gram_CMM, axis1=1, axis2=2).T


def _moments(
    case: Case,
    count: FloatArray | int,
    sums: tuple[FloatArray, FloatArray],
    each: tuple[FloatArray, FloatArray],
    *,
    unbiased: bool,
) -> dict[str, FloatArray]:
    """Moments (..., C) from <sum a, sum b> and sum <a_m, b_m> of gg and gz, in arrays (..., C)."""
    (sum_gg, sum_gz), (gg, gz) = sums, each
    reference = [case.reference]
    sum_dd = sum_gg - 2 * sum_gz + sum_gg[..., reference]
    dd = gg - 2 * gz + gg[..., reference]
    pairs, drop = (count * (count - 1), 1) if unbiased else (count**2, 0)
    moments = {
        "bias_sq": (sum_dd - drop * dd) / pairs,
        "variance": case.batch_size / (count - 1) * (gg - sum_gg / count),
        "norm_sq": (sum_gg - drop * gg) / pairs,
        "inner": (sum_gz - drop * gz) / pairs,
    }
    moments["bias_sq"][..., case.reference] = 0
    return moments


@dataclass(frozen=True)
class Draws:
    """Sub-batches (T, N) in the order in which each trial draws them, out of `sub_batches`."""

    order_TN: Index
    sub_batches: int

    @classmethod
    def resampled(cls, trials: int, sub_batches: int, most: int, seed: int) -> Draws:
        """`most` draws with replacement."""
        return cls(np.random.default_rng(seed).integers(sub_batches, size=(trials, most)), sub_batches)

    @classmethod
    def shuffled(cls, trials: int, sub_batches: int, seed: int) -> Draws:
        """All sub-batches in random orders."""
        random = np.random.default_rng(seed)
        return cls(np.stack([random.permutation(sub_batches) for _ in range(trials)]), sub_batches)

    def weights(self, start: int, stop: int) -> FloatArray:
        """How often each sub-batch is among draws number start ... stop: (T, M)."""
        weights_TM = np.zeros((len(self.order_TN), self.sub_batches))
        drawn_TN = self.order_TN[:, start:stop]
        np.add.at(weights_TM, (np.arange(len(drawn_TN))[:, None], drawn_TN), 1.0)
        return weights_TM


@dataclass(frozen=True)
class Judge:
    """The truth that choices are held against.

    `score_C` decides which strategy is best and which are within 5 %; `apart_TC` and `bias_sq_TC` are the scores
    and biases of each trial's truth.
    """

    score_C: FloatArray
    apart_TC: FloatArray
    bias_sq_TC: FloatArray
    best: int
    lower_is_better: bool

    @classmethod
    def population(cls, case: Case, trials: int) -> Judge:
        """The measured sub-batches as the whole population: their own means, no error."""
        moments = paired_moments(case, np.ones((1, case.sub_batches)), unbiased=False)
        score_1C = case.score(moments)
        apart_TC, bias_sq_TC = (np.repeat(values, trials, 0) for values in (score_1C, moments["bias_sq"]))
        return cls(score_1C[0], apart_TC, bias_sq_TC, int(case.best(score_1C[0])), case.lower_is_better)

    @classmethod
    def second_half(cls, case: Case, draws: Draws) -> Judge:
        """Unbiased estimates from the second half of each trial's order; which is best, from all sub-batches."""
        score_C = case.score(paired_moments(case, np.ones((1, case.sub_batches)), unbiased=True))[0]
        half = paired_moments(case, draws.weights(case.sub_batches // 2, case.sub_batches), unbiased=True)
        return cls(score_C, case.score(half), half["bias_sq"], int(case.best(score_C)), case.lower_is_better)

    def quality(self, choice_T: Index) -> dict[str, float]:
        """Of T choices: share of the best strategy (`best`), share within 5 % of its score (`near`), and `regret`.

        The regret is the mean shortfall against the best strategy as a share of its mean score, both in the
        trials' own truths; with a truth that has errors it may come out negative.
        """
        sign = -1 if self.lower_is_better else 1
        shortfall_C = sign * (self.score_C[self.best] - self.score_C) / abs(self.score_C[self.best])
        of_choice_T = np.take_along_axis(self.apart_TC, choice_T[:, None], 1)[:, 0]
        of_best_T = self.apart_TC[:, self.best]
        return {
            "best": float((choice_T == self.best).mean()),
            "near": float((shortfall_C[choice_T] <= 0.05).mean()),
            "regret": float((sign * (of_best_T - of_choice_T)).mean() / abs(of_best_T.mean())),
        }


def score_errors(case: Case) -> FloatArray:
    """Jackknife standard errors (C) of the unbiased scores of all sub-batches."""
    count = case.sub_batches
    (look,) = looks_of(case, Draws(np.arange(count)[None], count), [count], sketch=False)
    deleted_MC = look.deleted_TNC[0]
    return np.asarray(np.sqrt((count - 1) / count * ((deleted_MC - deleted_MC.mean(0)) ** 2).sum(0)))


def fixed_allocation(case: Case, draws: Draws, estimator: str, count: int) -> tuple[Index, FloatArray]:
    """Choices (T) from `count` sub-batches per cell, and estimates of bias_sq (T, C).

    The independent plug-in takes its `count` for the strategies first, then another `count` for the reference.
    """
    drawn_TM = draws.weights(0, count)
    if estimator == INDEPENDENT:
        moments = independent_moments(case, draws.weights(count, 2 * count), drawn_TM)
    else:
        moments = paired_moments(case, drawn_TM, unbiased=estimator == UNBIASED)
    return case.best(case.score(moments)), moments["bias_sq"]


@dataclass(frozen=True)
class Look:
    """What a race sees after `count` sub-batches: scores (T, C), and with one sub-batch left out (T, N, C)."""

    count: int
    score_TC: FloatArray
    deleted_TNC: FloatArray


def looks_of(case: Case, draws: Draws, counts: Sequence[int], *, sketch: bool) -> list[Look]:
    """Exact scores, and left-out scores exactly or as the library has them, from its sketch."""
    gg_CMM, gz_CMM = (case.sketch_gg_CMM, case.sketch_gz_CMM) if sketch else (case.gg_CMM, case.gz_CMM)
    looks = []
    for count in counts:
        weights_TM = draws.weights(0, count)
        drawn_TN = draws.order_TN[:, :count]
        sum_gg, gg = _left_out(gg_CMM, weights_TM, drawn_TN)
        sum_gz, gz = _left_out(gz_CMM, weights_TM, drawn_TN)
        deleted = case.score(_moments(case, count - 1, (sum_gg, sum_gz), (gg, gz), unbiased=True))
        score_TC = case.score(paired_moments(case, weights_TM, unbiased=True))
        looks.append(Look(count, score_TC, deleted))
    return looks


def _left_out(gram_CMM: FloatArray, weights_TM: FloatArray, drawn_TN: Index) -> tuple[FloatArray, FloatArray]:
    """Sums over all pairs of drawn sub-batches, and over each with itself, without one of them: (T, N, C) each."""
    sums, each = [], []
    for gram_MM in gram_CMM:
        row_TN = np.take_along_axis(weights_TM @ (gram_MM + gram_MM.T), drawn_TN, 1)
        own_TN = np.diagonal(gram_MM)[drawn_TN]
        sums.append(row_TN.sum(1, keepdims=True) / 2 - row_TN + own_TN)
        each.append(own_TN.sum(1, keepdims=True) - own_TN)
    return np.stack(sums, -1), np.stack(each, -1)


@dataclass(frozen=True)
class Race:
    """Outcome of T races: the best of those that were left, the best of all last scores, sub-batches per cell."""

    choice_T: Index
    choice_of_all_T: Index
    count_TC: FloatArray
    decided: float


def race(case: Case, looks: Sequence[Look], rule: RaceRule) -> Race:
    """Run the library's rule over precomputed looks, which must hold all of `rule.looks()`."""
    seen = {look.count: look for look in looks}
    trials, strategies = looks[0].score_TC.shape
    last_TC, count_TC = np.full((trials, strategies), np.nan), np.zeros((trials, strategies))
    choice_T, decided = np.zeros(trials, dtype=np.int64), 0
    for t in range(trials):
        live_C = np.ones(strategies, dtype=bool)
        for count in rule.looks():
            look = seen[count]
            score_C = np.where(live_C, look.score_TC[t], np.nan)
            last_TC[t, live_C], count_TC[t, live_C] = score_C[live_C], count
            count_TC[t, case.reference] = count  # every strategy is measured against the reference
            choice_T[t] = case.best(score_C)
            live_C = contenders(
                score_C,
                look.deleted_TNC[t],
                lower_is_better=case.lower_is_better,
                tolerance=rule.tolerance,
                confidence=rule.confidence,
            )
            if live_C.sum() <= 1:
                decided += 1
                break
    return Race(choice_T, case.best(last_TC), count_TC, decided / trials)

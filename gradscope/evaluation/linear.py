"""Linear probe: a classifier on frozen features, its learning rate or penalty chosen on a tenth held out.

The candidates are compared on a tenth of the *training* images that none of them was fitted on; the best one is
fitted anew on all training images and only then meets the test images. Features are extracted once, from images
without augmentation: published probes crop and flip anew in every epoch.

Shapes: N training image, M test image, B image of a batch, D feature, C class, R learning rate or penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradscope.errors import UsageError
from gradscope.evaluation.examples import Examples, check_numbers, held_out_split, training_examples
from gradscope.evaluation.features import Report

SOLVERS = ("lbfgs", "sgd")
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class ProbeResult:
    """`accuracy` on the test images of the candidate `chosen` by `held_out`, each candidate's on the held-out tenth.

    Accuracies in [0, 1]. Candidates are learning rates (at a batch of 256) for the solver "sgd", penalties for
    "lbfgs". A single candidate needs no choice, and `held_out` is empty.
    """

    solver: str
    accuracy: float
    chosen: float
    held_out: dict[float, float]


def linear_probe(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    *,
    solver: str = "lbfgs",
    candidates: Sequence[float] | None = None,
    standardise: bool = True,
    iterations: int = 200,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    report: Report | None = None,
) -> ProbeResult:
    """Choose a penalty ("lbfgs") or a learning rate ("sgd") on a held-out tenth, fit, and score on the test images.

    `candidates`: the values to choose from, by default PENALTIES or RATES; of equals the first is taken.
    `standardise`: scale features by their statistics over the images fitted on, as BatchNorm1d(affine=False).
    `iterations` concern "lbfgs"; `epochs` and `batch_size` "sgd". `seed` draws the held-out tenth and the order of
    the batches. Computed on the device of `train_ND`. Raises UsageError for an unknown solver or values out of range.
    """
    if solver not in SOLVERS:
        raise UsageError(f"solver={solver!r}: choose one of {', '.join(SOLVERS)}")
    values = tuple(candidates if candidates is not None else PENALTIES if solver == "lbfgs" else RATES)
    if not values or not all(0 < value < math.inf or (value == 0 and solver == "lbfgs") for value in values):
        raise UsageError(f"candidates={values}: give one or more positive numbers")
    for name, value in (("iterations", iterations), ("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name}={value}: it must be at least 1")

    check_numbers(test_MD, test_labels_M)

    def fit(training: Examples, values: Sequence[float], begin: float, end: float) -> tuple[Tensor, Tensor]:
        def progress(fraction: float, text: str) -> None:
            if report is not None:
                report(begin + (end - begin) * fraction, text)

        if solver == "sgd":
            return fit_sgd(training, rates=values, epochs=epochs, batch_size=batch_size, seed=seed, report=progress)
        weights, biases = [], []
        for number, penalty in enumerate(values):
            weight_CD, bias_C = fit_lbfgs(training, penalty=penalty, iterations=iterations)
            weights.append(weight_CD)
            biases.append(bias_C)
            progress((number + 1) / len(values), f"linear probe: penalty {penalty:g}")
        return torch.stack(weights), torch.stack(biases)

    held_out: dict[float, float] = {}
    if len(values) > 1:
        fit_rows_N, held_rows_N = held_out_split(train_labels_N, seed=seed)
        training = training_examples(train_ND, train_labels_N, fit_rows_N, standardise=standardise)
        weight_RCD, bias_RC = fit(training, values, 0.0, 0.8)
        held = accuracies(training.like(train_ND, train_labels_N, held_rows_N), weight_RCD, bias_RC)
        held_out = dict(zip(values, held, strict=True))
    chosen = max(values, key=lambda value: held_out.get(value, 0.0))
    training = training_examples(train_ND, train_labels_N, standardise=standardise)
    fitted = fit(training, (chosen,), 0.8 if held_out else 0.0, 1.0)
    accuracy = accuracies(training.like(test_MD, test_labels_M), *fitted)[0]
    return ProbeResult(solver, accuracy, chosen, held_out)


def linear_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    *,
    penalty: float = 1e-4,
    iterations: int = 200,
) -> float:
    """Accuracy in [0, 1] of multinomial logistic regression on standardised features, fitted by L-BFGS."""
    arrays = (train_ND, train_labels_N, test_MD, test_labels_M)
    return linear_probe(*arrays, candidates=(penalty,), iterations=iterations).accuracy


def fit_lbfgs(training: Examples, *, penalty: float = 1e-4, iterations: int = 200) -> tuple[Tensor, Tensor]:
    """Weights (C, D) and biases (C,) that minimise mean cross-entropy + penalty / 2 · ‖weights‖², by L-BFGS."""
    weight_CD = training.mean_D.new_zeros(training.classes, len(training.mean_D)).requires_grad_()
    bias_C = training.mean_D.new_zeros(training.classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight_CD, bias_C], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe"
    )
    parts = training.parts()
    kept = [training.batch(parts[0])] if len(parts) == 1 else None  # standardised once where that is little memory

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = penalty / 2 * weight_CD.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach()
        for x_BD, labels_B in kept if kept is not None else map(training.batch, parts):
            loss = F.cross_entropy(F.linear(x_BD, weight_CD, bias_C), labels_B, reduction="sum") / len(training)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight_CD.detach(), bias_C.detach()


@torch.no_grad()
def fit_sgd(
    training: Examples,
    *,
    rates: Sequence[float],
    epochs: int = 100,
    batch_size: int = 256,
    momentum: float = 0.9,
    seed: int = 0,
    report: Report | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights (R, C, D) and biases (R, C) by SGD at several learning rates at once, over the same batches.

    A rate is that at a batch of 256, scaled linearly, and falls to 0 along a cosine over the steps. Weights start
    at 0 (the problem is convex); there is no weight decay. The gradient of the mean cross-entropy is written out:
    (softmax - one-hot) xᵀ / B.
    """
    device, batch_size = training.mean_D.device, min(batch_size, len(training))
    count, classes = len(rates), training.classes
    weight_RCD = training.mean_D.new_zeros(count, classes, len(training.mean_D))
    bias_RC = training.mean_D.new_zeros(count, classes)
    weight_speed_RCD, bias_speed_RC = torch.zeros_like(weight_RCD), torch.zeros_like(bias_RC)
    rate_R = training.mean_D.new_tensor(rates) * (batch_size / 256)
    generator = torch.Generator().manual_seed(seed)
    images_B = torch.arange(batch_size, device=device)
    steps, done = epochs * (len(training) // batch_size), 0
    for epoch in range(epochs):
        order_N = training.rows_M[torch.randperm(len(training), generator=generator).to(device)]
        for rows_B in torch.split(order_N, batch_size)[: len(training) // batch_size]:
            x_BD, labels_B = training.batch(rows_B)
            logits_BRC = (x_BD @ weight_RCD.flatten(0, 1).T).view(batch_size, count, classes) + bias_RC
            error_BRC = logits_BRC.softmax(2)
            error_BRC[images_B, :, labels_B] -= 1
            error_BRC /= batch_size
            weight_speed_RCD.mul_(momentum).add_((error_BRC.flatten(1).T @ x_BD).view_as(weight_RCD))
            bias_speed_RC.mul_(momentum).add_(error_BRC.sum(0))
            now_R1 = rate_R[:, None] * ((1 + math.cos(math.pi * done / steps)) / 2)
            weight_RCD.sub_(now_R1[:, :, None] * weight_speed_RCD)
            bias_RC.sub_(now_R1 * bias_speed_RC)
            done += 1
        if report is not None:
            report((epoch + 1) / epochs, f"linear probe: epoch {epoch + 1} of {epochs}")
    return weight_RCD, bias_RC


@torch.no_grad()
def accuracies(testing: Examples, weight_RCD: Tensor, bias_RC: Tensor) -> list[float]:
    """Accuracy in [0, 1] of each of R classifiers; 0 for one whose weights are not finite."""
    right = [0] * len(bias_RC)
    for rows_B in testing.parts():
        x_BD, labels_B = testing.batch(rows_B)
        for r, (weight_CD, bias_C) in enumerate(zip(weight_RCD, bias_RC, strict=True)):
            right[r] += int((F.linear(x_BD, weight_CD, bias_C).argmax(1) == labels_B).sum())
    finite_R = weight_RCD.flatten(1).isfinite().all(1) & bias_RC.isfinite().all(1)
    return [count / len(testing) if finite else 0.0 for count, finite in zip(right, finite_R.tolist(), strict=True)]

"""kNN against explicit loops; the probes against torch's own SGD, SciPy's optimizer and BatchNorm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from gradscope.data import load_data
from gradscope.errors import UsageError
from gradscope.evaluation import ProbeResult, examples, knn_accuracies, knn_accuracy, linear_accuracy, linear_probe
from gradscope.evaluation.examples import held_out_split, training_examples
from gradscope.evaluation.linear import accuracies, fit_lbfgs, fit_sgd

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def blobs(*, count: int = 300, classes: int = 3, width: int = 5, noise: float = 0.3, seed: int = 0) -> Problem:
    """Clouds around random centres, in double precision: two thirds for training, one for testing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = 3 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    features = centres[labels] + noise * torch.randn(count, width, generator=generator, dtype=torch.float64)
    cut = 2 * count // 3
    return features[:cut], labels[:cut], features[cut:], labels[cut:]


def test_knn_is_a_weighted_vote_of_the_nearest() -> None:
    train, labels, test, test_labels = blobs(count=150, noise=3.0)
    found = {}
    for temperature in (0.03, 0.06, 1.0):
        right = dict.fromkeys((1, 4, 30, 100), 0)
        for x, label in zip(test, test_labels, strict=True):
            cosine = (train @ x / (train.norm(dim=1) * x.norm())).tolist()
            nearest = sorted(range(len(train)), key=lambda i: -cosine[i])
            for k in right:
                votes = [
                    sum(math.exp(cosine[i] / temperature) for i in nearest[:k] if labels[i] == c) for c in range(3)
                ]
                right[k] += votes.index(max(votes)) == label
        expected = {k: count / len(test) for k, count in right.items()}
        found[temperature] = expected
        arrays = (train, labels, test, test_labels)
        for numbers in (1, 350, 10**6):  # one test image at a time, three, all
            accuracies = knn_accuracies(*arrays, ks=(30, 1, 100, 4), temperature=temperature, chunk_numbers=numbers)
            assert accuracies == expected
        assert knn_accuracy(*arrays, k=30, temperature=temperature) == expected[30]
    assert len({tuple(expected.values()) for expected in found.values()}) == 3


def test_a_sharp_temperature_is_the_nearest_neighbour_alone() -> None:
    arrays = blobs(count=60, noise=3.0)
    assert knn_accuracy(*arrays, k=40, temperature=1e-5) == knn_accuracy(*arrays, k=1) != knn_accuracy(*arrays, k=40)


def test_knn_of_raw_pixels_on_fashion_mnist() -> None:
    """20 neighbours of 8,000 images, some of them counted again by NumPy in double precision and by sorting."""
    data = load_data("fashion-mnist-10k")
    train, test = (
        data.plain(part, torch.arange(n)).flatten(1) / 255
        for part, n in (("train", data.train_count), ("test", data.test_count))
    )
    found = knn_accuracy(train, data.train_labels, test, data.test_labels)
    assert found == pytest.approx(0.792, abs=0.0011)  # two images of near ties
    train, test = ((x - data.mean[0]) / data.std[0] for x in (train, test))
    found = knn_accuracy(train, data.train_labels, test, data.test_labels)
    assert found == pytest.approx(0.8185, abs=0.0011)
    a, b = (x.double().numpy() for x in (train, test[:300]))
    similarity = (b / np.linalg.norm(b, axis=1, keepdims=True)) @ (a / np.linalg.norm(a, axis=1, keepdims=True)).T
    votes = np.zeros((300, 10))
    for row, nearest in enumerate(np.argsort(-similarity, axis=1)[:, :20]):
        np.add.at(votes[row], data.train_labels[nearest], np.exp(similarity[row, nearest] / 0.07))
    right = (votes.argmax(1) == data.test_labels[:300].numpy()).mean()
    assert knn_accuracy(train, data.train_labels, test[:300], data.test_labels[:300]) == pytest.approx(right, abs=0.004)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ks": (41,)}, "k=41 neighbours: choose between 1 and the 40"),
        ({"ks": (0,)}, "k=0 neighbours"),
        ({"ks": ()}, "no k given"),
        ({"ks": (5,), "temperature": 0.0}, r"temperature=0.0 must be a positive"),
        ({"ks": (5,), "temperature": float("nan")}, r"temperature=nan"),
    ],
)
def test_knn_out_of_range_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        knn_accuracies(*blobs(count=60), **values)  # type: ignore[arg-type]


def test_features_and_labels_of_different_numbers_are_refused() -> None:
    train, labels, test, test_labels = blobs(count=60)
    with pytest.raises(UsageError, match=r"test features must be \(N, D\) and labels"):
        knn_accuracy(train, labels, test[:-1], test_labels)
    with pytest.raises(UsageError, match=r"not \(20, 5\) and \(19,\)"):
        linear_probe(train, labels, test, test_labels[:-1])


def test_the_batched_sgd_is_torch_s_at_each_rate() -> None:
    train, labels, _, _ = blobs(count=105, noise=2.0)  # 70 images: the last 6 of an epoch are left out
    training = training_examples(train, labels)
    rates, epochs, batch_size = (0.02, 0.5, 40.0), 5, 16
    weights, biases = fit_sgd(training, rates=rates, epochs=epochs, batch_size=batch_size, seed=3)
    x = (train - train.mean(0)) / (train.var(0, correction=0) + 1e-5).sqrt()
    for rate, weight, bias in zip(rates, weights, biases, strict=True):
        layer = nn.Linear(5, 3, dtype=torch.float64)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * batch_size / 256, momentum=0.9)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * 4)
        generator = torch.Generator().manual_seed(3)
        for _ in range(epochs):
            for rows in torch.randperm(70, generator=generator).split(16)[:4]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(x[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                decay.step()
        torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(bias, layer.bias.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_lbfgs_reaches_the_minimum_that_scipy_finds(monkeypatch: pytest.MonkeyPatch, penalty: float) -> None:
    train, labels, _, _ = blobs(count=150, noise=2.0)
    y = np.eye(3)[labels.numpy()]
    x = ((train - train.mean(0)) / (train.var(0, correction=0) + 1e-5).sqrt()).numpy()

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = theta[:15].reshape(3, 5), theta[15:]
        logits = x @ weight.T + bias
        logits = logits - logits.max(1, keepdims=True)
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        value = -np.log((share * y).sum(1)).mean() + penalty / 2 * (weight**2).sum()
        error = (share - y) / len(x)
        return value, np.concatenate([(error.T @ x + penalty * weight).ravel(), error.sum(0)])

    best = minimize(objective, np.zeros(18), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    for numbers in (10**6, 80):  # all at once; ten images at a time
        monkeypatch.setattr(examples, "CHUNK_NUMBERS", numbers)
        weight, bias = fit_lbfgs(training_examples(train, labels), penalty=penalty, iterations=500)
        value, slope = objective(np.concatenate([weight.numpy().ravel(), bias.numpy()]))
        assert value == pytest.approx(best.fun, abs=1e-8)
        assert abs(slope).max() < 1e-4
        np.testing.assert_allclose(weight.numpy(), best.x[:15].reshape(3, 5), atol=3e-3)


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_what_is_separable_is_recovered_and_noise_is_not(solver: str) -> None:
    train, labels, test, test_labels = blobs()
    found = linear_probe(train, labels, test, test_labels, solver=solver, epochs=30)
    assert found.accuracy == 1.0 and max(found.held_out.values()) == 1.0 and found.solver == solver
    nothing = torch.randn(200, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert linear_probe(nothing, labels, test, test_labels, solver=solver, epochs=30).accuracy < 0.8
    raw = linear_probe(100 * train + 1000, labels, 100 * test + 1000, test_labels, solver=solver, epochs=30)
    assert raw.accuracy == 1.0  # standardised, whatever the features' scale


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_the_choice_does_not_depend_on_the_test_images(solver: str) -> None:
    train, labels, test, test_labels = blobs(noise=12.0, width=40, classes=5, seed=3)

    def probe(features: Tensor, targets: Tensor) -> ProbeResult:
        candidates = (1e-3, 1e-1, 3.0)
        return linear_probe(
            train, labels, features, targets, solver=solver, candidates=candidates, epochs=5, iterations=30
        )

    first = probe(test, test_labels)
    assert len(set(first.held_out.values())) > 1
    assert first.chosen == max(first.held_out, key=lambda value: first.held_out[value])
    other = test_labels[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]
    for features, targets in ((test, other), (torch.full_like(test, math.nan), test_labels)):
        again = probe(features, targets)
        assert (again.chosen, again.held_out) == (first.chosen, first.held_out)
        assert again.accuracy != first.accuracy


def test_what_is_held_out_is_not_fitted_on_and_is_a_tenth_of_every_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 20)
    fitted, held = held_out_split(labels, seed=1)
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(160))
    assert torch.bincount(labels[held]).tolist() == [10, 4, 2]
    assert not torch.equal(held, held_out_split(labels, seed=2)[1])
    with pytest.raises(UsageError, match="9 labelled training images are too few"):
        held_out_split(labels[:9])
    # Labels that cannot be learned but by heart: a candidate judged on what it was fitted on would be near 1.
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(160, 400, generator=generator), torch.randint(0, 4, (160,), generator=generator)
    found = linear_probe(features, targets, features, targets, candidates=(1e-5, 1e-4))
    assert max(found.held_out.values()) < 0.7 and found.accuracy == 1.0


def test_standardising_is_batch_norm_without_parameters() -> None:
    train, labels, test, test_labels = blobs(noise=2.0)
    train[:, 2] = 7.0  # a feature that is constant
    rows = torch.arange(0, 200, 3)
    training = training_examples(train, labels, rows)
    torch.testing.assert_close(training.batch(rows)[0], nn.BatchNorm1d(5, affine=False).double()(train[rows]))
    x, y = training.like(test, test_labels).batch(torch.tensor([4, 1]))
    spread = (train[rows].var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(x, (test[[4, 1]] - train[rows].mean(0)) / spread)
    assert torch.equal(y, test_labels[[4, 1]])
    assert torch.equal(training_examples(train, labels, standardise=False).batch(rows)[0], train[rows])


def test_one_candidate_needs_no_choice() -> None:
    arrays = blobs(noise=4.0)
    found = linear_probe(*arrays, candidates=(1e-4,))
    assert found.held_out == {} and found.chosen == 1e-4 and found.accuracy == linear_accuracy(*arrays)


def test_a_rate_that_diverged_scores_nothing() -> None:
    train, labels, _, _ = blobs()
    training = training_examples(train, labels)
    weight, bias = torch.zeros(2, 3, 5, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    weight[1, 0, 0] = math.nan
    assert accuracies(training, weight, bias) == [pytest.approx(1 / 3, abs=0.01), 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solver": "adam"}, "solver='adam': choose one of lbfgs, sgd"),
        ({"candidates": ()}, "give one or more positive numbers"),
        ({"candidates": (0.0,), "solver": "sgd"}, "give one or more positive numbers"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_probes_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        linear_probe(*blobs(count=60), **values)  # type: ignore[arg-type]

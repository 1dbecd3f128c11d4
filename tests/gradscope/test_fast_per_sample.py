"""The fast per-sample path against a loop of autograd over the loss terms, on models of many kinds, in float64."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradscope.engines.fast import PerSampleStream, per_sample_moments
from gradscope.errors import NonFiniteError, TaskError
from gradscope.models import VisionTransformer, ViTSize

K = 6
Batch = tuple[Tensor, Tensor]


def images(dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(K, 3, 16, 16, generator=generator, dtype=dtype), torch.arange(K)


def classification(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def by_loop(model: nn.Module, losses: Callable[[Any], Tensor], batch: Any) -> dict[str, Tensor]:
    """Per-sample gradients (K, P) by one backward pass per loss term."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(t, named.values(), retain_graph=True, allow_unused=True) for t in losses(batch)]
    return {
        name: torch.stack([row[i] for row in rows]).reshape(len(rows), -1)
        for i, name in enumerate(named)
        if rows[0][i] is not None
    }


def check(
    model: nn.Module,
    losses: Callable[[Any], Tensor],
    batch: Any,
    *,
    tolerance: float = 1e-8,
    loops: set[str] | None = None,
) -> Counter[str]:
    """Twice: with what the first batch finds out, and relying on it. Returns how often each method was used."""
    expected = by_loop(model, losses, batch)
    stream = PerSampleStream(model)
    for _ in range(2):
        found = stream(losses, batch)
        assert set(found.sums) == set(expected)
        for name, g_KP in expected.items():
            squares_K = g_KP.double().square().sum(1)
            assert (found.sums[name].flatten() - g_KP.sum(0)).norm() <= tolerance * g_KP.norm(), name
            assert ((found.squares[name] - squares_K).abs() <= tolerance * squares_K.clamp(min=1e-24)).all(), name
        torch.testing.assert_close(found.squares_K, sum(g.double().square().sum(1) for g in expected.values()))
    assert {name for name, method in found.methods.items() if method == "loop"} == (loops or set())
    return Counter(found.methods.values())


class Classifier(nn.Module):
    """The bundled ViT with a trainable position table and a head."""

    def __init__(self, **strategy: Any) -> None:
        super().__init__()
        self.backbone = VisionTransformer(ViTSize(24, 2, 2), image_size=16, patch=4)
        self.backbone.pos_embed.requires_grad_(True)
        nn.init.normal_(self.backbone.cls_token)
        self.head, self.strategy = nn.Linear(24, K), strategy

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x, **self.strategy))
        return out


@pytest.mark.parametrize("strategy", ["plain", "patch 8", "patch 2", "dropout", "frozen"])
def test_vision_transformer(strategy: str) -> None:
    keep = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:7] for i in range(K)])
    options: dict[str, Any] = {"patch 8": {"patch": 8}, "patch 2": {"patch": 2}, "dropout": {"keep_BK": keep}}
    model = Classifier(**options.get(strategy, {})).double()
    if strategy == "frozen":
        model.backbone.patch_embed.requires_grad_(False)
    methods = check(model, classification(model), images())
    assert set(methods) <= {"gram", "direct", "reduced"}


def test_float32_agrees_to_rounding() -> None:
    model = Classifier()
    reference = Classifier().double()
    reference.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    found = per_sample_moments(model, classification(model), images(torch.float32))
    x, y = images(torch.float32)
    expected = by_loop(reference, classification(reference), (x.double(), y))
    squares_K = sum(g.square().sum(1) for g in expected.values())
    torch.testing.assert_close(found.squares_K, squares_K, rtol=1e-5, atol=0.0)


class Reused(nn.Module):
    """A layer used three times and once more transposed, a layer scale, a bare matrix, a scalar temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(768, 16), nn.Linear(16, 16)
        self.scale, self.head = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16, K))
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for _ in range(3):
            x = x + self.scale * torch.tanh(self.layer(x))
        return x @ self.layer.weight.T @ self.head / self.temperature


class Crossed(nn.Module):
    """Cross-attention of learned queries, as attentive pooling does."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.queries = nn.Parameter(torch.randn(1, 4, 16))
        self.stem, self.head, self.batch_first = nn.Linear(48, 16), nn.Linear(16, K), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.permute(0, 2, 3, 1).reshape(len(x), 16, 48))
        queries = self.queries.expand(len(x), -1, -1)
        if not self.batch_first:
            x, queries = x.transpose(0, 1), queries.transpose(0, 1)
        out: Tensor = self.head(self.attention(queries, x, x)[0].mean(1 if self.batch_first else 0))
        return out


class Odd(nn.Module):
    """Uses without a rule of their own, and one that writes into a tensor of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bilinear, self.prelu = nn.ConvTranspose2d(3, 3, 2), nn.Bilinear(8, 8, K), nn.PReLU(8)
        self.matrix, self.mask_token = nn.Parameter(torch.randn(48, 8)), nn.Parameter(torch.randn(8))
        self.gain, self.cls = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)[:, :, :16, :16].permute(0, 2, 3, 1).reshape(len(x), 16, 48)
        x = torch.einsum("bic,cd->bid", x, self.matrix)
        x *= self.gain
        x = torch.where((torch.arange(16) % 3 == 0)[:, None], self.mask_token, x)
        tokens = x.new_zeros(len(x), 17, 8)
        tokens[:, :1] = self.cls
        tokens[:, 1:] = x
        x = self.prelu(tokens.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.bilinear(x[:, 0].contiguous(), x.mean(1))
        return out


class TwoViews(nn.Module):
    """Both views of every sample in one pass: the rows of a sample do not follow one another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift, self.norm = nn.Linear(768, 16), nn.Parameter(torch.randn(1, 16)), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        views = torch.cat([x, x.flip(-1)]).flatten(1)
        out: Tensor = self.norm(self.layer(views) + self.shift.expand(len(views), -1))
        return out


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(768, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(checkpoint(self.body, x.flatten(1), use_reentrant=False))
        return out


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=4, bias=False, padding="same"),
        nn.BatchNorm2d(8).eval(),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, groups=8, dilation=2, padding=(1, 2)),
        nn.InstanceNorm2d(8, affine=True),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 3, padding=1),
        nn.Flatten(),
        nn.LazyLinear(K),
    )


def mlp() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(768, 32), nn.Tanh(), nn.LayerNorm(32, bias=False), nn.RMSNorm(32)]
    return nn.Sequential(*layers, nn.Linear(32, K))


def parametrised() -> nn.Module:
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(768, 16))
    return nn.Sequential(
        nn.Flatten(), weight_norm, nn.Tanh(), nn.utils.parametrizations.spectral_norm(nn.Linear(16, K))
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "cnn": (cnn, set()),
    "mlp": (mlp, set()),
    "reused": (Reused, set()),
    "parametrised": (parametrised, set()),
    "attention": (lambda: Crossed(True), set()),
    "attention, batch second": (lambda: Crossed(False), set()),
    "odd": (Odd, {"cls"}),
    "checkpointed": (Checkpointed, {f"{m}.{p}" for m in ("body.0", "body.2", "head") for p in ("weight", "bias")}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    torch.manual_seed(1)
    make, loops = MODELS[name]
    model = make()
    with torch.no_grad():
        model(images(torch.float32)[0])
    model.double()
    if name == "parametrised":
        model.eval()  # spectral norm changes its buffers in training mode
    check(model, classification(model), images(), loops=loops)


class Language(nn.Module):
    """Embedding tied to the output layer, positions from a table, one encoder layer."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(20, 16, padding_idx=0), nn.Embedding(8, 16)
        self.body = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight, self.batch_first = self.embed.weight, batch_first

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        x = self.body(x) if self.batch_first else self.body(x.transpose(0, 1)).transpose(0, 1)
        out: Tensor = self.out(x)
        return out


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [5, K])  # as many tokens as samples: the dimensions look alike
def test_tied_language_model(batch_first: bool, length: int) -> None:
    torch.manual_seed(2)
    model = Language(batch_first).double()
    ids = torch.randint(0, 20, (K, length))

    def losses(ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).mT, ids, reduction="none").mean(1)

    check(model, losses, ids)


def test_two_views_and_recurrent_layers() -> None:
    torch.manual_seed(3)
    views = TwoViews().double()
    check(views, lambda batch: (lambda z: (z[:K] * z[K:]).sum(1).tanh())(views(batch[0])), images())
    recurrent = nn.LSTM(48, 8, batch_first=True).double()
    names = {name for name, _ in recurrent.named_parameters()}
    check(recurrent, lambda b: recurrent(b[0].reshape(K, 16, 48))[0].square().mean((1, 2)), images(), loops=names)


def test_contrastive_loss_against_constant_keys() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 16)).double()
    keys = F.normalize(torch.randn(K, 16, dtype=torch.float64), dim=1)

    def losses(batch: Batch) -> Tensor:
        return F.cross_entropy(
            F.normalize(model(batch[0]), dim=1) @ batch[1].T / 0.2, torch.arange(K), reduction="none"
        )

    check(model, losses, (images()[0], keys))


def test_heads_of_zeros_do_not_hide_where_the_samples_lie() -> None:
    model = Crossed(batch_first=False).double()
    nn.init.zeros_(model.head.weight)
    stream, losses, batch = PerSampleStream(model), classification(model), images()
    stream(losses, batch)
    nn.init.normal_(model.head.weight)
    found, expected = stream(losses, batch), by_loop(model, losses, batch)
    for name, g_KP in expected.items():
        torch.testing.assert_close(found.squares[name], g_KP.square().sum(1))
    assert set(found.methods.values()) <= {"gram", "direct", "reduced"}


class Gain(torch.autograd.Function):
    """A function of torch's own kind reports nothing to a mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        return signal * gain, (signal * x).sum(0)


def test_a_use_behind_the_interception_is_found_and_covered() -> None:
    """It still enters autograd's gradient: it must not be dropped, also where other uses are seen."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(768, K), nn.Parameter(torch.ones(768))

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            out: Tensor = self.layer(Gain.apply(x, self.gain) + 0.1 * self.gain)
            return out

    model = Hidden().double()
    check(model, classification(model), images(), loops={"gain"})
    stream = PerSampleStream(model)
    stream(classification(model), images())
    assert "no torch function reports it" in stream.reasons["gain"]


def test_batch_norm_in_training_mode_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, K)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TaskError, match=r"module '1' \(BatchNorm2d in training mode\) mixes.*--estimator subbatch"):
        per_sample_moments(model, classification(model), images())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_two_sided_contrastive_loss_is_refused_by_name() -> None:
    model = TwoViews().double()

    def losses(batch: Batch) -> Tensor:
        z = F.normalize(model(batch[0]), dim=1)
        logits = (z @ z.T / 0.5).masked_fill(torch.eye(2 * K, dtype=torch.bool), -9)
        terms = F.cross_entropy(logits, (torch.arange(2 * K) + K) % (2 * K), reduction="none")
        return terms[:K] + terms[K:]

    with pytest.raises(TaskError, match=r"terms mix samples up to module 'norm'.*--estimator subbatch"):
        per_sample_moments(model, losses, images())


def test_everything_is_left_as_found() -> None:
    model = Classifier().double()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.backbone.norm.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    found = per_sample_moments(model, classification(model), images())
    assert not any(name.startswith("backbone.norm.") for name in found.sums)
    for name, p in model.named_parameters():
        value, requires_grad = before[name]
        assert torch.equal(p, value) and p.requires_grad == requires_grad and not p._backward_hooks
        assert p.grad is None or name == "head.weight"
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))


def test_a_pass_leaves_no_circles_that_hold_its_graph() -> None:
    """Memory must not wait for the garbage collector: a graph is as large as all activations."""
    model = Classifier().double()
    stream, losses, batch = PerSampleStream(model), classification(model), images()
    stream(losses, batch)
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        stream(losses, batch)
        gc.collect()
        assert not [value for value in gc.garbage if isinstance(value, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_losses_are_checked() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, K)).double()
    with pytest.raises(TaskError, match=r"shape \(\) for 6 samples; return one loss per sample"):
        per_sample_moments(model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), images())
    with pytest.raises(NonFiniteError, match="loss of sample 0 is nan"):
        per_sample_moments(model, lambda batch: model(batch[0]).sum(1) * float("nan"), images())

"""Methods on a very small ViT, views for them, and the sequence lengths that they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.config import Setting, TrainConfig
from gradscope.data import ImageData, image_data, views_of
from gradscope.methods import Method, MethodSettings, new_method
from gradscope.models import VisionTransformer, ViTSize

SIZE = ViTSize(width=16, depth=2, heads=2, mlp_ratio=2.0)
SMALL = 12  # pixels of DINO's small crops
TEMPERATURE = {"mocov3": 0.2, "simclr": 0.1, "dino": 0.1}


def make_method(
    name: str,
    *,
    patch: int = 4,
    double: bool = True,
    norm: bool = True,
    drop_path: float = 0.0,
    positions: str = "sincos",
    seed: int = 0,
    **settings: Any,
) -> Any:  # a Method, whose parts tests reach into
    """A method in training mode on images (1, 28, 28); `norm=False` puts Identity in the place of BatchNorm."""
    values: dict[str, Any] = {
        "hidden": 12, "width": 8, "temperature": TEMPERATURE[name], "momentum": 0.9,
        "freeze_patch_embed": name == "mocov3", "prototypes": 20, "small_crops": 2 if name == "dino" else 0,
        "small_size": SMALL, **settings,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = VisionTransformer(
            SIZE, image_size=28, patch=patch, channels=1, positions=positions, drop_path=drop_path
        )
        method = new_method(name, backbone, MethodSettings(**values))
        with torch.no_grad():  # of the size that a trained model's have, so that a wrong term shows
            for parameter in method.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            if name == "dino":
                method.centre.add_(0.3 * torch.randn_like(method.centre))
    if not norm:
        without_norm(method)
    return (method.double() if double else method).train()


def without_norm(method: nn.Module) -> None:
    """Put Identity in the place of every BatchNorm."""
    for module in list(method.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, name, nn.Identity())


def make_views(name: str, batch: int, *, double: bool = True, seed: int = 1, small_crops: int = 2) -> list[Tensor]:
    """Two views of 28 pixels, and DINO's small crops."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [28, 28, *([SMALL] * small_crops if name == "dino" else [])]
    dtype = torch.float64 if double else torch.float32
    return [torch.randn(batch, 1, side, side, generator=generator, dtype=dtype) for side in sizes]


def value(scalar: Tensor) -> float:
    """The number of a loss that may carry a gradient."""
    return float(scalar.detach())


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(method: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every trainable parameter by name; zeros where none arrives."""
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, found, strict=True)}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    """Equal, each tensor relative to the largest number of all of them."""
    assert first.keys() == second.keys()
    scale = max(float(value.abs().max()) for value in first.values())
    assert scale > 0
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) <= tolerance * scale, name


@contextmanager
def sequence_lengths(*backbones: VisionTransformer) -> Iterator[list[list[tuple[int, int]]]]:
    """(samples, tokens) of every pass through the first block of each backbone."""
    seen: list[list[tuple[int, int]]] = [[] for _ in backbones]

    def note(rows: list[tuple[int, int]]) -> Callable[..., None]:
        return lambda module, inputs, output: rows.append((inputs[0].shape[0], inputs[0].shape[1]))

    handles = [b.blocks[0].register_forward_hook(note(rows)) for b, rows in zip(backbones, seen, strict=True)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class SmallSetting(Setting):
    """A setting whose model is a very small one; BatchNorm can be left out."""

    norm: bool = True

    def new_model(self) -> Method:
        config = self.config
        changes = {
            name: getattr(config, name)
            for name in (
                "temperature", "momentum", "freeze_patch_embed", "prototypes", "fixed_norm", "teacher_temperature",
                "teacher_temperature_start", "teacher_temperature_warmup", "centre_momentum", "small_crops",
                "freeze_last_layer",
            )
        }  # fmt: skip
        model: Method = make_method(
            config.method, patch=config.patch, double=False, norm=self.norm, drop_path=config.drop_path,
            positions=config.positions, hidden=config.head_hidden, width=config.head_width, seed=config.seed,
            small_size=config.small_crop_size(28), **changes,
        )  # fmt: skip
        return model


def random_data(count: int = 64, seed: int = 0) -> ImageData:
    """Labelled random images of 28 pixels, smooth enough to be told apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count + 30,), generator=generator)
    means = torch.randint(0, 256, (3, 1, 28, 28), generator=generator)
    noise = torch.randint(-60, 61, (count + 30, 1, 28, 28), generator=generator)
    images = (means[labels] + noise).clamp(0, 255).to(torch.uint8)
    return image_data(
        "random", train_images=images[:count], train_labels=labels[:count], test_images=images[count:],
        test_labels=labels[count:], classes=("a", "b", "c"),
    )  # fmt: skip


def small_setting(method: str, *, norm: bool = True, data: ImageData | None = None, **changes: Any) -> SmallSetting:
    """A run of seconds on random images."""
    values: dict[str, Any] = {
        "budget": 800.0, "batch_size": 16, "patch": 4, "patches": (4, 7), "dropouts": (0.0, 0.5), "head_hidden": 12,
        "head_width": 8, "temperature": TEMPERATURE[method], "freeze_patch_embed": method == "mocov3",
        "evaluations": (), "lr": 4e-3, **changes,
    }  # fmt: skip
    if method == "dino":
        values = {"small_crops": 2, "small_size": SMALL, "prototypes": 20, **values}
    config, data = TrainConfig(method=method, **values), data or random_data()
    augmentations = views_of(
        method, image_size=28, mean=data.mean, std=data.std, channels=1, small_count=config.small_crops,
        small_size=config.small_crop_size(28) if config.small_crops else None,
    )  # fmt: skip
    setting = SmallSetting(config, data, augmentations)
    object.__setattr__(setting, "norm", norm)
    return setting

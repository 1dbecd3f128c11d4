"""Full fine-tuning: every parameter of a copy of the backbone, and a classifier, trained on the labels.

Shapes: N training image, B image of a batch, S side in pixels, D width, C class.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from gradscope.data import Ahead, Augmentation, Dataset, Prepared
from gradscope.engines import derive_seed
from gradscope.errors import NonFiniteError, UsageError
from gradscope.evaluation.features import AHEAD, Report, Statistics, check_labelled, check_suits, dataset_features
from gradscope.evaluation.mixing import erase, mix, smoothed_targets
from gradscope.models import VisionTransformer
from schedulers import Decay


@dataclass(frozen=True)
class FinetuneOptions:
    """The recipe of fine-tuning; as it stands, DeiT's (Touvron et al. 2021) at MoCo-v3's 150 epochs.

    AdamW at `lr` for a batch of 512, scaled linearly, risen to linearly over `warmup_epochs` and falling to 0 along a
    cosine; `weight_decay` on all but biases, other vectors, class token and positions. A block's rate is
    `layer_decay` times that of the next, the classifier's the full one; 1 is no such decay. `smoothing` of labels,
    `mixup` and `cutmix` concentrations (0 switches off; `switch` the probability of CutMix), `drop_path` share of
    samples that skip a residual branch of the last block (linearly fewer before), `crop_scale` and `flip` of the
    random resized crop, `interpolation` "bicubic" or "bilinear", `erase` probability of random erasing.

    Not built, of DeiT's: RandAugment, repeated augmentation, and the small rates (1e-6, 1e-5) at which it begins and
    ends instead of 0. Raises UsageError for values out of range.
    """

    epochs: int = 150
    batch_size: int = 1024
    lr: float = 5e-4
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    layer_decay: float = 1.0
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    drop_path: float = 0.1
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    interpolation: str = "bicubic"
    erase: float = 0.25

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise UsageError(f"{name}={getattr(self, name)}: fine-tuning needs at least {low}")
        for name in ("lr", "weight_decay", "warmup_epochs", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)!r}: it must be a number of at least 0")
        for name in ("smoothing", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r}: it must lie in [0, 1)")
        for name in ("switch", "flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)!r}: it must lie in [0, 1]")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay={self.layer_decay!r}: it must lie in (0, 1]")

    @classmethod
    def small(cls, **changes: Any) -> FinetuneOptions:
        """For images of a few dozen pixels, a small model and minutes of training; `changes` on top.

        Five epochs of batches of 64 at the rate 2e-3 (1.6e-2 for 512), a tenth of them warm-up, and no augmentation
        but flips: in so few epochs the rest only costs accuracy (on Fashion-MNIST's 8,000 images, from a demo model's
        weights, 79.3 %, and 74.0 % with crops of half the image and more).
        """
        values: dict[str, Any] = {
            "epochs": 5, "batch_size": 64, "lr": 1.6e-2, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0,
            "crop_scale": (1.0, 1.0), "interpolation": "bilinear", "erase": 0.0,
        }  # fmt: skip
        values |= {"warmup_epochs": changes.get("epochs", values["epochs"]) / 10} | changes
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UsageError(
                f"{unknown[0]}: no option of fine-tuning; they are {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**values)


def finetune(
    backbone: VisionTransformer,
    data: Dataset,
    options: FinetuneOptions | None = None,
    *,
    statistics: Statistics | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> float:
    """Test accuracy in [0, 1] of what `finetuned` makes of a backbone; arguments and errors are its.

    Test images are seen at full length, without augmentation.
    """
    model, classifier = finetuned(backbone, data, options, statistics=statistics, seed=seed, report=report)
    with torch.no_grad():
        logits_MC = classifier(dataset_features(model, data, "test", statistics=statistics))
        return int((logits_MC.argmax(1).cpu() == data.test_labels).sum()) / data.test_count


def finetuned(
    backbone: VisionTransformer,
    data: Dataset,
    options: FinetuneOptions | None = None,
    *,
    statistics: Statistics | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> tuple[VisionTransformer, nn.Linear]:
    """A copy of the backbone, and a linear classifier from 0 on its feature, trained on all training labels.

    On the backbone's device; the backbone and torch's own random streams stay as they were. `options` default to
    `FinetuneOptions()`; `statistics`: what the input is normalised by, by default the dataset's own. Raises
    UsageError for data without labels or images that do not suit the model, NonFiniteError when the loss is.
    """
    options, statistics = options or FinetuneOptions(), statistics or data
    check_labelled(data)
    check_suits(backbone, data)
    device, classes = next(backbone.parameters()).device, len(data.classes)
    model = _trainable_copy(backbone, options.drop_path)
    classifier: nn.Linear = skip_init(nn.Linear, model.width, classes, device=device)  # type: ignore[no-untyped-call]
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    batch_size = min(options.batch_size, data.train_count)
    optimizer = torch.optim.AdamW(parameter_groups(model, classifier, options, rate=options.lr * batch_size / 512))
    full_rates = [group["lr"] for group in optimizer.param_groups]
    schedule = Decay("cosine", warmup=min(options.warmup_epochs / options.epochs, 0.5))
    view = Augmentation(
        size=data.image_size, mean=statistics.mean, std=statistics.std, crop_scale=options.crop_scale,
        crop_ratio=(3 / 4, 4 / 3), flip=options.flip, interpolation=options.interpolation,
    )  # fmt: skip
    steps_per_epoch = data.train_count // batch_size
    steps = options.epochs * steps_per_epoch

    def indices(step: int) -> Tensor:
        epoch, position = divmod(step, steps_per_epoch)
        order_N = torch.randperm(data.train_count, generator=_generator("order", seed, epoch))
        return order_N[position * batch_size : (position + 1) * batch_size]

    def prepared(step: int) -> Prepared:  # asked for steps past the last, too, which are never taken
        return data.prepare(indices(step), (view,), _generator("views", seed, step)) if step < steps else ()

    with Ahead(prepared, depth=AHEAD, workers=1) as batches:
        for step in range(steps):
            (images_BXSS,) = data.finish(batches.take(step), device)
            target_BC = smoothed_targets(data.train_labels[indices(step)].to(device), classes, options.smoothing)
            random = np.random.default_rng(derive_seed("mixing", seed, step))
            if options.erase:
                noise = torch.Generator(device=device).manual_seed(derive_seed("noise", seed, step))
                images_BXSS = erase(images_BXSS, options.erase, random, noise)
            images_BXSS, target_BC = mix(
                images_BXSS, target_BC, mixup=options.mixup, cutmix=options.cutmix, switch=options.switch, random=random
            )
            factor = schedule.factor((step + 0.5) / steps)
            for group, rate in zip(optimizer.param_groups, full_rates, strict=True):
                group["lr"] = rate * factor
            paths_RB = model.random_paths(len(images_BXSS), _generator("paths", seed, step))
            feature_BD = model(images_BXSS, paths_RB=None if paths_RB is None else paths_RB.to(device))
            loss = nn.functional.cross_entropy(classifier(feature_BD), target_BC)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if (step + 1) % steps_per_epoch == 0:
                _news(loss.item(), (step + 1) // steps_per_epoch, options, report)
    return model, classifier


def finetune_accuracy(
    backbone: VisionTransformer,
    data: Dataset,
    *,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 5e-4,
    weight_decay: float = 0.05,
    seed: int = 0,
) -> float:
    """`finetune` by the recipe for small images, `lr` being the rate at `batch_size` itself."""
    scaled = lr * 512 / batch_size
    options = FinetuneOptions.small(epochs=epochs, batch_size=batch_size, lr=scaled, weight_decay=weight_decay)
    return finetune(backbone, data, options, seed=seed)


def parameter_groups(
    model: VisionTransformer, classifier: nn.Linear, options: FinetuneOptions, *, rate: float
) -> list[dict[str, Any]]:
    """AdamW's groups: a rate for each layer where rates differ, and weight decay or none.

    Layer 0 is the embedding, i + 1 block i, depth + 1 the final norm and the classifier; the rate of layer l is
    the full one, `rate`, times `layer_decay` to the power depth + 1 - l.
    """
    depth = len(model.blocks)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in (*model.named_parameters(), *classifier.named_parameters(prefix="head")):
        if not parameter.requires_grad:
            continue
        first, second = (*name.split("."), "")[:2]
        layer = int(second) + 1 if first == "blocks" else depth + 1 if first in ("norm", "head") else 0
        decayed = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        groups.setdefault((layer if options.layer_decay < 1 else depth + 1, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate * options.layer_decay ** (depth + 1 - layer),
            "weight_decay": options.weight_decay if decayed else 0.0,
        }
        for (layer, decayed), parameters in groups.items()
    ]


def _trainable_copy(backbone: VisionTransformer, drop_path: float) -> VisionTransformer:
    """A copy in training mode of which everything but a fixed position table is trained, without old gradients."""
    model = copy.deepcopy(backbone).train().requires_grad_(True)
    model.pos_embed.requires_grad_(model.positions == "learned")
    model.zero_grad(set_to_none=True)
    model.drop_path = drop_path
    return model


def _news(loss: float, epoch: int, options: FinetuneOptions, report: Report | None) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(f"fine-tuning: the loss is {loss} after epoch {epoch}; lower lr (now {options.lr:g})")
    if report is not None:
        report(epoch / options.epochs, f"fine-tuning: epoch {epoch} of {options.epochs}, loss {loss:.3f}")


def _generator(stream: str, seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed("finetune", stream, seed, step))

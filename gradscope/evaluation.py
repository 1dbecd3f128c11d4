"""How good frozen features are: k nearest neighbours, a linear probe, and full fine-tuning.

All on full-length sequences (the reference strategy) and without augmentation.

Shapes: N training image, M test image, D feature, C class.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscope.data import ImageData
from gradscope.errors import UsageError
from gradscope.models import VisionTransformer


@torch.no_grad()
def extract_features(
    backbone: VisionTransformer, images_NCSS: Tensor, data: ImageData, *, batch_size: int = 250
) -> Tensor:
    """Class-token features (N, D) of uint8 images, in evaluation mode; the mode is put back afterwards."""
    training = backbone.training
    backbone.eval()
    try:
        return torch.cat([backbone(normalise(part, data, backbone)) for part in torch.split(images_NCSS, batch_size)])
    finally:
        backbone.train(training)


def normalise(images_BCSS: Tensor, data: ImageData, model: nn.Module) -> Tensor:
    """uint8 images as the model sees them: float32, standardised per channel, on the model's device."""
    device = next(model.parameters()).device
    mean = torch.tensor(data.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(data.std, device=device).view(1, -1, 1, 1)
    return (images_BCSS.to(device).float() / 255 - mean) / std


def knn_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy in [0, 1] of a weighted k-nearest-neighbour vote.

    Neighbours by cosine similarity s, votes exp(s / temperature), as in DINO's evaluation (Caron et al. 2021,
    appendix): k = 20, temperature 0.07. Raises UsageError when k is not in 1..N.
    """
    if not 1 <= k <= len(train_ND):
        raise UsageError(f"k={k} neighbours: choose between 1 and the {len(train_ND)} training images")
    train_ND, test_MD = F.normalize(train_ND, dim=1), F.normalize(test_MD, dim=1)
    train_labels_N, test_labels_M = train_labels_N.to(train_ND.device), test_labels_M.to(train_ND.device)
    classes = int(train_labels_N.max()) + 1
    correct = 0
    for part_MD, labels_M in zip(torch.split(test_MD, 1000), torch.split(test_labels_M, 1000), strict=True):
        similarity_MK, neighbour_MK = (part_MD @ train_ND.T).topk(k, dim=1)
        votes_MC = torch.zeros(len(part_MD), classes, device=part_MD.device)
        votes_MC.scatter_add_(1, train_labels_N[neighbour_MK], (similarity_MK / temperature).exp())
        correct += int((votes_MC.argmax(1) == labels_M).sum())
    return correct / len(test_MD)


def linear_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    *,
    penalty: float = 1e-4,
    iterations: int = 200,
) -> float:
    """Accuracy in [0, 1] of multinomial logistic regression on standardised features, fitted by L-BFGS.

    `penalty` times half the squared norm of the weights is added to the mean cross-entropy.
    """
    mean_D, std_D = train_ND.mean(0), train_ND.std(0).clamp_min(1e-6)
    train_ND, test_MD = (train_ND - mean_D) / std_D, (test_MD - mean_D) / std_D
    train_labels_N, test_labels_M = train_labels_N.to(train_ND.device), test_labels_M.to(train_ND.device)
    classes = int(train_labels_N.max()) + 1
    weight_CD = torch.zeros(classes, train_ND.shape[1], device=train_ND.device, requires_grad=True)
    bias_C = torch.zeros(classes, device=train_ND.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CD, bias_C], max_iter=iterations, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = (
            F.cross_entropy(F.linear(train_ND, weight_CD, bias_C), train_labels_N)
            + penalty / 2 * weight_CD.square().sum()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float((F.linear(test_MD, weight_CD, bias_C).argmax(1) == test_labels_M).float().mean())


def finetune_accuracy(
    backbone: VisionTransformer,
    data: ImageData,
    *,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 5e-4,
    weight_decay: float = 0.05,
    seed: int = 0,
) -> float:
    """Test accuracy in [0, 1] after training a copy of the backbone and a linear classifier on all labels.

    AdamW at a rate that rises to `lr` over the first tenth of the steps and falls again, both along a cosine;
    no augmentation but flips.
    """
    device = next(backbone.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(backbone).train().requires_grad_(True)
    model.pos_embed.requires_grad_(False)
    classifier = nn.Linear(model.width, len(data.classes)).to(device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    parameters = [p for p in (*model.parameters(), *classifier.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    steps = max(1, epochs * (len(data.train_images) // batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    order_N = torch.cat([torch.randperm(len(data.train_images), generator=generator) for _ in range(epochs)])
    for indices_B in torch.split(order_N, batch_size)[:steps]:
        images_BCSS = normalise(data.train_images[indices_B], data, model)
        flip_B = torch.rand(len(indices_B), generator=generator).to(device) < 0.5
        images_BCSS = torch.where(flip_B[:, None, None, None], images_BCSS.flip(-1), images_BCSS)
        loss = F.cross_entropy(classifier(model(images_BCSS)), data.train_labels[indices_B].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        features_MD = extract_features(model, data.test_images, data)
        return float((classifier(features_MD).argmax(1).cpu() == data.test_labels).float().mean())

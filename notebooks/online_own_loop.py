"""Let a training loop of your own choose its acceleration while it runs: it gets the five lines marked `# +`.

The loss can already be taken of fewer pixels; the grid says of how many, and `cost_of` what that costs.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from gradscope import AdaptiveController, AdaptiveRule, Grid, LoopTask, Strategy
from gradscope.data import load_data

BUDGET = "24k"  # units: 8,000 images of 28 pixels forward and backward, or more of fewer pixels
GRID = Grid({"resolution": (7, 14, 28)}, reference=Strategy(resolution=28))
RULE = AdaptiveRule(overhead=0.1, sub_batch=16)  # so short a run needs small probes, and a larger share for them
data = load_data("fashion-mnist-10k")


def loss_of(model, batch, strategy, generator=None):
    images, labels = batch
    return cross_entropy(model(interpolate(images, size=strategy["resolution"])), labels)


def cost_of(strategy):  # units per image: forward 1, backward 2, for the pixels that are left
    return 3 * (strategy["resolution"] / 28) ** 2


def batches(size, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(data.train_images), (size,), generator=generator)
        yield data.train_images[chosen] / 255, data.train_labels[chosen]


def train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 32, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    task = LoopTask(GRID, loss=loss_of, batches=batches, cost=cost_of)  # +
    controller = AdaptiveController(task, model, optimizer, budget=BUDGET, batch_size=64, rule=RULE, report=print)  # +
    for step, batch in enumerate(batches(64, seed=1)):
        if controller.finished: break  # + # noqa: E701  # fmt: skip
        strategy = controller.at(step)  # +
        loss = loss_of(model, batch, strategy)
        loss.backward()
        controller.observe(step)  # +
        optimizer.step()
        optimizer.zero_grad()
    return model, controller


def accuracy(model):
    with torch.no_grad():
        return (model(data.test_images / 255).argmax(1) == data.test_labels).float().mean().item()


if __name__ == "__main__":
    model, controller = train()
    print(f"{controller.step} steps, {controller.spent:,.0f} units, {controller.probe_units:,.0f} of them for probes")
    print(f"test accuracy {accuracy(model):.3f}")

"""Profile a model of your own: here a small convolutional network whose accelerated gradient sees fewer pixels."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from gradscope import Grid, Strategy, Task
from gradscope.data import load_data


def network():
    return nn.Sequential(nn.Conv2d(1, 32, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class MyTask(Task):
    grid = Grid({"resolution": (7, 14, 28)}, reference=Strategy(resolution=28))
    batch_size = 64

    def load(self, checkpoint):
        net = network()
        net.load_state_dict(torch.load(checkpoint, weights_only=True))
        return net

    def batches(self, size, seed):
        data, generator = load_data("fashion-mnist-10k"), torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(data.train_images), (size,), generator=generator)
            yield data.train_images[chosen] / 255, data.train_labels[chosen]

    def sample_losses(self, model, batch, strategy, generator):  # optional: allows per-sample gradients
        images, labels = batch
        return cross_entropy(model(interpolate(images, size=strategy["resolution"])), labels, reduction="none")

    def loss(self, model, batch, strategy, generator):
        return self.sample_losses(model, batch, strategy, generator).mean()

    def cost(self, strategy):  # units per sample: forward 1, backward 2, for the pixels that are left
        return 3 * (strategy["resolution"] / 28) ** 2


if __name__ == "__main__":  # stands for your own training loop: all that counts is that it saves the model now and then
    net, task, folder = network(), MyTask(), Path("ckpts")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    folder.mkdir(exist_ok=True)
    for step, batch in zip(range(201), task.batches(64, seed=0), strict=False):
        if step % 50 == 0:
            torch.save(net.state_dict(), folder / f"step-{step}.pt")
        optimizer.zero_grad()
        task.loss(net, batch, task.grid.reference, torch.Generator()).backward()
        optimizer.step()

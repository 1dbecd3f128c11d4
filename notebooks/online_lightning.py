"""Let Lightning's Trainer choose its acceleration while it runs: a small Vision Transformer that drops patch tokens."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, unfold
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl

from gradscope import AdaptiveController, AdaptiveRule, Grid, LoopTask, Strategy
from gradscope.data import load_data
from gradscope.integrations.lightning import OnlineCallback

BUDGET = "12k"  # units: 4,000 images with all tokens, forward and backward, or more with fewer tokens
GRID = Grid({"dropout": (0, 0.5, 0.75)}, reference=Strategy(dropout=0))
RULE = AdaptiveRule(overhead=0.1, sub_batch=8)  # so short a run needs small probes, and a larger share for them
data = load_data("fashion-mnist-10k")


class ViT(nn.Module):
    """Class logits from a random part of the 49 patch tokens of 4 x 4 pixels."""

    def __init__(self, width=24):
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.positions = nn.Parameter(0.02 * torch.randn(49, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images, strategy=GRID.reference, generator=None):
        tokens = self.embed(unfold(images, 4, stride=4).mT) + self.positions
        kept = round(49 * (1 - strategy["dropout"]))
        if kept < 49:
            order = torch.rand(len(tokens), 49, generator=generator).argsort(1).to(tokens.device)
            tokens = tokens.gather(1, order[:, :kept, None].expand(-1, -1, tokens.shape[2]))
        return self.head(self.blocks(tokens).mean(1))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = ViT()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self.net(images, self.strategy), labels)  # the callback sets self.strategy

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def loss_of(net, batch, strategy, generator):
    images, labels = batch
    return cross_entropy(net(images, strategy, generator), labels)


def batches(size, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(data.train_images), (size,), generator=generator)
        yield data.train_images[chosen] / 255, data.train_labels[chosen]


def cost_of(strategy):  # units per image: forward 1, backward 2, for the tokens that are left
    return 3 * round(49 * (1 - strategy["dropout"])) / 49


def train():
    pl.seed_everything(0, verbose=False)

    def make(module, optimizer):  # called when Lightning has made the optimizer
        task = LoopTask(GRID, loss=loss_of, batches=batches, cost=cost_of)
        return AdaptiveController(task, module.net, optimizer, budget=BUDGET, batch_size=32, rule=RULE, report=print)

    callback, module = OnlineCallback(make), Module()
    trainer = pl.Trainer(max_epochs=-1, accelerator="cpu", callbacks=[callback], logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    train_set = TensorDataset(data.train_images / 255, data.train_labels)
    test_set = TensorDataset(data.test_images / 255, data.test_labels)
    trainer.fit(module, DataLoader(train_set, 32, shuffle=True, drop_last=True))
    [result] = trainer.validate(module, DataLoader(test_set, 500), verbose=False)
    return callback.controller, result["accuracy"]


if __name__ == "__main__":
    controller, accuracy = train()
    print(f"{controller.step} steps, {controller.spent:,.0f} units, {controller.probe_units:,.0f} of them for probes")
    print(f"test accuracy {accuracy:.3f}")

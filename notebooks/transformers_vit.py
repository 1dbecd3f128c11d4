"""Profile a ViT of the `transformers` library with SimCLR's loss: fewer pixels, fewer tokens.

`--task transformers_vit:SimCLRTask`, for checkpoints that hold `model.state_dict()`. `LabelTask` is its
supervised sister: its loss terms are one per image, so the profiler may use per-sample gradients.
"""

import torch
from torch.nn.functional import cross_entropy, interpolate, normalize
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from gradscope import Grid, Strategy, Task
from gradscope.data import augment, load_data, mocov3_views

CONFIG = ViTConfig(image_size=28, patch_size=4, num_channels=1, hidden_size=48, num_hidden_layers=3,
                   num_attention_heads=3, intermediate_size=96, num_labels=10)  # fmt: skip


def encode(vit, images, strategy, generator):
    """Class-token features from fewer pixels and a random part of the patch tokens."""
    small = interpolate(images, size=strategy["resolution"], mode="bilinear", antialias=True)

    def drop(module, inputs, tokens):  # what the embeddings give: class token first, positions added
        count = tokens.shape[1] - 1
        order = torch.rand(len(tokens), count, generator=generator).argsort(1).to(tokens.device)
        kept = order[:, : round(count * (1 - strategy["dropout"]))] + 1
        return torch.cat([tokens[:, :1], tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))], 1)

    with vit.embeddings.register_forward_hook(drop):
        return vit(small, interpolate_pos_encoding=True).last_hidden_state[:, 0]


class SimCLRTask(Task):
    grid = Grid({"resolution": (12, 20, 28), "dropout": (0, 0.5)}, reference=Strategy(resolution=28, dropout=0))
    batch_size = 64

    def load(self, checkpoint):
        model = ViTModel(CONFIG, add_pooling_layer=False)
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.train()

    def batches(self, size, seed):
        data, generator = load_data("fashion-mnist-10k"), torch.Generator().manual_seed(seed)
        while True:
            images = data.train_images[torch.randint(len(data.train_images), (size,), generator=generator)]
            yield [augment(images, view, generator) for view in mocov3_views(28, data.mean, data.std, channels=1)]

    def loss(self, model, batch, strategy, generator):
        features = normalize(torch.cat([encode(model, view, strategy, generator) for view in batch]))
        logits = (features @ features.T / 0.2).fill_diagonal_(-torch.inf)
        partners = torch.arange(len(logits), device=logits.device).roll(len(logits) // 2)
        return cross_entropy(logits, partners)

    def cost(self, strategy):  # units per image: two views, forward 1 and backward 2, for the tokens that are left
        return 6 * (1 + round((strategy["resolution"] // 4) ** 2 * (1 - strategy["dropout"]))) / (1 + 7**2)


class LabelTask(SimCLRTask):
    def load(self, checkpoint):
        model = ViTForImageClassification(CONFIG)
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.train()

    def batches(self, size, seed):
        data, generator = load_data("fashion-mnist-10k"), torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(data.train_images), (size,), generator=generator)
            yield data.train_images[chosen] / 255, data.train_labels[chosen]

    def sample_losses(self, model, batch, strategy, generator):
        images, labels = batch
        return cross_entropy(model.classifier(encode(model.vit, images, strategy, generator)), labels, reduction="none")

    def loss(self, model, batch, strategy, generator):
        return self.sample_losses(model, batch, strategy, generator).mean()

    def cost(self, strategy):
        return super().cost(strategy) / 2

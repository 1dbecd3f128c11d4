"""Let the Trainer of transformers choose its acceleration while it runs: a ViT that is given fewer pixels."""

import tempfile

import torch
from torch.nn.functional import interpolate
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from gradscope import AdaptiveController, AdaptiveRule, Grid, LoopTask, Strategy
from gradscope.data import load_data
from gradscope.integrations.transformers import OnlineCallback

BUDGET = "12k"  # units: 4,000 images of 28 pixels forward and backward, or more of fewer pixels
GRID = Grid({"resolution": (12, 20, 28)}, reference=Strategy(resolution=28))
RULE = AdaptiveRule(overhead=0.1, sub_batch=8)  # so short a run needs small probes, and a larger share for them
CONFIG = ViTConfig(image_size=28, patch_size=4, num_channels=1, hidden_size=24, num_hidden_layers=2,
                   num_attention_heads=2, intermediate_size=48, num_labels=10)  # fmt: skip
data = load_data("fashion-mnist-10k")


class OnlineViTForImageClassification(ViTForImageClassification):
    strategy = GRID.reference  # the callback sets it for every optimizer step

    def forward(self, pixel_values, labels=None):
        small = interpolate(pixel_values, size=self.strategy["resolution"], mode="bilinear", antialias=True)
        return super().forward(small, labels=labels, interpolate_pos_encoding=True)


def loss_of(model, batch, strategy, generator):
    model.strategy = strategy  # a probe leaves the model as it was
    return model(**batch).loss


def batches(size, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(data.train_images), (size,), generator=generator)
        yield {"pixel_values": data.train_images[chosen] / 255, "labels": data.train_labels[chosen]}


def cost_of(strategy):  # units per image: forward 1, backward 2, for the tokens that are left
    return 3 * (1 + (strategy["resolution"] // 4) ** 2) / (1 + 7**2)


def rows(images, labels):
    return [{"pixel_values": image / 255, "labels": label} for image, label in zip(images, labels, strict=True)]


def train():
    torch.manual_seed(0)

    def make(model, optimizer):  # called when the Trainer has made the optimizer
        task = LoopTask(GRID, loss=loss_of, batches=batches, cost=cost_of)
        return AdaptiveController(task, model, optimizer, budget=BUDGET, batch_size=32, rule=RULE, report=print)

    callback = OnlineCallback(make)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=100_000, per_device_train_batch_size=32, dataloader_drop_last=True, learning_rate=5e-3,
            lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            OnlineViTForImageClassification(CONFIG), arguments, callbacks=[callback],
            train_dataset=rows(data.train_images, data.train_labels),
            eval_dataset=rows(data.test_images, data.test_labels),
            compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
        )  # fmt: skip
        trainer.train()
        return callback.controller, trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    controller, accuracy = train()
    print(f"{controller.step} steps, {controller.spent:,.0f} units, {controller.probe_units:,.0f} of them for probes")
    print(f"test accuracy {accuracy:.3f}")

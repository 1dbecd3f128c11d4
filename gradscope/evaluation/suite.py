"""All that is asked of one backbone on one dataset, in one call: what `gradscope evaluate` runs.

Shapes: N training image, M test image, D width, F = blocks x D feature.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from gradscope.data import Dataset
from gradscope.errors import UsageError
from gradscope.evaluation.features import Report, Statistics, check_labelled, dataset_features
from gradscope.evaluation.finetune import FinetuneOptions, finetune
from gradscope.evaluation.knn import knn_accuracies
from gradscope.evaluation.linear import linear_probe
from gradscope.models import VisionTransformer


@dataclass(frozen=True)
class Wanted:
    """Which accuracies, and how.

    `ks`: numbers of neighbours, none for no kNN. `linear`: "lbfgs" or "sgd", None for no probe; `blocks`: of how many
    last blocks it sees the class tokens; `probe_epochs`: of "sgd". `finetune`: its recipe, None for none.
    Raises UsageError when nothing is wanted.
    """

    ks: tuple[int, ...] = (20,)
    temperature: float = 0.07
    linear: str | None = None
    blocks: int = 1
    probe_epochs: int = 100
    finetune: FinetuneOptions | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ks and self.linear is None and self.finetune is None:
            raise UsageError("nothing to evaluate: give ks, linear or finetune")


@dataclass(frozen=True)
class Outcome:
    """`accuracy` in [0, 1]: "knn" ("knn_10", "knn_20" for several k), "linear", "finetune" where wanted.

    `details`: plain values on how "linear" was chosen and "finetune" was trained.
    """

    accuracy: dict[str, float]
    details: dict[str, Any]


def evaluate(
    backbone: VisionTransformer,
    data: Dataset,
    wanted: Wanted | None = None,
    *,
    statistics: Statistics | None = None,
    report: Report | None = None,
) -> Outcome:
    """Accuracies of a backbone, on full-length sequences, on the device where it is; it is left as it was.

    `statistics`: what the model's input is normalised by, by default the dataset's own. `report` is told the fraction
    of the work and a line of news. Raises UsageError for data without labels or images that do not suit the model.
    """
    wanted = wanted or Wanted()
    check_labelled(data)
    accuracy: dict[str, float] = {}
    details: dict[str, Any] = {}
    frozen = bool(wanted.ks) or wanted.linear is not None
    parts = _Parts(report, 2 * frozen + (wanted.linear is not None) + (wanted.finetune is not None))
    if frozen:
        blocks = wanted.blocks if wanted.linear else 1

        def features(part: str) -> Tensor:
            return dataset_features(backbone, data, part, blocks=blocks, statistics=statistics, report=parts.next())

        train_NF, test_MF = features("train"), features("test")
        if wanted.ks:
            width = backbone.width
            arrays = _arrays(train_NF[:, -width:], test_MF[:, -width:], data)
            found = knn_accuracies(*arrays, ks=wanted.ks, temperature=wanted.temperature)
            accuracy |= {("knn" if len(found) == 1 else f"knn_{k}"): value for k, value in found.items()}
        if wanted.linear is not None:
            probe = linear_probe(
                *_arrays(train_NF, test_MF, data), solver=wanted.linear, epochs=wanted.probe_epochs,
                seed=wanted.seed, report=parts.next(),
            )  # fmt: skip
            accuracy["linear"] = probe.accuracy
            details["linear"] = {
                "solver": probe.solver, "blocks": blocks, "chosen": probe.chosen,
                "held_out": {f"{value:g}": found for value, found in probe.held_out.items()},
            }  # fmt: skip
    if wanted.finetune is not None:
        accuracy["finetune"] = finetune(
            backbone, data, wanted.finetune, statistics=statistics, seed=wanted.seed, report=parts.next()
        )
        details["finetune"] = asdict(wanted.finetune)
    return Outcome(accuracy, details)


def _arrays(train_NF: Tensor, test_MF: Tensor, data: Dataset) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return train_NF, data.train_labels, test_MF, data.test_labels


class _Parts:
    """Reports for parts of the work, each an equal share of the whole."""

    def __init__(self, report: Report | None, count: int) -> None:
        self.report, self.count, self.begun = report, count, 0

    def next(self) -> Report:
        begin = self.begun / self.count
        self.begun += 1

        def report(fraction: float, text: str) -> None:
            if self.report is not None:
                self.report(begin + fraction / self.count, text)

        return report

"""How good a trained backbone is: k nearest neighbours, a linear probe, and full fine-tuning.

All on full-length sequences (the reference strategy).
"""

from __future__ import annotations

from gradscope.evaluation.features import (
    block_features,
    check_labelled,
    check_suits,
    dataset_features,
    extract_features,
    normalise,
)
from gradscope.evaluation.finetune import FinetuneOptions, finetune, finetune_accuracy, finetuned
from gradscope.evaluation.knn import knn_accuracies, knn_accuracy
from gradscope.evaluation.linear import ProbeResult, linear_accuracy, linear_probe
from gradscope.evaluation.suite import Outcome, Wanted, evaluate

__all__ = [
    "FinetuneOptions",
    "Outcome",
    "ProbeResult",
    "Wanted",
    "block_features",
    "check_labelled",
    "check_suits",
    "dataset_features",
    "evaluate",
    "extract_features",
    "finetune",
    "finetune_accuracy",
    "finetuned",
    "knn_accuracies",
    "knn_accuracy",
    "linear_accuracy",
    "linear_probe",
    "normalise",
]

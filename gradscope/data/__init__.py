"""Datasets and batched augmentations."""

from __future__ import annotations

from gradscope.data.augment import Augmentation, augment, mocov3_views
from gradscope.data.fashion_mnist import DATASETS, load_data
from gradscope.data.images import ImageData, image_data

__all__ = ["DATASETS", "Augmentation", "ImageData", "augment", "image_data", "load_data", "mocov3_views"]

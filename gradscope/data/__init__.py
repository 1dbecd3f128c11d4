"""Datasets and batched augmentations."""

from __future__ import annotations

from gradscope.data.augment import Augmentation, augment
from gradscope.data.datasets import DATASETS, load_data
from gradscope.data.folder import FolderData, folder_data
from gradscope.data.images import Dataset, ImageData, Prepared, image_data
from gradscope.data.loading import Ahead
from gradscope.data.recipes import RECIPES, mocov3_views, views_of

__all__ = [
    "DATASETS",
    "RECIPES",
    "Ahead",
    "Augmentation",
    "Dataset",
    "FolderData",
    "ImageData",
    "Prepared",
    "augment",
    "folder_data",
    "image_data",
    "load_data",
    "mocov3_views",
    "views_of",
]

"""Checkpoints of other code bases: read without running them, known by their keys, built into the bundled ViT."""

from gradscope.foreign.architecture import Architecture, architecture_of, load_backbone
from gradscope.foreign.building import Blueprint, blueprint_of, build
from gradscope.foreign.checkpoint import ForeignCheckpoint
from gradscope.foreign.layouts import holds_foreign, is_foreign, read_foreign
from gradscope.foreign.progress import foreign_files, run_of
from gradscope.foreign.task import ForeignTask

__all__ = [
    "Architecture",
    "Blueprint",
    "ForeignCheckpoint",
    "ForeignTask",
    "architecture_of",
    "blueprint_of",
    "build",
    "foreign_files",
    "holds_foreign",
    "is_foreign",
    "load_backbone",
    "read_foreign",
    "run_of",
]

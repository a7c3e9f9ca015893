"""Data sets as sites with splits: `load("phantom")`, `load("nuclei")`, `load("path/to/your/folder")`."""

from fedlora_mini.data.base import IGNORE, Dataset, Site, Split
from fedlora_mini.data.check import Report, check
from fedlora_mini.data.gallery import gallery
from fedlora_mini.data.registry import DATASETS, available, fetch, load, options, prepare
from fedlora_mini.data.select import choose_sites, keep_classes, limit
from fedlora_mini.data.shift import Appearance, Supervision
from fedlora_mini.data.statistics import describe, shift_table

__all__ = [
    "DATASETS",
    "IGNORE",
    "Appearance",
    "Dataset",
    "Report",
    "Site",
    "Split",
    "Supervision",
    "available",
    "check",
    "choose_sites",
    "describe",
    "fetch",
    "gallery",
    "keep_classes",
    "limit",
    "load",
    "options",
    "prepare",
    "shift_table",
]

"""Recursive training of position specialists on a frozen target."""

from .arguments import PosSTrainingArguments
from .collator import PosSDataCollator
from .data import prepare_dataset
from .datasets import load_texts
from .metrics import position_metrics
from .trainer import PosSTrainer


__all__ = [
    "PosSDataCollator",
    "PosSTrainer",
    "PosSTrainingArguments",
    "load_texts",
    "position_metrics",
    "prepare_dataset",
]

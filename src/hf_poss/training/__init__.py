"""Recursive training of position specialists on a frozen target."""

from .arguments import PosSTrainingArguments
from .data import PosSDataCollator, tokenize_texts
from .metrics import position_metrics
from .trainer import PosSTrainer


__all__ = ["PosSDataCollator", "PosSTrainer", "PosSTrainingArguments", "position_metrics", "tokenize_texts"]

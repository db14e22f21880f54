"""Recursive training of position specialists on a frozen target.

- From data to batches: `datasets` (where it lies), `formats` (what a row is), `chat` and `spans` (what counts),
  `encoding`, `packing`, `data` (these together), `collator`; beside them `checks`, `lengths`, `token_counts` and
  `preview`.
- Made with the target: `features`; `feature_store` and `store_index` keep them; `regeneration` with `requests`,
  `row_sampling`, `regenerated` and `record_files` writes its answers; `shares` and `settings` are both's.
- The training: `arguments`, `trainer`, `callbacks`, `metrics`, `drafting`, `nonfinite`, `estimate`, `preflight`.
- Stopping and going on: `checkpointing`, `resume`, `sampling`. Several processes: `tensor_parallel`, `whole_models`.
"""

from .arguments import PosSTrainingArguments
from .collator import PosSDataCollator
from .data import prepare_dataset
from .datasets import load_texts
from .feature_store import FeatureDataset, extract_features
from .metrics import position_metrics
from .trainer import PosSTrainer


__all__ = [
    "FeatureDataset",
    "PosSDataCollator",
    "PosSTrainer",
    "PosSTrainingArguments",
    "extract_features",
    "load_texts",
    "position_metrics",
    "prepare_dataset",
]

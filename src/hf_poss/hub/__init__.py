"""Publishing: records of training, speed and evaluation, model cards, uploads."""

from .record import (
    EvaluationRecord,
    SpeedRecord,
    TrainingRecord,
    write_evaluation_record,
    write_speed_record,
    write_training_record,
)


__all__ = [
    "EvaluationRecord",
    "SpeedRecord",
    "TrainingRecord",
    "write_evaluation_record",
    "write_speed_record",
    "write_training_record",
]

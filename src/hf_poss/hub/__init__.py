"""Publishing: records of training and speed, model cards, uploads."""

from .record import SpeedRecord, TrainingRecord, write_speed_record, write_training_record


__all__ = ["SpeedRecord", "TrainingRecord", "write_speed_record", "write_training_record"]

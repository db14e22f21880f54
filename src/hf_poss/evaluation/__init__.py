"""Measuring what drafting is worth."""

from .speed import SpeedComparison, compare_speed


__all__ = ["SpeedComparison", "compare_speed"]

"""What the modules for Hugging Face `evaluate` check of their inputs."""

from collections.abc import Sequence
from typing import Any


__all__ = ["NamedInputs", "check_counts"]


class NamedInputs:
    """Mixin before `evaluate.Metric`: `compute` names an input that is missing."""

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Measures of all texts that were added, those given here included; None but on process 0.

        Raises:
            ValueError: if some inputs of this module are given, and others are not.
        """
        given = {"predictions": predictions, "references": references, **kwargs}
        names = list(self.features[0] if isinstance(self.features, list) else self.features)
        missing = [name for name in names if given.get(name) is None]
        if 0 < len(missing) < len(names):
            raise ValueError(f"{self.name} takes {', '.join(names)}, a value a text; missing: {', '.join(missing)}.")
        return super().compute(predictions=predictions, references=references, **kwargs)


def check_counts(**columns: Sequence[Any]) -> None:
    """Refuses negative values.

    Args:
        columns: by name the values of every text, each a number or a list of numbers.

    Raises:
        ValueError: it names the text (0-based), the input and the value.
    """
    for name, column in columns.items():
        for text, value in enumerate(column):
            if any(number < 0 for number in (value if isinstance(value, list) else [value])):
                raise ValueError(f"`{name}` of text {text} is {value}; expected 0 or more.")

"""What we measure: one file per task; each knows a function from images to Features, never a model."""

from collections.abc import Callable

from shoulders.tasks import classification
from shoulders.tasks.labelled import Split, Splits, find_splits
from shoulders.tasks.rows import Row

# Each: (features_of, splits, sizes, batch, workers, seed) -> rows.
TASKS: dict[str, Callable[..., list[Row]]] = {"classification": classification.run}

__all__ = ["TASKS", "Row", "Split", "Splits", "find_splits"]

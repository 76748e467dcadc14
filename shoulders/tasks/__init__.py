"""What we measure: one file per task; each knows a function from images to Features, never a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shoulders.tasks import classification, objects, semantic
from shoulders.tasks.data.dense import DenseSplit, DenseSplits, find_masks, find_objects
from shoulders.tasks.data.labelled import Split, Splits, find_splits
from shoulders.tasks.goals import Classify, Find, FinetuneTask, Segment
from shoulders.tasks.rows import Row


@dataclass(frozen=True)
class Task:
    """How a task is measured.

    Args:
        find: (path, image column of parquet files) -> the splits there.
        run: (features_of, those splits, sizes, batch, workers, seed) -> rows.
        spatial: whether the features need a spatial part.
        tune: those splits -> what training from pixels to labels needs to know.
    """

    find: Callable[[Path | str, str], Any]
    run: Callable[..., list[Row]]
    spatial: bool
    tune: Callable[[Any], FinetuneTask]


TASKS = {
    "classification": Task(find_splits, classification.run, spatial=False, tune=Classify),
    "detection": Task(find_objects, objects.run, spatial=True, tune=Find),
    "semantic": Task(find_masks, semantic.run, spatial=True, tune=Segment),
    "instance": Task(
        partial(find_objects, masks=True), partial(objects.run, masks=True), True, partial(Find, masks=True)
    ),
}

__all__ = [
    "TASKS",
    "DenseSplit",
    "DenseSplits",
    "Row",
    "Split",
    "Splits",
    "Task",
    "find_masks",
    "find_objects",
    "find_splits",
]

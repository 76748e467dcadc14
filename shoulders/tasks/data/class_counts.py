"""Classes that the training images of a data set lack."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from shoulders.tasks.data.splits import first_names


def warn_absent(
    path: Path, classes: tuple[str, ...], present: Mapping[str, Collection[int]], unit: str, hint: str = ""
) -> None:
    """Name the classes without an example in train, and those of them that other splits have.

    Args:
        path: of the data set.
        classes: K names.
        present: indices of the classes that occur, by split.
        unit: what a class needs, with its article.
        hint: the end of the message.
    """
    absent = [index for index in range(len(classes)) if index not in present["train"]]
    if not absent:
        return
    elsewhere = [classes[index] for index in absent if any(index in found for found in present.values())]
    cannot = f"; other splits have {first_names(elsewhere)}, which a probe cannot learn" if elsewhere else ""
    warnings.warn(
        f"{path}: classes without {unit} in train: {len(absent)} of {len(classes)} "
        f"({first_names([classes[index] for index in absent])}){cannot}{hint}",
        stacklevel=3,
    )

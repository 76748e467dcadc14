"""Splits of images with annotations of positions: index masks or objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError, RecipeError
from shoulders.images import Collection, open_source

SPLITS = ("train", "val", "test")
OTHER_VAL_NAMES = ("valid", "validation", "dev")
MAX_NAMES = 3  # in a message


class Annotation(Protocol):
    """The annotation of an image; ``size`` is its height and width in px."""

    @property
    def size(self) -> tuple[int, int]: ...


T = TypeVar("T", bound=Annotation)


@dataclass(frozen=True)
class AnnotatedSplit(Generic[T]):
    """Some of the images of a collection, with an annotation each.

    Args:
        images: the collection.
        indices: (n,) which of its images.
        annotations: n of them, in the same order.
    """

    images: Collection
    indices: NDArray[np.int64]
    annotations: Sequence[T]

    def take(self, positions: NDArray[np.int64]) -> AnnotatedSplit[T]:
        """The split of some of the n images; positions (m,) are in [0, n)."""
        annotations = [self.annotations[position] for position in positions.tolist()]
        return AnnotatedSplit(self.images, self.indices[positions], annotations)


@dataclass(frozen=True)
class AnnotatedSplits(Generic[T]):
    """Images to fit on, to select on and to evaluate on.

    Args:
        train: the images to fit on; none where nothing is fitted.
        val: the images to select hyperparameters on, or None where they have to be held out of train.
        test: the images to evaluate on; those of val where there is no test.
        classes: K names.
        how: where the splits come from, for the settings of a row.
    """

    train: AnnotatedSplit[T]
    val: AnnotatedSplit[T] | None
    test: AnnotatedSplit[T]
    classes: tuple[str, ...]
    how: str


def first_names(names: Sequence[object]) -> str:
    """Up to three names, each quoted if it is text, with dots where there are more."""
    return ", ".join(map(repr, names[:MAX_NAMES])) + (", .." if len(names) > MAX_NAMES else "")


def present_splits(path: Path, exists: Callable[[str], bool], layout: str, fit: bool = True) -> list[str]:
    """The names of the splits at ``path``: train, and val or test or both.

    Args:
        exists: whether there is a split of a name.
        layout: of files and folders, for the messages.
        fit: whether something is fitted; if not, only the split to evaluate on is named: test, or val without a test.

    Raises:
        RecipeError: nothing at ``path``, no train, nothing to evaluate on, or val has another name.
    """
    if not path.exists():
        raise RecipeError(f"{path}: does not exist; expected {layout}")
    names: list[str] = [name for name in SPLITS if exists(name)]
    if "val" not in names and (other := next(filter(exists, OTHER_VAL_NAMES), None)):
        raise RecipeError(f"{path}: holds {other}; rename it to val ({layout})")
    if not fit and ("test" in names or "val" in names):
        return ["test" if "test" in names else "val"]
    if "train" not in names or len(names) < 2:
        raise RecipeError(
            f"{path}: holds {' and '.join(names) or 'none of the splits'}; train and val or test are needed: {layout}"
        )
    return names


def open_split_images(folder: Path, column: str) -> Collection:
    """The images of a split, with pixels as they are stored, as their labels are.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.exists():
        raise DataError(f"{folder}: missing; put the images of this split into it")
    return Collection({folder.name: open_source(folder, column)}, upright=False)


def assemble_splits(by_name: Mapping[str, AnnotatedSplit[T]], classes: tuple[str, ...]) -> AnnotatedSplits[T]:
    """Splits by their names; without a test, val is evaluated on, and nothing is left to select on.

    Raises:
        DataError: a split without images.
    """
    empty = [name for name, split in by_name.items() if not split.annotations]
    if empty:
        raise DataError(f"{', '.join(empty)}: no image in it; add some, or leave the split out")
    how = ", ".join(by_name) + " as given"
    test = by_name["test" if "test" in by_name else "val"]
    train = by_name["train"] if "train" in by_name else test.take(np.zeros(0, dtype=np.int64))
    return AnnotatedSplits(train, by_name.get("val") if "test" in by_name else None, test, classes, how)

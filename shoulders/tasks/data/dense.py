"""Find the splits of labels for places: index masks, or objects as COCO writes them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shoulders.errors import DataError, RecipeError
from shoulders.images import Collection, open_source
from shoulders.tasks.data.coco import AnnotatedImage, read_annotations
from shoulders.tasks.data.labelled import OTHER_VALS, SPLITS

IGNORED = 255
MASKS = "PATH/images/{train,val,test}/* and PATH/annotations/{train,val,test}/*.png (val or test may be absent)"
OBJECTS = (
    "PATH/{train,val,test}/* and PATH/{train,val,test}.json or PATH/{train,val,test}/_annotations.coco.json "
    "(val or test may be absent)"
)
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # of Pillow: one number a pixel
_STEPS = {"L;2": 85, "L;4": 17}  # greys of 2 and 4 bits, which Pillow spreads over 0 to 255


class Truth(Protocol):
    """What is known of an image; ``size`` is its height and width in px."""

    @property
    def size(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class MaskFile:
    """A file with the class of each pixel, and its height and width in px."""

    path: Path
    size: tuple[int, int]


T = TypeVar("T", bound=Truth)


@dataclass(frozen=True)
class DenseSplit(Generic[T]):
    """Some of the images of a collection, and what is known of each.

    Args:
        images: the collection.
        indices: (n,) which of its images.
        truths: n of them, in the same order.
    """

    images: Collection
    indices: NDArray[np.int64]
    truths: Sequence[T]

    def take(self, rows: NDArray[np.int64]) -> DenseSplit[T]:
        """Some of the n images, (m,)."""
        return DenseSplit(self.images, self.indices[rows], [self.truths[row] for row in rows.tolist()])


@dataclass(frozen=True)
class DenseSplits(Generic[T]):
    """Images to fit on, to choose on and to report.

    Args:
        train: the images to fit on.
        val: the images to choose on, or None where they have to be held out of train.
        test: the images to report; those called val where there is no test.
        classes: K names.
        how: where the splits come from, for the settings of a row.
    """

    train: DenseSplit[T]
    val: DenseSplit[T] | None
    test: DenseSplit[T]
    classes: tuple[str, ...]
    how: str


def find_masks(path: Path | str, column: str = "image") -> DenseSplits[MaskFile]:
    """Images with index masks; classes are those of ``classes.json``, else all up to the highest index.

    Raises:
        RecipeError: nothing at ``path``, or not this layout.
        DataError: an image without a mask, a mask or class list that cannot be used, or fewer than two classes.
    """
    path = Path(path)
    names = _present(path, lambda name: (path / "images" / name).exists(), MASKS)
    listed = _read_classes(path / "classes.json")
    indices: dict[str, set[int]] = {name: set() for name in names}  # that the masks of a split hold
    found: dict[str, DenseSplit[MaskFile]] = {}
    for name in names:
        images = _collection(path / "images" / name, column)
        masks = []
        for index in range(len(images)):
            file = (path / "annotations" / name / images.name(index)).with_suffix(".png")
            if not file.is_file():
                raise DataError(f"{file}: missing; the image {images.name(index)} of {name} needs a mask here")
            mask = read_mask(file, IGNORED)  # (H, W)
            indices[name].update(np.unique(mask[mask != IGNORED]).tolist())
            masks.append(MaskFile(file, (mask.shape[0], mask.shape[1])))
        found[name] = DenseSplit(images, np.arange(len(images)), masks)
    highest = max(set().union(*indices.values()), default=-1)
    classes = tuple(str(number) for number in range(highest + 1)) if listed is None else listed
    there = indices["train" if "train" in indices else names[0]] & set(range(len(classes)))
    if len(there) < 2:
        raise DataError(
            f"{path}: the masks to fit on hold {len(there)} of {len(classes)} classes; a probe needs at least two "
            f"(pixels of {IGNORED} belong to none: where they are meant as a class, write its index)"
        )
    if unnamed := sorted(set().union(*indices.values()) - set(range(len(classes)))):
        told = ", ".join(map(str, unnamed[:5]))
        warnings.warn(
            f"{path}: masks hold {told}, classes.json names 0 to {len(classes) - 1}: such pixels count as none; is its "
            "first name that of index 0?",
            stacklevel=2,
        )
    return _splits(found, classes)


def read_mask(path: Path, n_classes: int) -> NDArray[np.uint8]:
    """The class of each pixel (H, W), 255 where none of the ``n_classes`` is meant.

    Raises:
        DataError: the file and the reason.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters is raised
            if image.mode not in _INDEX_MODES:
                raise ValueError(f"it holds colours ({image.mode}), not one index for each pixel")
            step = _STEPS.get(str(image.tile[0].args), 1) if image.tile else 1
            indices = np.asarray(image).astype(np.int64) // step
    except Exception as error:  # no list of what decoders raise is ever complete
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a mask that can be read: {reason}; correct it or leave it out") from error
    return np.where((indices >= 0) & (indices < n_classes), indices, IGNORED).astype(np.uint8)


def find_objects(path: Path | str, column: str = "image", masks: bool = False) -> DenseSplits[AnnotatedImage]:
    """Images with objects, of each only what its annotation file lists.

    Raises:
        RecipeError: nothing at ``path``, not this layout, or the package that reads masks is absent.
        DataError: an annotation that cannot be used, an image that is missing, objects without masks where
            ``masks`` are needed, or other classes in one split than in train.
    """
    path = Path(path)
    names = _present(path, lambda name: (path / name).exists() or (path / f"{name}.json").exists(), OBJECTS)
    found: dict[str, DenseSplit[AnnotatedImage]] = {}
    classes: tuple[str, ...] = ()
    for name in names:
        file = _annotation_file(path, name)
        annotations = read_annotations(file)
        if name == "train":
            classes = annotations.classes
        if annotations.classes != classes:
            raise DataError(
                f"{file}: classes {list(annotations.classes)}, but train has {list(classes)}; make them equal"
            )
        images = _collection(path / name, column)
        index_of = {images.name(index): index for index in range(len(images))}
        for picture in annotations.pictures:
            if picture.file not in index_of:
                raise DataError(
                    f"{path / name / picture.file}: missing, but {file.name} lists it; add it or leave it out"
                )
            if masks and picture.masks is None:
                raise DataError(f"{file}: {picture.file} has objects without masks; give each a segmentation")
        indices = np.array([index_of[picture.file] for picture in annotations.pictures], dtype=np.int64)
        found[name] = DenseSplit(images, indices, annotations.pictures)
    for name, what in (("train", "learn from"), ("test" if "test" in found else "val", "find")):
        if not any((~picture.crowd).any() for picture in found[name].truths):
            raise DataError(f"{_annotation_file(path, name)}: no object in it to {what}")
    return _splits(found, classes)


def _annotation_file(path: Path, name: str) -> Path:
    """Where the objects of a split are: beside its folder, or in it as Roboflow puts them."""
    inside = path / name / "_annotations.coco.json"
    return inside if inside.is_file() else path / f"{name}.json"


def _present(path: Path, is_there: Callable[[str], bool], layout: str) -> list[str]:
    """Which of train, val and test there are; train and one of the others at least."""
    if not path.exists():
        raise RecipeError(f"{path}: there is nothing here; allowed is {layout}")
    names = [name for name in SPLITS if is_there(name)]
    if "val" not in names and (other := next(filter(is_there, OTHER_VALS), None)):
        raise RecipeError(f"{path}: holds {other}; rename it to val ({layout})")
    if "train" not in names or len(names) < 2:
        raise RecipeError(
            f"{path}: holds {' and '.join(names) or 'none of the splits'}; it takes train and val or test, as {layout}"
        )
    return names


def _collection(folder: Path, column: str) -> Collection:
    if not folder.exists():
        raise DataError(f"{folder}: missing; put the images of this split here")
    return Collection({folder.name: open_source(folder, column)})


def _read_classes(path: Path) -> tuple[str, ...] | None:
    """The names in ``classes.json``; None where there is no such file."""
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not JSON that can be read: {error}; give a list of names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: not a list of names; give one name for each index from 0")
    if len(names) > IGNORED or len(set(names)) < len(names):
        raise DataError(f"{path}: {len(names)} names, {len(set(names))} different; at most {IGNORED}, each once")
    return tuple(names)


def _splits(found: Mapping[str, DenseSplit[T]], classes: tuple[str, ...]) -> DenseSplits[T]:
    """Val is reported where there is no test, and then nothing is left to choose on."""
    empty = [name for name, split in found.items() if not split.truths]
    if empty:
        raise DataError(f"{', '.join(empty)}: no image in it; add some, or leave the split out")
    how = ", ".join(found) + " as given"
    if "test" not in found:
        return DenseSplits(found["train"], None, found["val"], classes, how)
    return DenseSplits(found["train"], found.get("val"), found["test"], classes, how)

"""Find splits of images with a class each: folders of class folders, parquet files or tar files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError, RecipeError
from shoulders.images import Collection, ImageSource, open_source
from shoulders.images.folder import Folder
from shoulders.images.parquet import Parquet
from shoulders.tasks.data.class_names import classes_in_names
from shoulders.tasks.data.splits import OTHER_VAL_NAMES, SPLITS

SUFFIXES = ("", ".parquet", ".tar")  # a split is a folder (of class folders, parquet or tar files) or one file
LAYOUTS = (
    "PATH/{train,val,test}/CLASS/*.jpg, PATH/{train,val,test}.parquet, PATH/{train,val,test}.tar "
    "(val or test may be absent), or without splits PATH/CLASS/*.jpg, one .parquet or one .tar file"
)
# a folder or file of a split, such as train-00000-of-00002.parquet, validation.parquet, or the folder validation
SPLIT_OF_ENTRY = re.compile(r"(train|val|valid|validation|dev|test)(?:$|[-_.].*(?:parquet|tar)$)")
# a file of a split, anywhere below, such as data/train-00000-of-00002.parquet or imagenet1k-train-0000.tar
SPLIT_OF_FILE = re.compile(r"(?:^|.*[-_./])(train|valid|validation|val|dev|test)(?=[-_./])")
TEST_FRACTION = 0.2
MAX_NUMBERED_CLASSES = 10_000  # numbers up to this may have any gaps; higher ones see `MAX_GAPS`
MAX_GAPS = 10  # times as many numbers as classes


@dataclass(frozen=True)
class LabelledSplit:
    """Some of the images of a collection, with a class each.

    Args:
        images: the collection.
        indices: (n,) which of its images.
    """

    images: Collection
    indices: NDArray[np.int64]

    def labels(self) -> NDArray[np.int64]:
        """(n,) class indices."""
        assert self.images.labels is not None  # noqa: S101  (find_labelled refuses collections without labels)
        return self.images.labels[self.indices]

    def take(self, positions: NDArray[np.int64]) -> LabelledSplit:
        """The split of some of the n images; positions (m,) are in [0, n)."""
        return LabelledSplit(self.images, self.indices[positions])


@dataclass(frozen=True)
class LabelledSplits:
    """Labelled images to fit on, to select on and to evaluate on.

    Args:
        train: the images to fit on; none where nothing is fitted and there is no such split.
        val: the images to select hyperparameters on, or None where they have to be held out of train.
        test: the images to evaluate on; those of val where there is no test.
        n_classes: K; labels are in [0, K).
        how: where the splits come from, for the settings of a row.
    """

    train: LabelledSplit
    val: LabelledSplit | None
    test: LabelledSplit
    n_classes: int
    how: str

    @property
    def classes(self) -> tuple[str, ...]:
        """K names; numbers where the images have none."""
        return tuple(self.test.images.classes or map(str, range(self.n_classes)))


def find_labelled(path: Path | str, column: str = "image", fit: bool = True) -> LabelledSplits:
    """The splits at ``path`` as they are; where there are none, four fifths for train and one for test.

    Args:
        column: of the images in parquet files.
        fit: whether something is fitted; if not, only the split to evaluate on counts, and without splits all images
            are evaluated on, those of a plain folder with the classes in their names, see `classes_in_names`.

    Raises:
        RecipeError: nothing at ``path``, or none of the layouts.
        DataError: images without labels, fewer than two classes to fit, or other classes in one split than in train.
    """
    path = Path(path)
    if not path.exists():
        raise RecipeError(f"{path}: does not exist; expected {LAYOUTS}")
    by_name = _named_splits(path, column, fit)
    how = ", ".join(by_name) + " as given"
    if not by_name:
        split, how = _without_splits(path, column, fit), "80/20 by image id" if fit else "all images"
        by_name = split_train_test(split) if fit else {"test": split}
        if not len(by_name["test"].indices):
            raise DataError(f"{path}: one image per class leaves none to evaluate on; add some, or a test split")
    n_classes = _count_classes(path, by_name, fit)
    test = by_name["test" if "test" in by_name else "val"]
    train = by_name["train"] if "train" in by_name else test.take(np.zeros(0, dtype=np.int64))
    return LabelledSplits(train, by_name.get("val") if "test" in by_name else None, test, n_classes, how)


def _without_splits(path: Path, column: str, fit: bool) -> LabelledSplit:
    """All images at a path that names no splits."""
    _refuse_unclear_names(path)
    try:
        source = open_source(path, column)
    except RecipeError as error:
        raise RecipeError(f"{error} (labelled images: {LAYOUTS})") from error
    in_names = None
    if source.labels is None and isinstance(source, Folder) and not fit:
        in_names = classes_in_names([source.name(index) for index in range(len(source))])
    if in_names is None:
        return _all_labelled(path, "images", source)
    images = Collection({"images": source}, upright=False)
    images.classes, images.labels = in_names
    return LabelledSplit(images, np.arange(len(images)))


def split_train_test(split: LabelledSplit) -> dict[str, LabelledSplit]:
    """Train and test images, chosen in every class by the stable ids alone: order and location do not matter.

    A class of a single image goes to train.
    """
    labels, ids = split.labels(), split.images.ids[split.indices]
    order = np.argsort(ids, kind="stable")
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = max(1, round(TEST_FRACTION * len(members))) if len(members) > 1 else 0
        in_test[members[:count]] = True
    return {
        "train": LabelledSplit(split.images, split.indices[~in_test]),
        "test": LabelledSplit(split.images, split.indices[in_test]),
    }


def _named_splits(path: Path, column: str, fit: bool) -> dict[str, LabelledSplit]:
    """The splits called train, val and test; empty where there are none, or train alone."""
    present: dict[str, Path] = {}
    for name in SPLITS:
        candidates = [path / (name + suffix) for suffix in SUFFIXES if (path / (name + suffix)).exists()]
        if len(candidates) > 1:
            both = " and ".join(candidate.name for candidate in candidates)
            raise RecipeError(f"{path}: holds both {both}; keep one of them as {name}")
        if candidates:
            present[name] = candidates[0]
    if set(present) <= {"train"}:  # which may be a class of vehicles
        return {}
    if "val" not in present:
        for other in (path / (name + suffix) for name in OTHER_VAL_NAMES for suffix in SUFFIXES):
            if other.exists():
                raise RecipeError(f"{path}: holds {other.name}; rename it to val{other.suffix}")
    if not fit:
        to_evaluate = "test" if "test" in present else "val"
        present = {to_evaluate: present[to_evaluate]}
    elif "train" not in present:
        raise RecipeError(f"{path}: holds {' and '.join(present)}, but no train to fit on; expected {LAYOUTS}")
    return {name: _all_labelled(file, name, open_source(file, column)) for name, file in present.items()}


def _refuse_unclear_names(path: Path) -> None:
    """Refuse splits with other names: they would be taken for one set of images and divided anew.

    Raises:
        RecipeError: with the names that are expected.
    """
    if not path.is_dir():
        return
    files = [str(file.relative_to(path)) for suffix in SUFFIXES[1:] for file in sorted(path.rglob(f"*{suffix}"))]
    named = [(entry.name, SPLIT_OF_ENTRY.match(entry.name)) for entry in sorted(path.iterdir())]
    named += [(file, SPLIT_OF_FILE.match(file)) for file in files]
    splits = {match[1]: name for name, match in reversed(named) if match}
    if len(splits) > 1:
        names = ", ".join(sorted(splits.values()))
        raise RecipeError(f"{path}: {names} look like splits, but expected are {LAYOUTS}; rename them")


def _all_labelled(path: Path, name: str, source: ImageSource) -> LabelledSplit:
    """All images of a source, none of them without a label."""
    missing = len(source) if source.labels is None else int((source.labels < 0).sum())
    if missing:
        reason = source.why_unlabelled() if isinstance(source, Folder | Parquet) else ""
        raise DataError(
            f"{path}: {missing} of {len(source)} images have no label{reason}; give each a class folder, a parquet "
            f"column called label, or a .cls file in the tar ({LAYOUTS})"
        )
    return LabelledSplit(Collection({name: source}, upright=False), np.arange(len(source)))


def _renumber(path: Path, name: str, images: Collection, classes: list[str] | None) -> None:
    """Number the classes of a split, which may lack some, as those of train."""
    if not classes or not images.classes or len({*classes}) < len(classes) or not {*images.classes} <= {*classes}:
        extra = ", ".join(sorted(set(images.classes or ()) - set(classes or ()))[:5]) or "in their names"
        raise DataError(f"{path}: train and {name} differ in their classes ({extra}); give train every class")
    assert images.labels is not None  # noqa: S101  (find_labelled refuses collections without labels)
    images.labels = np.array([classes.index(one) for one in images.classes], dtype=np.int64)[images.labels]
    images.classes = classes


def _count_classes(path: Path, splits: dict[str, LabelledSplit], fit: bool) -> int:
    """The number of classes, the same in every split."""
    classes = next(iter(splits.values())).images.classes  # of train, where there is one
    for name, split in splits.items():
        if split.images.classes != classes:
            _renumber(path, name, split.images, classes)
    labels = {name: set(split.labels().tolist()) for name, split in splits.items()}
    for name in splits:
        if fit and classes is None and labels[name] - labels["train"]:
            extra = sorted(labels[name] - labels["train"])[:5]
            raise DataError(f"{path}: {name} has labels that train lacks: {extra}; give every class to train")
    highest = max(max(in_split) for in_split in labels.values())
    n_classes = highest + 1 if classes is None else len(classes)
    distinct = len(labels["train"] if fit else set().union(*labels.values()))
    if classes is None and n_classes > max(MAX_NUMBERED_CLASSES, MAX_GAPS * distinct):
        raise DataError(
            f"{path}: {distinct} different labels in {'train' if fit else 'all'}, the highest of all is {highest}: a "
            f"head would have {n_classes} outputs; number the classes from 0 without gaps"
        )
    if highest >= n_classes:
        raise DataError(f"{path}: label {highest}, but only {n_classes} class names; give every class a name")
    if fit and distinct < 2:
        raise DataError(f"{path}: all images are of one class; a probe needs at least two")
    return n_classes

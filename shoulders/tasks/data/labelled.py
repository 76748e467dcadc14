"""Find the labelled splits in what users have: folders of class folders, parquet files or tar files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError, RecipeError
from shoulders.images import Collection, ImageSource, open_source

SPLITS = ("train", "val", "test")
FORMS = ("", ".parquet", ".tar")  # a split is a folder (of class folders, parquet or tar files) or one file
LAYOUTS = (
    "PATH/{train,val,test}/CLASS/*.jpg, PATH/{train,val,test}.parquet, PATH/{train,val,test}.tar "
    "(val or test may be absent), or without splits PATH/CLASS/*.jpg, one .parquet or one .tar file"
)
# such as train-00000-of-00002.parquet, validation.parquet, or a folder called validation
OTHER_NAMES = re.compile(r"(train|val|valid|validation|dev|test)(?:$|[-_.].*(?:parquet|tar)$)")
OTHER_VALS = ("valid", "validation", "dev")
# of one of several files anywhere below, such as data/train-00000-of-00002.parquet or imagenet1k-train-0000.tar
SPLIT_OF_FILE = re.compile(r"(?:^|.*[-_./])(train|valid|validation|val|dev|test)(?=[-_./])")
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """Some of the images of a collection, with a label each.

    Args:
        images: the collection.
        indices: (n,) which of its images.
    """

    images: Collection
    indices: NDArray[np.int64]

    def labels(self) -> NDArray[np.int64]:
        """(n,) class indices."""
        assert self.images.labels is not None  # noqa: S101  (find_splits refuses collections without labels)
        return self.images.labels[self.indices]

    def take(self, rows: NDArray[np.int64]) -> Split:
        """Some of the n images, (m,)."""
        return Split(self.images, self.indices[rows])


@dataclass(frozen=True)
class Splits:
    """Labelled images to fit on, to choose on and to report.

    Args:
        train: the images to fit on.
        val: the images to choose on, or None where they have to be held out of train.
        test: the images to report; those called val where there is no test.
        n_classes: K; labels are in [0, K).
        how: where the splits come from, for the settings of a row.
    """

    train: Split
    val: Split | None
    test: Split
    n_classes: int
    how: str

    @property
    def classes(self) -> tuple[str, ...]:
        """K names; numbers where the images have none."""
        return tuple(self.train.images.classes or map(str, range(self.n_classes)))


def find_splits(path: Path | str, column: str = "image") -> Splits:
    """The splits at ``path`` as they are, or four fifths for train and one for test where there are none.

    Raises:
        RecipeError: nothing at ``path``, or none of the layouts.
        DataError: images without labels, fewer than two classes, or other classes in one split than in train.
    """
    path = Path(path)
    if not path.exists():
        raise RecipeError(f"{path}: there is nothing here; allowed are {LAYOUTS}")
    found = _named_splits(path, column)
    how = ", ".join(found) + " as given"
    if not found:
        _refuse_other_names(path)
        try:
            source = open_source(path, column)
        except RecipeError as error:
            raise RecipeError(f"{error} (labelled images: {LAYOUTS})") from error
        found, how = split(_labelled(path, "images", source)), "80/20 by image id"
        if not len(found["test"].indices):
            raise DataError(f"{path}: one image of each class leaves none to report on; give more, or a test split")
    n_classes = _count_classes(path, found)
    if "test" not in found:
        found = {"train": found["train"], "test": found["val"]}
    return Splits(found["train"], found.get("val"), found["test"], n_classes, how)


def split(whole: Split) -> dict[str, Split]:
    """Train and test images, in every class by the stable ids alone, so that neither order nor place matters.

    A class of a single image goes to train.
    """
    labels, ids = whole.labels(), whole.images.ids[whole.indices]
    order = np.argsort(ids, kind="stable")
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = max(1, round(TEST_SHARE * len(members))) if len(members) > 1 else 0
        held[members[:count]] = True
    return {
        "train": Split(whole.images, whole.indices[~held]),
        "test": Split(whole.images, whole.indices[held]),
    }


def _named_splits(path: Path, column: str) -> dict[str, Split]:
    """The images called train, val and test; empty where there are none, or train alone."""
    present: dict[str, Path] = {}
    for name in SPLITS:
        places = [path / (name + form) for form in FORMS if (path / (name + form)).exists()]
        if len(places) > 1:
            both = " and ".join(place.name for place in places)
            raise RecipeError(f"{path}: holds both {both}; keep one of them as {name}")
        if places:
            present[name] = places[0]
    if set(present) <= {"train"}:  # which may be a class of vehicles
        return {}
    if "val" not in present:
        for other in (path / (name + form) for name in OTHER_VALS for form in FORMS):
            if other.exists():
                raise RecipeError(f"{path}: holds {other.name}; rename it to val{other.suffix}")
    if "train" not in present:
        raise RecipeError(f"{path}: holds {' and '.join(present)}, but no train to fit on; allowed are {LAYOUTS}")
    return {name: _labelled(place, name, open_source(place, column)) for name, place in present.items()}


def _refuse_other_names(path: Path) -> None:
    """Splits by other names would be taken for one whole and divided anew.

    Raises:
        RecipeError: with what they have to be called.
    """
    if not path.is_dir():
        return
    files = [str(file.relative_to(path)) for form in FORMS[1:] for file in sorted(path.rglob(f"*{form}"))]
    named = [(entry.name, OTHER_NAMES.match(entry.name)) for entry in sorted(path.iterdir())]
    named += [(file, SPLIT_OF_FILE.match(file)) for file in files]
    splits = {match[1]: name for name, match in reversed(named) if match}
    if len(splits) > 1:
        names = ", ".join(sorted(splits.values()))
        raise RecipeError(f"{path}: {names} look like splits, but allowed are {LAYOUTS}; rename them")


def _labelled(where: Path, name: str, source: ImageSource) -> Split:
    """All images of a source, none of them without a label."""
    missing = len(source) if source.labels is None else int((source.labels < 0).sum())
    if missing:
        raise DataError(
            f"{where}: {missing} of {len(source)} images have no label; give each a class folder, a parquet "
            f"column called label, or a .cls file in the tar ({LAYOUTS})"
        )
    return Split(Collection({name: source}), np.arange(len(source)))


def _renumber(path: Path, name: str, images: Collection, names: list[str] | None) -> None:
    """Number the classes of a split, which may lack some, as those of train."""
    if not names or not images.classes or len({*names}) < len(names) or not {*images.classes} <= {*names}:
        odd = ", ".join(sorted(set(images.classes or ()) - set(names or ()))[:5]) or "in their names"
        raise DataError(f"{path}: train and {name} differ in their classes ({odd}); give train every class")
    assert images.labels is not None  # noqa: S101  (find_splits refuses collections without labels)
    images.labels = np.array([names.index(one) for one in images.classes], dtype=np.int64)[images.labels]
    images.classes = names


def _count_classes(path: Path, splits: dict[str, Split]) -> int:
    """How many classes there are, the same in every split."""
    names = splits["train"].images.classes
    for name, given in splits.items():
        if given.images.classes != names:
            _renumber(path, name, given.images, names)
    seen = {name: set(given.labels().tolist()) for name, given in splits.items()}
    for name in splits:
        if names is None and seen[name] - seen["train"]:
            odd_labels = sorted(seen[name] - seen["train"])[:5]
            raise DataError(f"{path}: {name} has labels that train lacks: {odd_labels}; give every class to train")
    highest = max(max(labels) for labels in seen.values())
    n_classes = highest + 1 if names is None else len(names)
    if highest >= n_classes:
        raise DataError(f"{path}: label {highest}, but only {n_classes} class names; give every class a name")
    if len(seen["train"]) < 2:
        raise DataError(f"{path}: all images are of one class; a probe needs at least two")
    return n_classes

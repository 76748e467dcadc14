"""Find splits of images with objects, as COCO annotation files list them."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np

from shoulders.errors import DataError
from shoulders.tasks.data.class_counts import warn_absent
from shoulders.tasks.data.coco import AnnotatedImage, Annotations, read_annotations
from shoulders.tasks.data.shared_images import warn_shared
from shoulders.tasks.data.splits import (
    AnnotatedSplit,
    AnnotatedSplits,
    assemble_splits,
    first_names,
    open_split_images,
    present_splits,
)

LAYOUT = (
    "PATH/{train,val,test}/* and PATH/{train,val,test}.json or PATH/{train,val,test}/_annotations.coco.json "
    "(val or test may be absent)"
)
MAX_BARE = 0.25  # fraction of the images without an object that is not worth a warning


def find_objects(
    path: Path | str, column: str = "image", masks: bool = False, fit: bool = True
) -> AnnotatedSplits[AnnotatedImage]:
    """The splits at ``path``: of the images, those that the annotation files list.

    Args:
        column: of the images in parquet files.
        masks: whether every object needs a mask.
        fit: whether something is fitted; if not, the split to evaluate on is enough.

    Raises:
        RecipeError: nothing at ``path``, not this layout, or the package that reads masks is absent.
        DataError: an annotation that cannot be used, an image that is missing, objects without masks where
            ``masks`` are needed, or other classes in one split than in train.
    """
    path = Path(path)
    names = present_splits(path, lambda name: (path / name).exists() or (path / f"{name}.json").exists(), LAYOUT, fit)
    contents = {name: read_annotations(_annotation_file(path, name)) for name in names}
    classes = contents[names[0]].classes
    by_name: dict[str, AnnotatedSplit[AnnotatedImage]] = {}
    for name, content in contents.items():
        file = _annotation_file(path, name)
        if content.classes != classes:
            raise DataError(f"{file}: classes {list(content.classes)}, but train has {list(classes)}; make them equal")
        by_name[name] = _split(path / name, file, content, column, masks)
    for name, purpose in (("train", "fit on"), ("test" if "test" in by_name else "val", "evaluate on")):
        if name in by_name and not _present(by_name[name]):
            raise DataError(f"{_annotation_file(path, name)}: no object in it to {purpose}")
    _warn_unlisted(path, by_name)
    _warn_bare(path, by_name)
    if fit:
        warn_absent(path, classes, {name: _present(split) for name, split in by_name.items()}, "an object")
        warn_shared(path, by_name, {name: list(map(_key, split.annotations)) for name, split in by_name.items()})
    return assemble_splits(by_name, classes)


def _split(folder: Path, file: Path, content: Annotations, column: str, masks: bool) -> AnnotatedSplit[AnnotatedImage]:
    """The images of a folder that an annotation file lists."""
    images = open_split_images(folder, column)
    index_of = {images.name(index): index for index in range(len(images))}
    for image in content.images:
        if image.file not in index_of:
            raise DataError(f"{folder / image.file}: missing, but {file.name} lists it; add it or leave it out")
        if masks and image.masks is None:
            raise DataError(f"{file}: {image.file} has objects without masks; give each a segmentation")
    indices = np.array([index_of[image.file] for image in content.images], dtype=np.int64)
    return AnnotatedSplit(images, indices, content.images)


def _warn_unlisted(path: Path, by_name: Mapping[str, AnnotatedSplit[AnnotatedImage]]) -> None:
    """Name the images that no annotation file lists."""
    unlisted = [
        f"{name}/{split.images.name(index)}"
        for name, split in by_name.items()
        for index in sorted(set(range(len(split.images))) - set(split.indices.tolist()))
    ]
    if unlisted:
        total = sum(len(split.images) for split in by_name.values())
        warnings.warn(
            f"{path}: {len(unlisted)} of {total} images are not used, because the annotation files do not list them "
            f"({first_names(unlisted)})",
            stacklevel=3,
        )


def _warn_bare(path: Path, by_name: Mapping[str, AnnotatedSplit[AnnotatedImage]]) -> None:
    """Name the images without an object in splits that have many of them."""
    bare = {
        name: [f"{name}/{image.file}" for image in split.annotations if len(image.boxes) == 0]
        for name, split in by_name.items()
    }
    many = {name: files for name, files in bare.items() if len(files) > MAX_BARE * len(by_name[name].annotations)}
    if many:
        names = [file for files in many.values() for file in files]
        total = sum(len(by_name[name].annotations) for name in many)
        warnings.warn(
            f"{path}: {len(names)} of {total} images of {' and '.join(many)} have no object ({first_names(names)}), so "
            "that every detection in them is wrong; where they are not annotated, leave them out",
            stacklevel=3,
        )


def _present(split: AnnotatedSplit[AnnotatedImage]) -> set[int]:
    """Indices of the classes that a split has objects of, other than groups."""
    return {label for image in split.annotations for label in image.classes[~image.crowd].tolist()}


def _key(image: AnnotatedImage) -> Hashable | None:
    """Equal for the same annotations of an image, whatever its name; None where there are none."""
    return (image.size, image.classes.tobytes(), image.boxes.tobytes()) if len(image.boxes) else None


def _annotation_file(path: Path, name: str) -> Path:
    """The annotation file of a split: beside its folder, or inside it as Roboflow puts it."""
    inside = path / name / "_annotations.coco.json"
    return inside if inside.is_file() else path / f"{name}.json"

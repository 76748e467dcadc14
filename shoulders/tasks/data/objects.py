"""Find splits of images with objects, as COCO annotation files list them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shoulders.errors import DataError
from shoulders.tasks.data.coco import AnnotatedImage, read_annotations
from shoulders.tasks.data.splits import (
    AnnotatedSplit,
    AnnotatedSplits,
    assemble_splits,
    open_split_images,
    present_splits,
)

LAYOUT = (
    "PATH/{train,val,test}/* and PATH/{train,val,test}.json or PATH/{train,val,test}/_annotations.coco.json "
    "(val or test may be absent)"
)


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
    by_name: dict[str, AnnotatedSplit[AnnotatedImage]] = {}
    classes: tuple[str, ...] = ()
    for name in names:
        file = _annotation_file(path, name)
        content = read_annotations(file)
        if name == names[0]:
            classes = content.classes
        if content.classes != classes:
            raise DataError(f"{file}: classes {list(content.classes)}, but train has {list(classes)}; make them equal")
        images = open_split_images(path / name, column)
        index_of = {images.name(index): index for index in range(len(images))}
        for image in content.images:
            if image.file not in index_of:
                raise DataError(
                    f"{path / name / image.file}: missing, but {file.name} lists it; add it or leave it out"
                )
            if masks and image.masks is None:
                raise DataError(f"{file}: {image.file} has objects without masks; give each a segmentation")
        indices = np.array([index_of[image.file] for image in content.images], dtype=np.int64)
        by_name[name] = AnnotatedSplit(images, indices, content.images)
    for name, purpose in (("train", "fit on"), ("test" if "test" in by_name else "val", "evaluate on")):
        if name in by_name and not any((~image.crowd).any() for image in by_name[name].annotations):
            raise DataError(f"{_annotation_file(path, name)}: no object in it to {purpose}")
    return assemble_splits(by_name, classes)


def _annotation_file(path: Path, name: str) -> Path:
    """The annotation file of a split: beside its folder, or inside it as Roboflow puts it."""
    inside = path / name / "_annotations.coco.json"
    return inside if inside.is_file() else path / f"{name}.json"

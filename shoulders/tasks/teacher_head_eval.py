"""Evaluation of a teacher's head on labelled images, with features of the teacher or of a student: what tasks share.

Nothing is fitted. Test images are drawn whole, and the head's output is interpreted by its teacher's post-processing.
Classes of head and data are matched by their names.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoulders.errors import RecipeError
from shoulders.features import Skipped
from shoulders.images import MAX_PIXELS, WHOLE_IMAGE, Collection, Undecodable, render
from shoulders.tasks.data.splits import AnnotatedSplit
from shoulders.tasks.feature_bank import check_size
from shoulders.tasks.skipped import check_skipped, skipped_settings
from shoulders.tasks.task import HeadWithInput, Row, Size, rows_of

HeadOutput = tuple[list[int], list[Size], Any]  # positions in the split, sizes of the originals, the head's output


@torch.no_grad()
def head_outputs(
    head: HeadWithInput,
    images: Collection,
    indices: NDArray[np.int64],
    batch: int,
    workers: int,
    skipped: list[Skipped],
) -> Iterator[HeadOutput]:
    """The head's outputs for some images in order, each drawn whole at the head's input size.

    Args:
        skipped: images that cannot be read are left out and added to it, as for a probe.

    Raises:
        DataError: too many images cannot be read.
    """

    def draw(index: int) -> tuple[Tensor, Size] | Skipped:
        try:
            pixels, size = images.pixels(index, MAX_PIXELS, max(head.size))
        except Undecodable as error:
            return Skipped(images.name(index), str(error))
        return render(pixels, WHOLE_IMAGE, head.size), size

    with ThreadPoolExecutor(workers) if workers else nullcontext() as pool:
        for start in range(0, len(indices), batch):
            of_batch = indices[start : start + batch].tolist()
            drawn = list((pool.map if pool else map)(draw, of_batch))
            skipped += [image for image in drawn if isinstance(image, Skipped)]
            check_skipped(skipped, len(indices))
            readable = [(start + i, *image) for i, image in enumerate(drawn) if not isinstance(image, Skipped)]
            if readable:
                positions, pixels, sizes = zip(*readable, strict=True)
                yield list(positions), list(sizes), head.compute_output(torch.stack(pixels).float() / 255)


def check_sizes(split: AnnotatedSplit[Any], positions: Sequence[int], sizes: Sequence[Size]) -> None:
    """Refuse annotations of another size than their image.

    Raises:
        DataError: naming the image.
    """
    for position, size in zip(positions, sizes, strict=True):
        check_size(split.images.name(int(split.indices[position])), size, split.annotations[position].size)


def class_indices(head_classes: Sequence[str], data_classes: Sequence[str]) -> list[int]:
    """For each class of a head its index in the data.

    Raises:
        RecipeError: the two do not have the same classes.
    """
    if sorted(head_classes) != sorted(data_classes):
        different = sorted(set(head_classes) ^ set(data_classes))[:5]
        raise RecipeError(
            f"the head has {len(head_classes)} classes, the data {len(data_classes)}; they differ in {different}"
        )
    # the k-th of several classes of one name (ImageNet has two cranes) is the k-th of that name
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(data_classes):
        indices.setdefault(name, []).append(index)
    return [indices[name].pop(0) for name in head_classes]


def head_rows(task: str, values: dict[str, float], n: int, started_at: float, skipped: Sequence[Skipped]) -> list[Row]:
    """Rows of a teacher's head on n test images; others were skipped."""
    settings = {"head": "teacher", **skipped_settings(skipped)}
    return rows_of(task, values, n, time.perf_counter() - started_at, settings)

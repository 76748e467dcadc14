"""Evaluation of a teacher's head on labelled images, with features of the teacher or of a student: what tasks share.

Nothing is fitted. Images are drawn as the head's model takes them, and the head's output is interpreted by its
teacher's post-processing. Scores are of the classes that both have, see `match_classes`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoulders.features import Skipped
from shoulders.images import MAX_PIXELS, Collection, Undecodable
from shoulders.tasks.data.splits import AnnotatedSplit
from shoulders.tasks.feature_bank import check_size
from shoulders.tasks.frame import Frame, ModelInput
from shoulders.tasks.skipped import check_skipped, skipped_settings
from shoulders.tasks.task import HeadWithInput, Row, rows_of

HeadOutput = tuple[list[int], list[Frame], Any]  # positions in the split, frames of the images, the head's output
Drawn = tuple[int, ModelInput]  # position in the split, the image


@torch.no_grad()
def head_outputs(
    head: HeadWithInput,
    images: Collection,
    indices: NDArray[np.int64],
    batch: int,
    workers: int,
    skipped: list[Skipped],
) -> Iterator[HeadOutput]:
    """The head's outputs for some images in order, each drawn as the head's model takes it.

    Args:
        skipped: images that cannot be read are left out and added to it, as for a probe.

    Raises:
        DataError: too many images cannot be read.
    """

    def draw(index: int) -> ModelInput | Skipped:
        try:
            return head.draw(*images.pixels(index, MAX_PIXELS, head.min_side))
        except Undecodable as error:
            return Skipped(images.name(index), str(error))

    with ThreadPoolExecutor(workers) if workers else nullcontext() as pool:
        for start in range(0, len(indices), batch):
            of_batch = indices[start : start + batch].tolist()
            drawn = list((pool.map if pool else map)(draw, of_batch))
            skipped += [image for image in drawn if isinstance(image, Skipped)]
            check_skipped(skipped, len(indices))
            readable = [(start + i, image) for i, image in enumerate(drawn) if not isinstance(image, Skipped)]
            for _, group in groupby(readable, _shapes):
                positions, inputs = zip(*group, strict=True)
                tensors = {name: torch.stack([one.tensors[name] for one in inputs]) for name in inputs[0].tensors}
                yield list(positions), [one.frame for one in inputs], head.compute_output(**tensors)


def _shapes(drawn: Drawn) -> list[torch.Size]:
    """The shapes of an input: images of the same shapes are stacked."""
    return [tensor.shape for tensor in drawn[1].tensors.values()]


def check_sizes(split: AnnotatedSplit[Any], positions: Sequence[int], frames: Sequence[Frame]) -> None:
    """Refuse annotations of another size than their image.

    Raises:
        DataError: naming the image.
    """
    for position, frame in zip(positions, frames, strict=True):
        check_size(split.images.name(int(split.indices[position])), frame.size, split.annotations[position].size)


def head_rows(
    task: str,
    values: dict[str, float],
    n: int,
    started_at: float,
    skipped: Sequence[Skipped],
    head: HeadWithInput,
    settings: Mapping[str, float | int | str],
) -> list[Row]:
    """Rows of a teacher's head on n test images; others were skipped."""
    settings = {"head": "teacher", "input": head.input_description, **settings, **skipped_settings(skipped)}
    return rows_of(task, values, n, time.perf_counter() - started_at, settings)

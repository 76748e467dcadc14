"""How well a head does its job on labelled images: a teacher's own, on the teacher's or on a student's features.

Nothing is fitted: the test images are shown whole, and what the head says, by its teacher's post-processing, is held
against the labels. Classes are told apart by their names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoulders.errors import DataError, RecipeError
from shoulders.images import Collection, Undecodable, View, render
from shoulders.tasks import semantic
from shoulders.tasks.average_precision import Detections, average_precision, interval, match
from shoulders.tasks.data.coco import AnnotatedImage, Annotations, encode
from shoulders.tasks.data.dense import IGNORED, DenseSplit, DenseSplits, MaskFile, read_mask
from shoulders.tasks.data.labelled import Splits
from shoulders.tasks.feature_bank import check_size
from shoulders.tasks.rows import Row

WHOLE = View(0.0, 0.0, 1.0, 1.0)
MAX_PIXELS = 50_000_000


class Head(Protocol):
    """A head and who gives it features.

    Attributes:
        classes: the names of its classes, by index.
        processor: the image processor of its teacher.
        size: (h, w) in px of the images that ``compute_output`` takes.
    """

    classes: Sequence[str]
    processor: Any
    size: tuple[int, int]

    def compute_output(self, pixels: Tensor) -> Any:
        """The head's own output for pixels (B, 3, h, w) in [0, 1]."""
        ...


Shown = tuple[list[int], list[tuple[int, int]], Any]  # rows of the split, (h, w) of the originals, the head's output


def classification(head: Head, splits: Splits, batch: int, workers: int) -> list[Row]:
    """Top-1 on the test images."""
    begun = time.perf_counter()
    names = splits.test.images.classes
    if names is None and splits.n_classes > len(head.classes):
        raise RecipeError(f"the head tells {len(head.classes)} classes apart, the data {splits.n_classes}")
    theirs = torch.tensor(_indices(head.classes, names) if names else range(len(head.classes)))
    labels = torch.from_numpy(splits.test.labels())
    hits = 0
    for rows, _, output in _show(head, splits.test.images, splits.test.indices, batch, workers):
        hits += int((theirs[output.logits.argmax(-1).cpu()] == labels[rows]).sum())
    return _rows("classification", {"top1": hits / len(labels)}, len(labels), begun)


def semantic_segmentation(head: Head, splits: DenseSplits[MaskFile], batch: int, workers: int) -> list[Row]:
    """mIoU, pixel accuracy and the IoU of each class at the size of the masks."""
    begun = time.perf_counter()
    theirs, n_classes = torch.tensor(_indices(head.classes, splits.classes)), len(splits.classes)
    counted = torch.zeros(n_classes**2, dtype=torch.int64)
    for rows, sizes, output in _show(head, splits.test.images, splits.test.indices, batch, workers):
        _agree(splits.test, rows, sizes)
        maps = head.processor.post_process_semantic_segmentation(output, target_sizes=sizes)
        for row, predicted in zip(rows, maps, strict=True):
            truth = torch.from_numpy(read_mask(splits.test.truths[row].path, n_classes)).long()
            known = truth != IGNORED
            pairs = truth[known] * n_classes + theirs[predicted.cpu().long()][known]
            counted += pairs.bincount(minlength=n_classes**2)
    told = semantic.scores(counted.view(n_classes, n_classes), splits.classes)
    return _rows("semantic", told, len(splits.test.truths), begun)


def detection(head: Head, splits: DenseSplits[AnnotatedImage], batch: int, workers: int) -> list[Row]:
    """Average precision of boxes on the test images."""
    return _objects("detection", head, splits, batch, workers, boxes_found, {"": "boxes"})


def boxes_found(processor: Any, output: Any, sizes: list[tuple[int, int]]) -> Iterator[Detections]:
    """What a detector's output means in each image, of the detector's own classes."""
    for one in processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes):
        scores, kinds, boxes = (one[part].detach().cpu().numpy() for part in ("scores", "labels", "boxes"))
        yield Detections(kinds, scores.astype(np.float64), boxes.astype(np.float64))


def instance(head: Head, splits: DenseSplits[AnnotatedImage], batch: int, workers: int) -> list[Row]:
    """Average precision of the boxes around masks on the test images, and of the masks (``mask_AP`` and so on)."""
    return _objects("instance", head, splits, batch, workers, masks_found, {"mask_": "masks", "": "boxes"})


def masks_found(processor: Any, output: Any, sizes: list[tuple[int, int]]) -> Iterator[Detections]:
    """What an instance segmenter's output means in each image, of its own classes, with boxes around the masks."""
    for at, size in enumerate(sizes):
        # one at a time: it enlarges every mask that was asked for, all at once
        single = SimpleNamespace(**{name: part[at : at + 1] for name, part in output.items() if torch.is_tensor(part)})
        one = processor.post_process_instance_segmentation(
            single, threshold=0.0, target_sizes=[size], return_binary_maps=True
        )[0]
        told = one["segments_info"]
        masks = one["segmentation"].detach().cpu().numpy() > 0.5 if told else np.zeros((0, *size), dtype=bool)
        kinds = np.array([segment["label_id"] for segment in told], dtype=np.int64)
        scores = np.array([segment["score"] for segment in told], dtype=np.float64)
        yield Detections(kinds, scores, _tight(masks), encode(masks) if told else ())


def _objects(
    task: str,
    head: Head,
    splits: DenseSplits[AnnotatedImage],
    batch: int,
    workers: int,
    found: Callable[[Any, Any, list[tuple[int, int]]], Iterator[Detections]],
    kinds: dict[str, Any],
) -> list[Row]:
    begun = time.perf_counter()
    theirs = np.array(_indices(head.classes, splits.classes), dtype=np.int64)
    answers: list[Detections] = []
    for rows, sizes, output in _show(head, splits.test.images, splits.test.indices, batch, workers):
        _agree(splits.test, rows, sizes)
        answers += [replace(one, classes=theirs[one.classes]) for one in found(head.processor, output, sizes)]
    truth = Annotations(splits.classes, tuple(splits.test.truths))
    told: dict[str, float] = {}
    for prefix, kind in kinds.items():
        matched = match(truth, answers, kind)
        told |= {f"{prefix}{name}": value for name, value in average_precision(matched).items() if value == value}
        low, high = interval(matched)
        told |= {f"{prefix}AP_low": low, f"{prefix}AP_high": high}
    return _rows(task, told, len(answers), begun)


@torch.no_grad()
def _show(head: Head, images: Collection, indices: NDArray[np.int64], batch: int, workers: int) -> Iterator[Shown]:
    """What the head says of some images, each drawn whole at its input size, in order."""

    def drawn(index: int) -> tuple[Tensor, tuple[int, int]]:
        try:
            pixels, size = images.pixels(index, MAX_PIXELS, max(head.size))
        except Undecodable as error:
            raise DataError(f"{images.name(index)}: {error}; correct it or leave it out") from error
        return render(pixels, WHOLE, head.size), size

    with ThreadPoolExecutor(workers) if workers else nullcontext() as pool:
        for start in range(0, len(indices), batch):
            few = indices[start : start + batch].tolist()
            pairs = list((pool.map if pool else map)(drawn, few))
            output = head.compute_output(torch.stack([pixels for pixels, _ in pairs]).float() / 255)
            yield list(range(start, start + len(few))), [size for _, size in pairs], output


def _agree(split: DenseSplit[Any], rows: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
    for row, size in zip(rows, sizes, strict=True):
        check_size(split.images.name(int(split.indices[row])), size, split.truths[row].size)


def _indices(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """For each class of a head the index that the data has for it.

    Raises:
        RecipeError: the two do not have the same classes.
    """
    if sorted(theirs) != sorted(ours):
        odd = sorted(set(theirs) ^ set(ours))[:5]
        raise RecipeError(f"the head tells {len(theirs)} classes apart, the data {len(ours)}; they differ in {odd}")
    # the k-th of several classes of one name (ImageNet has two cranes) is the k-th of that name
    places: dict[str, list[int]] = {}
    for place, name in enumerate(ours):
        places.setdefault(name, []).append(place)
    return [places[name].pop(0) for name in theirs]


def _rows(task: str, told: dict[str, float], n: int, begun: float) -> list[Row]:
    seconds = time.perf_counter() - begun
    return [
        Row(task=task, metric=metric, value=value, n=n, seconds=seconds, settings={"head": "inherited"})
        for metric, value in told.items()
    ]


def _tight(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Left, top, right, bottom (n, 4) around masks (n, H, W), right and bottom exclusive."""
    sides = [(line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)) for line in (np.any(masks, 1), np.any(masks, 2))]
    (left, right), (top, bottom) = sides
    return np.stack([left, top, right, bottom], 1).astype(np.float64)


HEADS: dict[str, Callable[[Any, Any, int, int], list[Row]]] = {
    "classification": classification,
    "detection": detection,
    "semantic": semantic_segmentation,
    "instance": instance,
}

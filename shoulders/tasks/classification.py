"""Image classification: k nearest neighbours, a linear probe, few labelled images; finetuning; teacher heads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.errors import DataError, RecipeError
from shoulders.features import Features, FeaturesOf, Skipped
from shoulders.images import MAX_PIXELS, Undecodable, View, evaluation_batches
from shoulders.tasks.class_match import match_classes
from shoulders.tasks.data.labelled import LabelledSplit, LabelledSplits, find_labelled
from shoulders.tasks.heads.linear import LinearHead
from shoulders.tasks.skipped import skipped_settings
from shoulders.tasks.task import HeadWithInput, Metric, ProbeHead, Row, Size, Task
from shoulders.tasks.teacher_head_eval import head_outputs, head_rows
from shoulders.tasks.vector_probes import LabelledVectors, evaluate_vectors, extract_vectors, image_vectors, top1

NUM_BEST_CLASSES = 5  # that a prediction lists, and that top-5 counts
MIN_TOP5_CLASSES = 10  # of fewer, five classes would be half of all or more


def fit_classification_probes(
    features_of: FeaturesOf,
    splits: LabelledSplits,
    sizes: Sequence[Size],
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    on_head: Callable[[nn.Module], object] = lambda head: None,
    step_fraction: float = 1.0,
    widths: Sequence[int] = (),
) -> list[Row]:
    """Rows of every probe of one model, from labelled images to scores.

    Args:
        features_of: Features of a batch, rendered at ``sizes``, on whichever device it computes.
        splits: see `find_labelled`.
        sizes: (h, w) in px of the inputs that ``features_of`` needs.
        batch: images per batch.
        workers: processes that decode.
        seed: of what is held out of train, and of the few-shot draws.
        on_head: called with the fitted `LinearHead`.
        step_fraction: shortens fits that take steps; these do not.
        widths: channels of each of several models whose vectors are side by side, see `LabelledVectors`.
    """
    started_at = time.perf_counter()

    def extract(split: LabelledSplit) -> LabelledVectors:
        return extract_vectors(
            features_of, evaluation_batches(split.images, list(sizes), batch, split.indices, workers=workers), widths
        )

    train, test = extract(splits.train), extract(splits.test)
    val = None if splits.val is None else extract(splits.val)
    common: dict[str, float | int | str] = {
        "split": splits.how,
        "train": len(train.x),
        "skipped": sum(len(part.skipped) for part in (train, val, test) if part is not None),
        "features_seconds": time.perf_counter() - started_at,
        **skipped_settings(test.skipped),
    }
    rows = evaluate_vectors(train, val, test, splits.n_classes, seed, "classification", on_head)
    return [Row(**{**row, "settings": row["settings"] | common}) for row in rows]


@torch.no_grad()
def predict_classes(
    head: LinearHead, classes: Sequence[str], features: Features, sizes: Sequence[Size], threshold: float
) -> list[Any]:
    """``[{label, score}]`` for each image, the best five first; the threshold does not apply."""
    scores, indices = head(image_vectors(features).float()).softmax(-1).sort(descending=True)
    best = scores[:, :NUM_BEST_CLASSES].tolist(), indices[:, :NUM_BEST_CLASSES].tolist()
    return [
        [{"label": classes[index], "score": score} for score, index in zip(*pair, strict=True)]
        for pair in zip(*best, strict=True)
    ]


@dataclass(frozen=True)
class ClassificationTask:
    """Finetuning: cross-entropy of the linear head on `image_vectors`."""

    splits: LabelledSplits
    task: str = "classification"
    metric: str = "top1"
    whole_images: bool = False

    def build_head(self, width: int) -> nn.Module:
        """A fresh linear head."""
        return LinearHead(width, self.splits.n_classes)

    def read_image(self, split: LabelledSplit, position: int, min_side: int) -> tuple[Tensor, Size] | Skipped:
        """A decoded image and its full size."""
        index = int(split.indices[position])
        try:
            return split.images.pixels(index, MAX_PIXELS, min_side)
        except Undecodable as error:
            return Skipped(split.images.name(index), str(error))

    def target(self, split: LabelledSplit, position: int, view: View, grid: tuple[int, int]) -> int:
        """The class of the image, whatever the view."""
        return int(split.take(np.array([position])).labels()[0])

    def loss(self, head: nn.Module, features: Features, targets: Sequence[int]) -> Tensor:
        """Mean cross-entropy."""
        vectors = image_vectors(features)  # (B, C)
        return F.cross_entropy(head(vectors), torch.tensor(targets, device=vectors.device))

    @torch.no_grad()
    def evaluate(
        self, head: nn.Module, features_of: FeaturesOf, split: LabelledSplit, size: Size, batch: int, workers: int
    ) -> tuple[dict[str, float], int]:
        """Top-1."""
        batches = evaluation_batches(split.images, [size], batch, split.indices, workers=workers)
        vectors = extract_vectors(features_of, batches)
        device = next(head.parameters()).device
        predicted = head(vectors.x.to(device)).argmax(1).cpu()
        return {"top1": top1(predicted, vectors.labels)}, len(vectors.x)


def evaluate_classification_head(head: HeadWithInput, splits: LabelledSplits, batch: int, workers: int) -> list[Row]:
    """Top-1 of a teacher's head on the test images of the classes that the head has, among these classes alone.

    From ten classes on, also top-5: the fraction of the images whose class is among the five of the highest logits.
    """
    started_at = time.perf_counter()
    match = match_classes(head.classes, splits.classes, head.class_map)
    if len(match.common) < 2:
        only = splits.classes[match.common[0]]
        raise RecipeError(f"head and data have only {only!r} in common; top-1 needs two classes: give --classes")
    indices, labels = torch.tensor(match.indices), splits.test.labels()
    test = splits.test.take(np.flatnonzero(np.isin(labels, match.common)))
    if not len(test.indices):
        raise DataError(f"none of the {len(labels)} test images is of a class that the head has")
    true_classes = torch.from_numpy(test.labels())
    skipped: list[Skipped] = []
    hits, n = dict.fromkeys(("top1", "top5") if len(match.common) >= MIN_TOP5_CLASSES else ("top1",), 0), 0
    for positions, _, output in head_outputs(head, test.images, test.indices, batch, workers, skipped):
        logits = output.logits.cpu().masked_fill(indices < 0, -math.inf)  # (B, classes of the head)
        hits["top1"] += int((indices[logits.argmax(-1)] == true_classes[positions]).sum())
        if "top5" in hits:
            best = indices[logits.topk(NUM_BEST_CLASSES).indices]  # (B, 5)
            hits["top5"] += int((best == true_classes[positions, None]).any(1).sum())
        n += len(positions)
    settings = {"split": splits.how, **match.settings(len(labels) - len(test.indices), "images")}
    values = {metric: count / n for metric, count in hits.items()}
    return head_rows("classification", values, n, started_at, skipped, head, settings)


def class_label(split: LabelledSplit, position: int, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The class of an image in the form of a prediction."""
    return [{"label": classes[int(split.labels()[position])], "score": None}]


TASK = Task(
    name="classification",
    title="Image classification",
    metrics=(
        Metric("top1", "top-1", "linear_top1", "top1", ("linear_top1", "top1", "zero_shot_top1")),
        Metric("knn_top1", "k-NN top-1", "knn_top1", None, ("knn_top1",)),
    ),
    find_splits=find_labelled,
    needs_spatial=False,
    fit_probe=fit_classification_probes,
    probe_head=ProbeHead("linear", LinearHead, lambda head: len(head.mean), predict_classes),
    finetune=ClassificationTask,
    evaluate_head=evaluate_classification_head,
    head_classes=(
        "ForImageClassification",
        "ForImageClassificationWithTeacher",
        "CLIPModel",
        "SiglipModel",
        "Siglip2Model",
    ),
    labels_as_predictions=class_label,
    zero_shot=True,
    folders=("classification",),
    image_paths=("{split}", "{split}.parquet", "{split}.tar"),
)

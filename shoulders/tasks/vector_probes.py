"""Probes on one vector per image: k nearest neighbours, a linear head, few labelled images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.errors import DataError, NumericError
from shoulders.features import Batch, Features, FeaturesOf, Skipped
from shoulders.tasks.heads.linear import LinearHead, fit_logistic, linear_logits
from shoulders.tasks.skipped import check_skipped
from shoulders.tasks.task import Row

Settings = dict[str, float | int | str]

# From strong to weak, each fit starting from the one before; the features are standardized.
L2_GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
FEW_SHOT_DRAWS = 5


@dataclass(frozen=True)
class LabelledVectors:
    """The features of a labelled split.

    Args:
        x: (n, C) float32 on the CPU, one vector per image.
        labels: (n,) int64.
        ids: (n,) int64, the stable id of each image.
        skipped: images that could not be read and are not among the n.
        widths: channels of each of several models whose vectors are side by side, C in all; (): of one model.
    """

    x: Tensor
    labels: Tensor
    ids: Tensor
    skipped: tuple[Skipped, ...] = ()
    widths: tuple[int, ...] = ()

    def unit(self) -> Tensor:
        """(n, C) of unit length, to be compared by cosine.

        Of several models, each vector is of the same length before they are one (as arXiv 2305.15347 does), so that
        no model counts more because its numbers are larger: the cosine is the mean of those of the models.
        """
        if not self.widths:
            return F.normalize(self.x)
        return F.normalize(torch.cat([F.normalize(x) for x in self.x.split(self.widths, 1)], 1))


@torch.no_grad()
def extract_vectors(features_of: FeaturesOf, batches: Iterable[Batch], widths: Sequence[int] = ()) -> LabelledVectors:
    """One vector per image, see `image_vectors`; ``widths`` are those of `LabelledVectors`.

    Raises:
        DataError: if the images have no labels, there are none, or too many cannot be read.
        NumericError: if a feature is not finite.
    """
    vectors: list[Tensor] = []
    labels: list[Tensor] = []
    ids: list[Tensor] = []
    skipped: list[Skipped] = []
    for batch in batches:
        skipped.extend(batch.skipped)
        if not len(batch):
            continue
        if batch.labels is None:
            raise DataError("classification needs labels, but these images have none: give images with labels")
        vectors.append(image_vectors(features_of(batch)).float().cpu())  # (B, C)
        labels.append(batch.labels.cpu())
        ids.append(batch.ids.cpu())
    if not vectors:
        raise DataError(f"none of the {len(skipped)} labelled images could be read")
    x = torch.cat(vectors)
    check_skipped(skipped, len(x) + len(skipped))
    if not x.isfinite().all():
        bad = int((~x.isfinite().all(1)).sum())
        raise NumericError(f"features of {bad} of {len(x)} images are not finite: check the weights")
    return LabelledVectors(x, torch.cat(labels), torch.cat(ids), tuple(skipped), tuple(widths))


def image_vectors(features: Features) -> Tensor:
    """(B, C): the summary, or the mean over the tokens where there is none."""
    if features.summary is not None:
        return features.summary
    assert features.spatial is not None  # noqa: S101  (Features guarantees one of the two)
    return features.spatial.mean(1)


def evaluate_vectors(
    train: LabelledVectors,
    val: LabelledVectors | None,
    test: LabelledVectors,
    n_classes: int,
    seed: int,
    task: str,
    on_head: Callable[[nn.Module], object] = lambda head: None,
) -> list[Row]:
    """Rows of a task: fit on train, select on val (or a tenth of train), evaluate on test.

    A few-shot row is left out where a class has fewer training images than it needs.
    """
    rows: list[Row] = []
    for metric, evaluate in (PROBES | {"linear_top1": partial(linear_top1, on_head=on_head)}).items():
        started_at = time.perf_counter()
        result = evaluate(train, val, test, n_classes, seed)
        if result is not None:
            seconds = time.perf_counter() - started_at
            rows.append(
                Row(
                    task=task,
                    metric=metric,
                    value=result[0],
                    n=len(test.x),
                    seconds=seconds,
                    settings=result[1],
                )
            )
    return rows


def knn_top1(
    train: LabelledVectors, val: LabelledVectors | None, test: LabelledVectors, n_classes: int, seed: int
) -> tuple[float, Settings]:
    """Weighted vote of the 20 nearest by cosine, temperature 0.07 (DINO, arXiv 2104.14294)."""
    k, temperature = min(20, len(train.x)), 0.07
    bank = train.unit().T.contiguous()  # (C, n)
    chunk = max(1, 2**25 // len(train.x))  # 128 MB of similarities
    predicted = []
    for queries in test.unit().split(chunk):
        similarity, neighbours = (queries @ bank).topk(k)  # (chunk, k) each
        votes = torch.zeros(len(queries), n_classes)
        votes.scatter_add_(1, train.labels[neighbours], (similarity / temperature).exp())
        predicted.append(votes.argmax(1))
    return top1(torch.cat(predicted), test.labels), {"k": k, "temperature": temperature}


def linear_top1(
    train: LabelledVectors,
    val: LabelledVectors | None,
    test: LabelledVectors,
    n_classes: int,
    seed: int,
    on_head: Callable[[nn.Module], object] = lambda head: None,
) -> tuple[float, Settings]:
    """Top-1 of `fit_linear_head`."""
    head, settings = fit_linear_head(train, val, n_classes, seed)
    on_head(head)
    with torch.no_grad():
        return top1(head(test.x).argmax(1), test.labels), settings


def fit_linear_head(
    train: LabelledVectors, val: LabelledVectors | None, n_classes: int, seed: int
) -> tuple[LinearHead, Settings]:
    """Multinomial logistic regression on features standardized with the statistics of train."""
    head = LinearHead(train.x.shape[1], n_classes)
    head.mean, std = train.x.mean(0), train.x.std(0, correction=0)
    std[std < 1e-6 * std.max()] = 1  # a constant channel stays 0
    head.std = std
    x = head.standardize(train.x)
    if val is not None:
        fit_x, fit_labels, val_x, val_labels = x, train.labels, head.standardize(val.x), val.labels
    else:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        select, fit = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
        fit_x, fit_labels, val_x, val_labels = x[fit], train.labels[fit], x[select], train.labels[select]

    fits: list[tuple[float, float, Tensor]] = []  # (value on val, l2, weights)
    start = None
    for l2 in L2_GRID:
        start = fit_logistic(fit_x, fit_labels, n_classes, l2, start, max_iterations=50)  # enough to compare
        fits.append((top1(linear_logits(start, val_x).argmax(1), val_labels), l2, start))
    _, l2, weights = max(fits, key=lambda fit: fit[:2])  # of equals, the strongest regularization
    head.weights = nn.Parameter(fit_logistic(x, train.labels, n_classes, l2, start=weights))
    return head.eval(), {"l2": l2, "selected_on": "a tenth of train" if val is None else "val"}


def few_shot_top1(
    shots: int,
    train: LabelledVectors,
    val: LabelledVectors | None,
    test: LabelledVectors,
    n_classes: int,
    seed: int,
) -> tuple[float, Settings] | None:
    """Nearest class mean of unit vectors, the mean of several draws; None where a class has too few training images.

    As SimpleShot (arXiv 1911.04623), but by cosine.
    """
    counts = train.labels.bincount(minlength=n_classes)  # (K,)
    if counts.min() < shots:
        return None
    first = counts.cumsum(0) - counts  # (K,), where a class begins once the images are sorted by class
    generator = torch.Generator().manual_seed(seed)
    x, test_x = train.unit(), test.unit()
    values = []
    for _ in range(FEW_SHOT_DRAWS):
        order = torch.randperm(len(x), generator=generator)
        by_class = order[train.labels[order].argsort(stable=True)]  # (n,), shuffled within each class
        drawn = by_class[first[:, None] + torch.arange(shots)]  # (K, shots)
        means = F.normalize(x[drawn].mean(1))  # (K, C)
        values.append(top1((test_x @ means.T).argmax(1), test.labels))
    spread = torch.tensor(values, dtype=torch.float64)
    return spread.mean().item(), {"draws": FEW_SHOT_DRAWS, "std": spread.std().item()}


# metric -> (train, val, test, n_classes, seed) -> (value, settings), or None where it cannot be computed
PROBES: dict[str, Callable[..., tuple[float, Settings] | None]] = {
    "knn_top1": knn_top1,
    "linear_top1": linear_top1,
    "1shot_top1": partial(few_shot_top1, 1),
    "5shot_top1": partial(few_shot_top1, 5),
    "10shot_top1": partial(few_shot_top1, 10),
}


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Fraction of the images whose predicted class is their label; both (n,)."""
    return (predicted == labels).double().mean().item()

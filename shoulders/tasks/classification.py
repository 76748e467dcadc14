"""Image classification by frozen features: k nearest neighbours, a linear probe, and few labelled images.

A task knows a function from images to Features, never a model, so that teachers, base and student are
measured by the same lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.errors import DataError, NumericError
from shoulders.features import Batch, Features, Skipped
from shoulders.images import evaluation_batches
from shoulders.tasks.data.labelled import Split, Splits
from shoulders.tasks.rows import Row

Settings = dict[str, float | int | str]

# From strong to weak, each fit starting from the one before; the features are standardized.
L2_GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
FEW_SHOT_DRAWS = 5


@dataclass(frozen=True)
class Extracted:
    """The frozen features of a labelled split.

    Args:
        x: (n, C) float32 on the CPU, one vector per image.
        labels: (n,) int64.
        ids: (n,) int64, the stable id of each image.
        skipped: images that could not be read and are not among the n.
    """

    x: Tensor
    labels: Tensor
    ids: Tensor
    skipped: tuple[Skipped, ...] = ()


def run(
    features_of: Callable[[Batch], Features],
    splits: Splits,
    sizes: list[tuple[int, int]],
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    on_head: Callable[[nn.Module], object] = lambda head: None,
    effort: float = 1.0,
) -> list[Row]:
    """Every metric of one function from images to Features on labelled images, from end to end.

    Args:
        features_of: Features of a batch, rendered at ``sizes``; whoever gives it puts it on its device.
        splits: see `find_splits`.
        sizes: the (h, w) that ``features_of`` asks its batches for.
        batch: images at a time.
        workers: processes that decode.
        seed: of what is held out of train, and of the few-shot draws.
        on_head: called with the fitted `Linear`.
        effort: of tasks whose heads take steps to fit, the share of them; here nothing.
    """
    begun = time.perf_counter()

    def extracted(split: Split) -> Extracted:
        return extract(features_of, evaluation_batches(split.images, sizes, batch, split.indices, workers=workers))

    train, test = extracted(splits.train), extracted(splits.test)
    val = None if splits.val is None else extracted(splits.val)
    told: Settings = {
        "split": splits.how,
        "train": len(train.x),
        "skipped": sum(len(part.skipped) for part in (train, val, test) if part is not None),
        "features_seconds": time.perf_counter() - begun,
    }
    rows = evaluate(train, val, test, splits.n_classes, seed, on_head)
    return [Row(**{**row, "settings": row["settings"] | told}) for row in rows]


@torch.no_grad()
def extract(features_of: Callable[[Batch], Features], batches: Iterable[Batch]) -> Extracted:
    """One vector per image: the summary, or the mean over the places where there is none.

    Raises:
        DataError: if the images have no labels, or there are none.
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
    if not x.isfinite().all():
        bad = int((~x.isfinite().all(1)).sum())
        raise NumericError(f"features of {bad} of {len(x)} images are not finite: check the weights")
    return Extracted(x, torch.cat(labels), torch.cat(ids), tuple(skipped))


def image_vectors(features: Features) -> Tensor:
    """(B, C): the summary, or the mean over the places."""
    if features.summary is not None:
        return features.summary
    assert features.spatial is not None  # noqa: S101  (Features guarantees one of the two)
    return features.spatial.mean(1)


def evaluate(
    train: Extracted,
    val: Extracted | None,
    test: Extracted,
    n_classes: int,
    seed: int,
    on_head: Callable[[nn.Module], object] = lambda head: None,
) -> list[Row]:
    """Fit on train, choose on val (or a tenth of train), score on test.

    A few-shot row is left out where a class has fewer training images than it asks for.
    """
    rows: list[Row] = []
    for metric, measure in (METRICS | {"linear_top1": partial(linear_top1, on_head=on_head)}).items():
        begun = time.perf_counter()
        scored = measure(train, val, test, n_classes, seed)
        if scored is None:
            continue
        rows.append(
            Row(
                task="classification",
                metric=metric,
                value=scored[0],
                n=len(test.x),
                seconds=time.perf_counter() - begun,
                settings=scored[1],
            )
        )
    return rows


def knn_top1(
    train: Extracted, val: Extracted | None, test: Extracted, n_classes: int, seed: int
) -> tuple[float, Settings]:
    """Weighted vote of the 20 nearest by cosine, temperature 0.07 (DINO, arXiv 2104.14294)."""
    k, temperature = min(20, len(train.x)), 0.07
    bank = F.normalize(train.x).T.contiguous()  # (C, n)
    rows_at_once = max(1, 2**25 // len(train.x))  # 128 MB of similarities
    predicted = []
    for queries in F.normalize(test.x).split(rows_at_once):
        similarity, neighbours = (queries @ bank).topk(k)  # (rows, k) each
        votes = torch.zeros(len(queries), n_classes)
        votes.scatter_add_(1, train.labels[neighbours], (similarity / temperature).exp())
        predicted.append(votes.argmax(1))
    return top1(torch.cat(predicted), test.labels), {"k": k, "temperature": temperature}


class Linear(nn.Module):
    """Standardized vectors (B, C) to logits (B, K); at birth it says nothing and leaves vectors as they are."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.weights = nn.Parameter(torch.zeros(width + 1, n_classes))  # the last row is the bias

    def standardized(self, x: Tensor) -> Tensor:
        """(B, C) with the mean and the deviation of the images it was fitted on taken out."""
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.weights, self.standardized(x))


def linear_top1(
    train: Extracted,
    val: Extracted | None,
    test: Extracted,
    n_classes: int,
    seed: int,
    on_head: Callable[[nn.Module], object] = lambda head: None,
) -> tuple[float, Settings]:
    """Top-1 of `fit_linear`."""
    head, settings = fit_linear(train, val, n_classes, seed)
    on_head(head)
    with torch.no_grad():
        return top1(head(test.x).argmax(1), test.labels), settings


def fit_linear(train: Extracted, val: Extracted | None, n_classes: int, seed: int) -> tuple[Linear, Settings]:
    """Multinomial logistic regression on features standardized with the statistics of train."""
    head = Linear(train.x.shape[1], n_classes)
    head.mean, std = train.x.mean(0), train.x.std(0, correction=0)
    std[std < 1e-6 * std.max()] = 1  # a constant channel says nothing: it stays 0
    head.std = std
    x = head.standardized(train.x)
    if val is not None:
        fit_x, fit_labels, val_x, val_labels = x, train.labels, head.standardized(val.x), val.labels
    else:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        held, kept = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
        fit_x, fit_labels, val_x, val_labels = x[kept], train.labels[kept], x[held], train.labels[held]

    fits: list[tuple[float, float, Tensor]] = []  # (value on val, l2, weights)
    start = None
    for l2 in L2_GRID:
        start = fit_logistic(fit_x, fit_labels, n_classes, l2, start, iterations=50)  # enough to compare
        fits.append((top1(logits(start, val_x).argmax(1), val_labels), l2, start))
    _, l2, weights = max(fits, key=lambda fit: fit[:2])  # of equals, the strongest regularization
    head.weights = nn.Parameter(fit_logistic(x, train.labels, n_classes, l2, start=weights))
    return head.eval(), {"l2": l2, "selected_on": "a tenth of train" if val is None else "val"}


def few_shot_top1(
    shots: int, train: Extracted, val: Extracted | None, test: Extracted, n_classes: int, seed: int
) -> tuple[float, Settings] | None:
    """Nearest class mean of unit vectors by cosine (as SimpleShot, arXiv 1911.04623, but for that), of several draws.

    None where a class has fewer than ``shots`` training images.
    """
    counts = train.labels.bincount(minlength=n_classes)  # (K,)
    if counts.min() < shots:
        return None
    first = counts.cumsum(0) - counts  # (K,), where a class begins once the images are sorted by class
    generator = torch.Generator().manual_seed(seed)
    x, test_x = F.normalize(train.x), F.normalize(test.x)
    values = []
    for _ in range(FEW_SHOT_DRAWS):
        order = torch.randperm(len(x), generator=generator)
        by_class = order[train.labels[order].argsort(stable=True)]  # (n,), shuffled within each class
        drawn = by_class[first[:, None] + torch.arange(shots)]  # (K, shots)
        means = F.normalize(x[drawn].mean(1))  # (K, C)
        values.append(top1((test_x @ means.T).argmax(1), test.labels))
    spread = torch.tensor(values, dtype=torch.float64)
    return spread.mean().item(), {"draws": FEW_SHOT_DRAWS, "std": spread.std().item()}


# Each: (train, val, test, n_classes, seed) -> (value, settings), or None where it cannot be measured.
METRICS: dict[str, Callable[..., tuple[float, Settings] | None]] = {
    "knn_top1": knn_top1,
    "linear_top1": linear_top1,
    "1shot_top1": partial(few_shot_top1, 1),
    "5shot_top1": partial(few_shot_top1, 5),
    "10shot_top1": partial(few_shot_top1, 10),
}


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Fraction of the images whose predicted class is theirs; both (n,)."""
    return (predicted == labels).double().mean().item()


def fit_logistic(
    x: Tensor, labels: Tensor, n_classes: int, l2: float, start: Tensor | None = None, iterations: int = 100
) -> Tensor:
    """Weights (C + 1, K), the last row the bias, that minimise mean cross-entropy + l2 / 2 |weights|^2.

    The bias is not regularized. Full-batch L-BFGS, from ``start`` or from zero.
    """
    weights = torch.zeros(x.shape[1] + 1, n_classes) if start is None else start.clone()  # (C + 1, K)
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=iterations, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits(weights, x), labels) + l2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def logits(weights: Tensor, x: Tensor) -> Tensor:
    """(n, K) of weights (C + 1, K) and features (n, C)."""
    return torch.addmm(weights[-1], x, weights[:-1])

"""Semantic segmentation by frozen features: a linear probe on the places (DINOv2, arXiv 2304.07193)."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Batch, Features
from shoulders.tasks.data.dense import IGNORED, DenseSplit, DenseSplits, MaskFile, read_mask
from shoulders.tasks.feature_bank import FeatureBank, hold_out, minibatches
from shoulders.tasks.rows import Row

LR_GRID = (3e-3, 1e-2, 3e-2)
BATCH = 16
EPOCHS = 20
FEWEST_STEPS, MOST_STEPS = 400, 20_000
AT_ONCE = 2**26  # logits that are enlarged together
ENLARGE = 4  # logits are compared with the masks at this many times the grid
WEIGHT_DECAY = 1e-3


def run(
    features_of: Callable[[Batch], Features],
    splits: DenseSplits[MaskFile],
    sizes: list[tuple[int, int]],
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    on_head: Callable[[nn.Module], object] = lambda head: None,
    effort: float = 1.0,
) -> list[Row]:
    """mIoU, pixel accuracy and the IoU of each class, from end to end; see `classification.run`."""
    begun = time.perf_counter()
    n_classes = len(splits.classes)

    def frozen(split: DenseSplit[MaskFile]) -> FeatureBank[MaskFile]:
        return FeatureBank(features_of, split, sizes[0], batch, workers)

    train, test = frozen(splits.train), frozen(splits.test)
    val = None if splits.val is None else frozen(splits.val)
    fit_on, choose_on = hold_out(train) if val is None else (train, val)
    computed = time.perf_counter()
    tried: list[tuple[float, float, nn.Module]] = []  # (mIoU, learning rate, head)
    labels = small_masks(fit_on, n_classes)
    for lr in LR_GRID:
        head = fit(fit_on, labels, n_classes, lr, seed, effort)
        tried.append((mean_iou(confusion(head, choose_on, n_classes)), lr, head))
    _, lr, head = max(tried, key=lambda fitted: fitted[0])
    if val is None:  # with what was held out
        head = fit(train, small_masks(train, n_classes), n_classes, lr, seed, effort)
    on_head(head)
    counted = confusion(head, test, n_classes)
    settings: dict[str, float | int | str] = {
        "head": "linear",
        "lr": lr,
        "steps": steps_for(len(train), effort),
        "batch": BATCH,
        "weight_decay": WEIGHT_DECAY,
        "seed": seed,
        "split": splits.how,
        "selected_on": "val" if val is not None else "a fifth of train",
        "train": len(train),
        "skipped": sum(len(part.skipped) for part in (train, val, test) if part is not None),
        "features_seconds": computed - begun,
    }
    seconds = time.perf_counter() - computed
    return [
        Row(task="semantic", metric=metric, value=value, n=len(test), seconds=seconds, settings=settings)
        for metric, value in scores(counted, splits.classes).items()
    ]


def steps_for(images: int, effort: float = 1.0) -> int:
    """How many minibatches a fit takes."""
    return max(1, round(effort * min(max(FEWEST_STEPS, EPOCHS * images // BATCH), MOST_STEPS)))


def linear_head(width: int, n_classes: int) -> nn.Module:
    """Batch norm and one linear map: (B, C, H, W) -> (B, K, H, W)."""
    logits = nn.Conv2d(width, n_classes, 1)
    nn.init.normal_(logits.weight, std=0.01)
    nn.init.zeros_(logits.get_parameter("bias"))
    return nn.Sequential(nn.BatchNorm2d(width), logits)


def fit(
    frozen: FeatureBank[MaskFile], labels: Tensor, n_classes: int, lr: float, seed: int, effort: float = 1.0
) -> nn.Module:
    """A head fitted with cross entropy on the enlarged logits; AdamW, the rate falling by half a cosine.

    Args:
        labels: (n, 4 H, 4 W) uint8, as `small_masks`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = linear_head(frozen.width, n_classes).to(frozen.device)
    steps = steps_for(len(frozen), effort)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rows in minibatches(len(frozen), BATCH, steps, torch.Generator().manual_seed(seed)):
        logits = enlarge(head(frozen.maps(rows)), (labels.shape[1], labels.shape[2]))  # (B, K, 4 H, 4 W)
        truth = labels[rows].to(frozen.device).long()
        loss = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum")
        optimizer.zero_grad()
        (loss / (truth != IGNORED).sum().clamp(min=1)).backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def small_masks(frozen: FeatureBank[MaskFile], n_classes: int) -> Tensor:
    """(n, 4 H, 4 W) uint8, the nearest pixel of each mask."""
    size = (ENLARGE * frozen.grid[0], ENLARGE * frozen.grid[1])
    masks = (torch.from_numpy(read_mask(truth.path, n_classes)) for truth in frozen.truths)
    return torch.cat([F.interpolate(mask[None, None], size, mode="nearest-exact")[0] for mask in masks])


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, K, H, W) -> (B, K, h, w), bilinear."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def class_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, H, W) -> (h, w) int64 on the CPU: the class of the highest logit, enlarged a few classes at a time."""
    few = max(1, AT_ONCE // (size[0] * size[1]))
    best, chosen = enlarge(logits[None, :few], size)[0].max(0)  # (h, w)
    for first in range(few, len(logits), few):
        values, indices = enlarge(logits[None, first : first + few], size)[0].max(0)
        higher = values > best
        best, chosen = torch.where(higher, values, best), torch.where(higher, indices + first, chosen)
    return chosen.cpu()


@torch.no_grad()
def confusion(head: nn.Module, frozen: FeatureBank[MaskFile], n_classes: int) -> Tensor:
    """(K, K) int64: pixels of each true class (rows) by predicted class, at the size of the masks."""
    counted = torch.zeros(n_classes * n_classes, dtype=torch.int64)
    for start in range(0, len(frozen), BATCH):
        rows = range(start, min(start + BATCH, len(frozen)))
        for row, logits in zip(rows, head(frozen.maps(rows)), strict=True):
            mask = frozen.truths[row]
            predicted = class_map(logits, mask.size)  # (h, w)
            truth = torch.from_numpy(read_mask(mask.path, n_classes)).long()
            known = truth != IGNORED
            pairs = truth[known] * n_classes + predicted[known]
            counted += pairs.bincount(minlength=n_classes * n_classes)
    return counted.view(n_classes, n_classes)


def scores(counted: Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """Metrics of one confusion matrix over all images; a class neither there nor predicted has no IoU."""
    by_class = {f"IoU/{name}": value for name, value in zip(classes, ious(counted).tolist(), strict=True)}
    accuracy = (counted.diagonal().sum().double() / counted.sum().clamp(min=1)).item()
    found = {name: value for name, value in by_class.items() if value == value}  # not nan
    return {"mIoU": mean_iou(counted), "pixel_accuracy": accuracy, **found}


def mean_iou(counted: Tensor) -> float:
    """Mean over the classes that are there or predicted; 0 where there is no labelled pixel."""
    return ious(counted).nanmean().nan_to_num().item()


def ious(counted: Tensor) -> Tensor:
    """(K,) float64, nan for a class that is neither there nor predicted."""
    right = counted.diagonal().double()
    return right / (counted.sum(0) + counted.sum(1) - right)

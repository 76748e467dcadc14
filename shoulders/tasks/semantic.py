"""Semantic segmentation: a linear probe on the tokens (DINOv2, arXiv 2304.07193); finetuning; teacher heads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.errors import RecipeError
from shoulders.features import Features, FeaturesOf, Skipped
from shoulders.images import View
from shoulders.tasks.class_match import ClassMatch, match_classes
from shoulders.tasks.data.mask_files import IGNORE_INDEX, read_mask
from shoulders.tasks.data.masks import MaskFile, find_masks
from shoulders.tasks.data.splits import AnnotatedSplit, AnnotatedSplits
from shoulders.tasks.feature_bank import FeatureBank, read_image, to_float16
from shoulders.tasks.heads.transformers import UperNet
from shoulders.tasks.probe import LARGER_PROBE_SETTINGS, ProbeSettings, SpatialProbe, fit_probe
from shoulders.tasks.task import HeadWithInput, Metric, ProbeHead, Row, Size, Task
from shoulders.tasks.teacher_head_eval import check_sizes, head_outputs, head_rows

MAX_LOGITS = 2**26  # that are upsampled together
UPSAMPLING = 4  # logits are compared with the masks at this many times the grid


def linear_head(width: int, n_classes: int) -> nn.Module:
    """Batch norm and one linear map: (B, C, H, W) -> logits (B, K, H, W)."""
    logits = nn.Conv2d(width, n_classes, 1)
    nn.init.normal_(logits.weight, std=0.01)
    nn.init.zeros_(logits.get_parameter("bias"))
    return nn.Sequential(nn.BatchNorm2d(width), logits)


def small_masks(bank: FeatureBank[MaskFile], n_classes: int) -> Tensor:
    """(n, 4 H, 4 W) uint8, the nearest pixel of each mask."""
    size = (UPSAMPLING * bank.grid[0], UPSAMPLING * bank.grid[1])
    masks = (torch.from_numpy(read_mask(file.path, n_classes)) for file in bank.annotations)
    return torch.cat([F.interpolate(mask[None, None], size, mode="nearest-exact")[0] for mask in masks])


def upsample(logits: Tensor, size: Size) -> Tensor:
    """(B, K, H, W) -> (B, K, h, w), bilinear."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def segmentation_loss(head: nn.Module, maps: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of a head's logits, upsampled to masks (h, w): the mean over the labelled pixels."""
    labels = torch.stack(list(targets)).long().to(maps.device)  # (B, h, w)
    logits = upsample(head(maps), (labels.shape[1], labels.shape[2]))  # (B, K, h, w)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def class_map(logits: Tensor, size: Size, max_logits: int = MAX_LOGITS) -> Tensor:
    """(K, H, W) -> (h, w) int64 on the CPU: the class of the highest logit, upsampled a few classes at a time."""
    chunk = max(1, max_logits // (size[0] * size[1]))
    best, classes = upsample(logits[None, :chunk], size)[0].max(0)  # (h, w)
    for first in range(chunk, len(logits), chunk):
        values, indices = upsample(logits[None, first : first + chunk], size)[0].max(0)
        higher = values > best
        best, classes = torch.where(higher, values, best), torch.where(higher, indices + first, classes)
    return classes.cpu()


@torch.no_grad()
def confusion_matrix(head: nn.Module, bank: FeatureBank[MaskFile], n_classes: int) -> Tensor:
    """(K, K) int64: pixels of each true class (first index) by predicted class, at the size of the masks."""
    counts = torch.zeros(n_classes * n_classes, dtype=torch.int64)
    for indices, maps in bank.batches():
        for index, logits in zip(indices, head(maps), strict=True):
            file = bank.annotations[index]
            counts += _pair_counts(_read_labels(file, n_classes), class_map(logits, file.size), n_classes)
    return counts.view(n_classes, n_classes)


def _read_labels(file: MaskFile, n_classes: int) -> Tensor:
    """(h, w) int64, the index of each pixel or `IGNORE_INDEX`."""
    return torch.from_numpy(read_mask(file.path, n_classes)).long()


def _pair_counts(labels: Tensor, predicted: Tensor, n_classes: int) -> Tensor:
    """(K * K,) pixels of each pair of true and predicted class; both maps are (h, w)."""
    labelled = labels != IGNORE_INDEX
    pairs = labels[labelled] * n_classes + predicted[labelled]
    return pairs.bincount(minlength=n_classes * n_classes)


def segmentation_scores(confusion: Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """Metrics of one confusion matrix over all images; a class neither labelled nor predicted has no IoU.

    Rows and columns beyond those of ``classes`` are of pixels that are of none of them: there a prediction of one of
    the classes is wrong, but they have no IoU of their own. There are no metrics where no pixel is labelled.
    """
    labelled = confusion[: len(classes)]
    if not labelled.any():
        return {}
    values = class_ious(confusion)[: len(classes)]
    by_class = {f"IoU/{name}": value for name, value in zip(classes, values.tolist(), strict=True)}
    accuracy = (labelled.diagonal().sum().double() / labelled.sum().clamp(min=1)).item()
    ious = {name: value for name, value in by_class.items() if value == value}  # not nan
    return {"mIoU": values.nanmean().nan_to_num().item(), "pixel_accuracy": accuracy, **ious}


def class_ious(confusion: Tensor) -> Tensor:
    """(K,) float64, nan for a class that is neither labelled nor predicted."""
    correct = confusion.diagonal().double()
    return correct / (confusion.sum(0) + confusion.sum(1) - correct)


def evaluate_segmentation(head: nn.Module, bank: FeatureBank[MaskFile], classes: tuple[str, ...]) -> dict[str, float]:
    """mIoU, pixel accuracy and the IoU of each class at the size of the masks."""
    return segmentation_scores(confusion_matrix(head, bank, len(classes)), classes)


def predict_masks(
    head: nn.Module, classes: Sequence[str], features: Features, sizes: Sequence[Size], threshold: float
) -> list[Any]:
    """``[{label, score, mask}]`` for each image: a mask per predicted class; the threshold does not apply."""
    predictions = []
    for logits, size in zip(head(to_float16(features.to_map().float()).float()), sizes, strict=True):
        predicted = class_map(logits, size)  # (h, w)
        indices = predicted.unique().tolist()
        predictions.append([{"label": classes[i], "score": None, "mask": predicted == i} for i in indices])
    return predictions


@dataclass(frozen=True)
class SemanticTask:
    """Finetuning: the loss of the probe."""

    splits: AnnotatedSplits[MaskFile]
    task: str = "semantic"
    metric: str = "mIoU"
    whole_images: bool = True

    def build_head(self, width: int) -> nn.Module:
        """A fresh head of the default probe."""
        return linear_head(width, len(self.splits.classes))

    def read_image(
        self, split: AnnotatedSplit[MaskFile], position: int, min_side: int
    ) -> tuple[Tensor, Size] | Skipped:
        """A decoded image and the size of its mask."""
        image = read_image(split, position, min_side)
        return image if isinstance(image, Skipped) else (image, split.annotations[position].size)

    def target(self, split: AnnotatedSplit[MaskFile], position: int, view: View, grid: tuple[int, int]) -> Tensor:
        """The mask of a view, (4 H, 4 W) uint8, nearest pixels."""
        mask = torch.from_numpy(read_mask(split.annotations[position].path, len(self.splits.classes)))  # (h, w)
        (h, w), (rows, columns) = mask.shape, (UPSAMPLING * grid[0], UPSAMPLING * grid[1])
        y = (((torch.arange(rows) + 0.5) / rows * view.height + view.top) * h).long().clamp(max=h - 1)
        x = (((torch.arange(columns) + 0.5) / columns * view.width + view.left) * w).long().clamp(max=w - 1)
        return mask[y][:, x.flip(0) if view.flip else x]

    def loss(self, head: nn.Module, features: Features, targets: Sequence[Tensor]) -> Tensor:
        """Mean cross-entropy over the labelled pixels."""
        return segmentation_loss(head, features.to_map(), targets)

    def evaluate(
        self,
        head: nn.Module,
        features_of: FeaturesOf,
        split: AnnotatedSplit[MaskFile],
        size: Size,
        batch: int,
        workers: int,
    ) -> tuple[dict[str, float], int]:
        """The metrics of the probe."""
        bank = FeatureBank(features_of, split, [size], batch, workers)
        return evaluate_segmentation(head, bank, self.splits.classes), len(bank)


def evaluate_semantic_head(
    head: HeadWithInput, splits: AnnotatedSplits[MaskFile], batch: int, workers: int
) -> list[Row]:
    """The metrics of the probe for a teacher's head on the test images, on the classes that both have.

    All other classes, of the head and of the data, are background where both have one, else none of the classes.
    """
    started_at = time.perf_counter()
    match, n_classes = match_classes(head.classes, splits.classes, head.class_map), len(splits.classes)
    if match.common == [match.background]:
        raise RecipeError("head and data have only the background in common; give --classes")
    of_head, of_data = _common_indices(match)
    counts = torch.zeros((n_classes + 1) ** 2, dtype=torch.int64)
    skipped: list[Skipped] = []
    test, n, left_out = splits.test, 0, 0
    for positions, frames, output in head_outputs(head, test.images, test.indices, batch, workers, skipped):
        check_sizes(test, positions, frames)
        n += len(positions)
        sizes = [frame.input_size for frame in frames]
        maps = head.processor.post_process_semantic_segmentation(output, target_sizes=sizes)
        for position, frame, predicted in zip(positions, frames, maps, strict=True):
            labels = _read_labels(test.annotations[position], n_classes)
            left_out += int(torch.isin(labels, torch.tensor([*match.common, IGNORE_INDEX]), invert=True).sum())
            in_image = frame.maps_in_image(predicted.cpu().long(), fill=-1)  # the last index: no prediction
            counts += _pair_counts(of_data[labels], of_head[in_image], n_classes + 1)
    values = segmentation_scores(counts.view(n_classes + 1, n_classes + 1), splits.classes)
    settings = {"split": splits.how, **match.settings(left_out, "pixels")}
    return head_rows("semantic", values, n, started_at, skipped, head, settings)


def _common_indices(match: ClassMatch) -> tuple[Tensor, Tensor]:
    """The index in the confusion matrix of each class of the head, and of each index in a mask.

    The last index of the matrix is for pixels that are of no common class, or that have no prediction.
    """
    count = len(match.data_classes)
    other = count if match.background is None else match.background
    of_data = torch.full((IGNORE_INDEX + 1,), IGNORE_INDEX)
    of_data[:count] = other
    of_data[match.common] = torch.tensor(match.common)
    return torch.tensor([*(other if index < 0 else index for index in match.indices), count]), of_data


def mask_labels(split: AnnotatedSplit[MaskFile], position: int, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A mask for each class of an image in the form of predictions."""
    mask = torch.from_numpy(read_mask(split.annotations[position].path, len(classes)))
    indices = [index for index in mask.unique().tolist() if index != IGNORE_INDEX]
    return [{"label": classes[index], "score": None, "mask": mask == index} for index in indices]


PROBE = SpatialProbe(
    task="semantic",
    name="linear",
    metric="mIoU",
    build=linear_head,
    targets=small_masks,
    loss=segmentation_loss,
    evaluate=evaluate_segmentation,
    settings=ProbeSettings(lrs=(3e-3, 1e-2, 3e-2), weight_decay=1e-3, schedule="cosine", min_steps=400),
)
UPERNET = replace(PROBE, name="upernet", build=UperNet, settings=LARGER_PROBE_SETTINGS)

TASK = Task(
    name="semantic",
    title="Semantic segmentation",
    metrics=(Metric("mIoU", "mIoU", "mIoU", "mIoU", ("mIoU",)),),
    find_splits=find_masks,
    needs_spatial=True,
    fit_probe=partial(fit_probe, PROBE),
    probe_head=ProbeHead("linear", linear_head, lambda head: head[0].num_features, predict_masks),
    finetune=SemanticTask,
    evaluate_head=evaluate_semantic_head,
    head_classes=("ForSemanticSegmentation",),
    labels_as_predictions=mask_labels,
    larger_probes={"upernet": partial(fit_probe, UPERNET)},
    folders=("semantic",),
    image_paths=("images/{split}",),
)

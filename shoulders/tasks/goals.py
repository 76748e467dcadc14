"""What each task asks of an encoder that learns together with its head: targets of views, a loss, and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Batch, Features, Skipped
from shoulders.images import Undecodable, View, evaluation_batches
from shoulders.tasks import classification, objects, semantic
from shoulders.tasks.data.coco import AnnotatedImage
from shoulders.tasks.data.dense import IGNORED, DenseSplit, DenseSplits, MaskFile, read_mask
from shoulders.tasks.data.labelled import Split, Splits
from shoulders.tasks.feature_bank import MAX_PIXELS, FeatureBank, read
from shoulders.tasks.heads.objects import ObjectHead, Target, losses

FeaturesOf = Callable[[Batch], Features]


class FinetuneTask(Protocol):
    """A task with its images, for training from pixels to labels."""

    @property
    def task(self) -> str:
        """Its name."""
        ...

    @property
    def metric(self) -> str:
        """Of those that `measure` answers with, the one to choose by."""
        ...

    @property
    def whole(self) -> bool:
        """Whether images are drawn whole at the input size, whatever their aspect; else the middle of them."""
        ...

    @property
    def splits(self) -> Any:
        """The images."""
        ...

    def head(self, width: int) -> nn.Module:
        """A fresh head for features of width C."""
        ...

    def read(self, split: Any, row: int, at_least: int) -> tuple[Tensor, tuple[int, int]] | Skipped:
        """A decoded image (3, H, W) uint8 and the full size that it was annotated at."""
        ...

    def target(self, split: Any, row: int, view: View, grid: tuple[int, int]) -> Any:
        """What is known of a view of an image; ``grid`` is that of the features."""
        ...

    def loss(self, head: nn.Module, seen: Features, targets: Sequence[Any]) -> Tensor:
        """A number to make small."""
        ...

    def measure(
        self, head: nn.Module, features_of: FeaturesOf, split: Any, size: tuple[int, int], batch: int, workers: int
    ) -> tuple[dict[str, float], int]:
        """Values by metric, as those of a frozen probe, and how many images they are of."""
        ...


@dataclass(frozen=True)
class Classify:
    """Cross entropy of the linear head on the summary, or on the mean over the places."""

    splits: Splits
    task: str = "classification"
    metric: str = "top1"
    whole: bool = False

    def head(self, width: int) -> nn.Module:
        return classification.Linear(width, self.splits.n_classes)

    def read(self, split: Split, row: int, at_least: int) -> tuple[Tensor, tuple[int, int]] | Skipped:
        index = int(split.indices[row])
        try:
            return split.images.pixels(index, MAX_PIXELS, at_least)
        except Undecodable as error:
            return Skipped(split.images.name(index), str(error))

    def target(self, split: Split, row: int, view: View, grid: tuple[int, int]) -> int:
        return int(split.take(np.array([row])).labels()[0])

    def loss(self, head: nn.Module, seen: Features, targets: Sequence[int]) -> Tensor:
        vectors = classification.image_vectors(seen)  # (B, C)
        return F.cross_entropy(head(vectors), torch.tensor(targets, device=vectors.device))

    @torch.no_grad()
    def measure(
        self, head: nn.Module, features_of: FeaturesOf, split: Split, size: tuple[int, int], batch: int, workers: int
    ) -> tuple[dict[str, float], int]:
        batches = evaluation_batches(split.images, [size], batch, split.indices, workers=workers)
        found = classification.extract(features_of, batches)
        device = next(head.parameters()).device
        predicted = head(found.x.to(device)).argmax(1).cpu()
        return {"top1": classification.top1(predicted, found.labels)}, len(found.x)


@dataclass(frozen=True)
class Segment:
    """Cross entropy of the enlarged logits with the masks, as the frozen probe has it."""

    splits: DenseSplits[MaskFile]
    task: str = "semantic"
    metric: str = "mIoU"
    whole: bool = True

    def head(self, width: int) -> nn.Module:
        return semantic.linear_head(width, len(self.splits.classes))

    def read(self, split: DenseSplit[MaskFile], row: int, at_least: int) -> tuple[Tensor, tuple[int, int]] | Skipped:
        return _sized(split, row, at_least)

    def target(self, split: DenseSplit[MaskFile], row: int, view: View, grid: tuple[int, int]) -> Tensor:
        mask = torch.from_numpy(read_mask(split.truths[row].path, len(self.splits.classes)))  # (h, w)
        (h, w), (rows, columns) = mask.shape, (semantic.ENLARGE * grid[0], semantic.ENLARGE * grid[1])
        y = (((torch.arange(rows) + 0.5) / rows * view.height + view.top) * h).long().clamp(max=h - 1)
        x = (((torch.arange(columns) + 0.5) / columns * view.width + view.left) * w).long().clamp(max=w - 1)
        return mask[y][:, x.flip(0) if view.flip else x]  # (4 H, 4 W)

    def loss(self, head: nn.Module, seen: Features, targets: Sequence[Tensor]) -> Tensor:
        truth = torch.stack(list(targets)).long()  # (B, 4 H, 4 W)
        logits = semantic.enlarge(head(seen.to_map()), (truth.shape[1], truth.shape[2]))
        truth = truth.to(logits.device)
        summed = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum")
        return summed / (truth != IGNORED).sum().clamp(min=1)

    def measure(
        self,
        head: nn.Module,
        features_of: FeaturesOf,
        split: DenseSplit[MaskFile],
        size: tuple[int, int],
        batch: int,
        workers: int,
    ) -> tuple[dict[str, float], int]:
        frozen = FeatureBank(features_of, split, size, batch, workers)
        counted = semantic.confusion(head, frozen, len(self.splits.classes))
        return semantic.scores(counted, self.splits.classes), len(frozen)


@dataclass(frozen=True)
class Find:
    """The terms of the dense head for objects, boxes alone or with masks."""

    splits: DenseSplits[AnnotatedImage]
    masks: bool = False
    whole: bool = True

    @property
    def task(self) -> str:
        return "instance" if self.masks else "detection"

    @property
    def metric(self) -> str:
        return "mask_AP" if self.masks else "AP"

    def head(self, width: int) -> nn.Module:
        return ObjectHead(width, len(self.splits.classes), self.masks)

    def read(
        self, split: DenseSplit[AnnotatedImage], row: int, at_least: int
    ) -> tuple[Tensor, tuple[int, int]] | Skipped:
        return _sized(split, row, at_least)

    def target(self, split: DenseSplit[AnnotatedImage], row: int, view: View, grid: tuple[int, int]) -> Target:
        return objects.target_of(split.truths[row], grid, self.masks, view)

    def loss(self, head: nn.Module, seen: Features, targets: Sequence[Target]) -> Tensor:
        maps = seen.to_map()  # (B, C, H, W)
        wanted = [objects.on(target, maps.device) for target in targets]
        return torch.stack(list(losses(head(maps), wanted, (2 * seen.grid[0], 2 * seen.grid[1])).values())).sum()

    def measure(
        self,
        head: nn.Module,
        features_of: FeaturesOf,
        split: DenseSplit[AnnotatedImage],
        size: tuple[int, int],
        batch: int,
        workers: int,
    ) -> tuple[dict[str, float], int]:
        frozen = FeatureBank(features_of, split, size, batch, workers)
        return objects.measure(head, frozen, self.splits.classes, self.masks), len(frozen)  # type: ignore[arg-type]


def _sized(split: DenseSplit[Any], row: int, at_least: int) -> tuple[Tensor, tuple[int, int]] | Skipped:
    drawn = read(split, row, at_least)
    return drawn if isinstance(drawn, Skipped) else (drawn, split.truths[row].size)

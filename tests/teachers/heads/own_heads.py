"""Teachers of one's own with heads for the four tasks: they recognize red and blue boxes by the colours of a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders import Features, TaskHead, Teacher

COLOURS = ("red", "blue")
# (ground, red, blue) from (r, g, b): a box is where red and blue differ by more than .3
WEIGHT = torch.tensor([[0.0, 0.0, 0.0], [20.0, 0.0, -20.0], [-20.0, 0.0, 20.0]])
BIAS = torch.tensor([0.0, -6.0, -6.0])


class Maps(nn.Module):
    """Mean colours of 2 x 2 px, and of all px."""

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        summary = pixels.mean((2, 3))
        return {"map": Features.from_map(F.avg_pool2d(pixels, 2)), "mean": Features(summary, None, (0, 0))}


class Classifier(TaskHead):
    """The colour of the whole image."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__("classification", classes, args={"classes": list(classes)}, taps=["mean"])
        self.linear = nn.Linear(3, len(classes))

    def forward(self, taps: Mapping[str, Features]) -> dict[str, Tensor]:
        return {"logits": self.linear(taps["mean"].components()["summary"])}

    def post_process(self, outputs: dict[str, Tensor], sizes: Any, threshold: float) -> Tensor:
        return outputs["logits"].sigmoid()  # several classes can be right


class Pixels(TaskHead):
    """What heads on the map share."""

    def __init__(self, task: str, classes: Sequence[str], args: Mapping[str, Any]) -> None:
        super().__init__(task, classes, args, taps=["map"])
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, taps: Mapping[str, Features]) -> dict[str, Tensor]:
        return {"logits": self.conv(taps["map"].to_map())}  # (B, 3, H, W)

    def class_maps(self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The class of each px."""
        return [
            F.interpolate(logits[None], size, mode="bilinear")[0].argmax(0)
            for logits, size in zip(outputs["logits"], sizes, strict=True)
        ]


class Segmenter(Pixels):
    """The class of each px."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__("semantic", classes, {"classes": list(classes)})

    def post_process(self, outputs: dict[str, Tensor], sizes: Any, threshold: float) -> list[Tensor]:
        return self.class_maps(outputs, sizes)


class Finder(Pixels):
    """At most one object of each colour, with a box or with a mask; its score is .9."""

    def __init__(self, task: str) -> None:
        super().__init__(task, COLOURS, {"task": task})

    def post_process(self, outputs: dict[str, Tensor], sizes: Any, threshold: float) -> list[dict[str, Tensor]]:
        images = []
        for predicted in self.class_maps(outputs, sizes):
            labels = [label for label in range(2) if (predicted == label + 1).any() and threshold <= 0.9]
            masks = [predicted == label + 1 for label in labels]
            boxes = [
                [float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)]
                for ys, xs in (mask.nonzero(as_tuple=True) for mask in masks)
            ]
            shapes = {
                "boxes": torch.tensor(boxes).view(-1, 4),
                "masks": torch.stack(masks) if masks else torch.zeros(0, *predicted.shape, dtype=torch.bool),
            }
            key = "boxes" if self.task == "detection" else "masks"
            scores, indices = torch.full((len(labels),), 0.9), torch.tensor(labels, dtype=torch.int64)
            images.append({"scores": scores, "labels": indices, key: shapes[key]})
        return images


def own_teacher(head: TaskHead | None) -> Teacher:
    """A teacher of 32 px with a head."""
    return Teacher(Maps(), size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1), license="mit", head=head)


def classifier() -> Teacher:
    """Whether an image is red, green or blue."""
    head = Classifier(["class0", "class1", "class2"])
    head.linear.load_state_dict({"weight": 20 * torch.eye(3), "bias": torch.full((3,), -8.0)})
    return own_teacher(head)


def segmenter() -> Teacher:
    """Ground, red and blue."""
    return own_teacher(with_weights(Segmenter(["ground", *COLOURS])))


def detector() -> Teacher:
    """Boxes."""
    return own_teacher(with_weights(Finder("detection")))


def instances() -> Teacher:
    """Masks of objects."""
    return own_teacher(with_weights(Finder("instance")))


def without_head() -> Teacher:
    """A teacher without a head."""
    return own_teacher(None)


def with_weights(head: Pixels) -> Pixels:
    """A head that recognizes the colours."""
    head.conv.load_state_dict({"weight": WEIGHT[:, :, None, None], "bias": BIAS})
    return head

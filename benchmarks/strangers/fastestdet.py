"""FastestDet, a COCO detector of 0.24 million parameters, as a teacher given as ``module:``.

A ShuffleNetV2 backbone (arXiv 1807.11164), the maps of its three stages on one grid of 22 x 22, a block of parallel
depthwise convolutions, and one head at stride 16. The names of modules are those of the published weights::

    teachers:
      detector:
        module: "benchmarks.strangers.fastestdet:teacher"
        args: {folder: FOLDER}     # with model.safetensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from shoulders import Features, TaskHead, Teacher
from shoulders.tasks.heads.objects import nms

SIZE = (352, 352)
STAGES = {"stage2": (24, 48, 4), "stage3": (48, 96, 8), "stage4": (96, 192, 4)}  # channels in and out, blocks
WIDTH = 96
TAP, HEAD = "spp", "detect_head."  # the map that the head takes; how the names of its weights begin
MAX_IOU = 0.5  # of two boxes of one class
CLASSES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
).split(", ")


def teacher(folder: str) -> Teacher:
    """FastestDet with the weights in ``folder``."""
    encoder, head = Encoder(), Head(CLASSES)
    weights = load_file(Path(folder) / "model.safetensors")
    of_head = {name.removeprefix(HEAD): value for name, value in weights.items() if name.startswith(HEAD)}
    encoder.load_state_dict({name: value for name, value in weights.items() if not name.startswith(HEAD)}, strict=True)
    head.load_state_dict(of_head, strict=True)
    source = "dog-qiuqiu/FastestDet"
    return Teacher(encoder, SIZE, mean=(0, 0, 0), std=(1, 1, 1), license="bsd-3-clause", source=source, head=head)


class Encoder(nn.Module):
    """Backbone and neck: RGB pixels (B, 3, h, w) in [0, 1] to one map at stride 16, which the head takes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ShuffleNet()
        self.SPP = ParallelConvolutions(sum(out for _, out, _ in STAGES.values()), WIDTH)

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        fine, middle, coarse = self.backbone(pixels.flip(1))  # the weights are for BGR
        fine = F.avg_pool2d(fine, 3, stride=2, padding=1)
        coarse = F.interpolate(coarse, scale_factor=2, mode="nearest")
        return {TAP: Features.from_map(self.SPP(torch.cat([fine, middle, coarse], 1)))}  # (B, 96, h / 16, w / 16)


class ShuffleNet(nn.Module):
    """ShuffleNetV2: pixels to the maps of three stages, at strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*convolution(3, 24, 3, stride=2), nn.ReLU())
        for name, (channels, out, blocks) in STAGES.items():
            self.add_module(name, nn.Sequential(DownBlock(channels), *(Block(out // 2) for _ in range(blocks - 1))))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.first_conv(pixels), 3, stride=2, padding=1)
        maps = []
        for name in STAGES:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps


class Block(nn.Module):
    """The even channels pass unchanged, the odd ones through convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch_main = main_branch(channels, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, ::2], self.branch_main(x[:, 1::2])], 1)


class DownBlock(nn.Module):
    """Twice the channels on half the grid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch_main = main_branch(channels, stride=2)
        self.branch_proj = nn.Sequential(
            *convolution(channels, channels, 3, stride=2, groups=channels),
            *convolution(channels, channels, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)


def main_branch(channels: int, stride: int) -> nn.Sequential:
    """1x1, depthwise 3x3 and 1x1 convolutions."""
    return nn.Sequential(
        *convolution(channels, channels, 1),
        nn.ReLU(),
        *convolution(channels, channels, 3, stride=stride, groups=channels),
        *convolution(channels, channels, 1),
        nn.ReLU(),
    )


class ParallelConvolutions(nn.Module):
    """One, two and three depthwise 5x5 convolutions side by side, added to their input."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.Conv1x1 = nn.ModuleDict({"conv1x1": nn.Sequential(*convolution(channels, width, 1), nn.ReLU())})
        self.S1, self.S2, self.S3 = (
            nn.Sequential(*(layer for _ in range(count) for layer in depthwise(width))) for count in (1, 2, 3)
        )
        self.output = nn.Sequential(*convolution(3 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv1x1["conv1x1"](x)
        return F.relu(x + self.output(torch.cat([self.S1(x), self.S2(x), self.S3(x)], 1)))


class Head(TaskHead):
    """Objectness, box and class of each token of the map."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__("detection", classes, args={"classes": list(classes)}, taps=[TAP])
        self.conv1x1 = nn.ModuleDict({"conv1x1": nn.Sequential(*convolution(WIDTH, WIDTH, 1), nn.ReLU())})
        self.obj_layers, self.reg_layers, self.cls_layers = (
            nn.ModuleDict({"conv5x5": nn.Sequential(*depthwise(WIDTH), *convolution(WIDTH, out, 1))})
            for out in (1, 4, len(classes))
        )

    def forward(self, taps: Mapping[str, Features]) -> dict[str, Tensor]:
        x = self.conv1x1["conv1x1"](taps[TAP].to_map())  # (B, 96, H, W)
        objectness, boxes, classes = (
            layers["conv5x5"](x) for layers in (self.obj_layers, self.reg_layers, self.cls_layers)
        )
        scores, labels = classes.softmax(1).max(1)  # (B, H, W): the best class of each token
        return {"boxes": to_corners(boxes), "scores": objectness[:, 0].sigmoid() ** 0.6 * scores**0.4, "labels": labels}

    def post_process(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[dict[str, Tensor]]:
        images = []
        for boxes, scores, labels, (h, w) in zip(*outputs.values(), sizes, strict=True):
            boxes = boxes.flatten(1).T * torch.tensor([w, h, w, h], device=boxes.device)  # (H W, 4) in px
            chosen = scores.flatten() >= threshold
            boxes, scores, labels = boxes[chosen], scores.flatten()[chosen], labels.flatten()[chosen]
            best = nms(boxes, scores, labels, MAX_IOU)
            images.append({"boxes": boxes[best], "scores": scores[best], "labels": labels[best]})
        return images


def to_corners(boxes: Tensor) -> Tensor:
    """Boxes (B, 4, H, W) as left, top, right, bottom in fractions of the image.

    The tanh of the first two values is the distance of the centre from the corner of its token, in tokens; the sigmoid
    of the last two is width and height. Boxes are not clipped to the image, as for the published accuracy: AP .189 on
    COCO128 val, and .205 with clipped boxes.
    """
    h, w = boxes.shape[2:]
    y, x = torch.meshgrid(torch.arange(h, device=boxes.device), torch.arange(w, device=boxes.device), indexing="ij")
    centre = (boxes[:, :2].tanh() + torch.stack([x, y])) / torch.tensor([w, h], device=boxes.device).view(2, 1, 1)
    half = boxes[:, 2:].sigmoid() / 2
    return torch.cat([centre - half, centre + half], 1)


def convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    """A convolution without a bias, and its normalization."""
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)


def depthwise(channels: int) -> tuple[nn.Module, ...]:
    """A depthwise 5x5 convolution."""
    return *convolution(channels, channels, 5, groups=channels), nn.ReLU()

"""FastestDet, a COCO detector of 0.24 million parameters, as a teacher given as ``module:``.

A ShuffleNetV2 backbone (arXiv 1807.11164), the maps of its three stages on one grid of 22 x 22, a block of parallel
depthwise convolutions, and one head at stride 16. The names of modules are those of the published weights::

    teachers:
      detector:
        module: "benchmarks.strangers.fastestdet:teacher"
        args: {folder: FOLDER}     # with model.safetensors
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from shoulders import Features, Teacher

SIZE = (352, 352)
STAGES = {"stage2": (24, 48, 4), "stage3": (48, 96, 8), "stage4": (96, 192, 4)}  # channels in and out, blocks
WIDTH = 96
TAP = "spp"


def teacher(folder: str) -> Teacher:
    """FastestDet with the weights in ``folder``."""
    encoder = Encoder()
    encoder.load_state_dict(read_weights(folder, ("backbone.", "SPP.")), strict=True)
    return Teacher(encoder, SIZE, mean=(0, 0, 0), std=(1, 1, 1), license="bsd-3-clause", source="dog-qiuqiu/FastestDet")


def read_weights(folder: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors`` whose names have one of these beginnings."""
    weights = load_file(Path(folder) / "model.safetensors")
    return {name: value for name, value in weights.items() if name.startswith(prefixes)}


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


def convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    """A convolution without a bias, and its normalization."""
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)


def depthwise(channels: int) -> tuple[nn.Module, ...]:
    """A depthwise 5x5 convolution."""
    return *convolution(channels, channels, 5, groups=channels), nn.ReLU()

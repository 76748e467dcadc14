"""An adapter of convolutions beside the base: it takes the pixels and, at several layers, the features of the base.

A frozen ViT with large patches loses where in a patch something is, and small adapters inside it learn shapes slowly.
Convolutions on the pixels keep both. This is the spatial prior of ViT-Adapter (arXiv 2205.08534) without attention and
without a path back into the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Features
from shoulders.student.adapters import Adapter

NORM_GROUPS = 8  # groups of channels in every GroupNorm


class Residual(nn.Module):
    """A residual block: x + two 3 x 3 convolutions, each after GroupNorm and GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            *_norm_gelu(width), _conv3x3(width, width), *_norm_gelu(width), _conv3x3(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, H, W') -> the same shape."""
        return x + self.layers(x)


class ConvStage(nn.Module):
    """One layer of the base joins the map, convolutions mix neighbours, and the result is added to the base's features.

    Args:
        base_width: channels D of the base.
        width: channels W of the map.
        depth: :class:`Residual` blocks.
    """

    def __init__(self, base_width: int, width: int, depth: int):
        super().__init__()
        self.down = nn.Linear(base_width, width)
        self.mix = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.up = nn.ModuleDict({component: nn.Linear(width, base_width) for component in ("summary", "spatial")})
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, base_features: Features) -> tuple[Tensor, Features]:
        """Map (B, W, H, W') and the base's features (width D) of one layer -> the next map, the student's features."""
        base = base_features.components()
        # a few channels of a ViT are a hundred times larger than the rest
        tokens = self.down(F.layer_norm(base["spatial"], base["spatial"].shape[-1:]))  # (B, N, W)
        x = self.mix(x + tokens.transpose(1, 2).unflatten(2, base_features.grid))
        update = self.norm(x.flatten(2).transpose(1, 2))  # (B, N, W)
        summary = base["summary"] + self.up["summary"](update.mean(1))  # (B, D)
        spatial = base["spatial"] + self.up["spatial"](update)  # (B, N, D)
        return x, Features(summary, spatial, base_features.grid)


class Convolutions(Adapter):
    """Pixels -> a stem of stride 8 -> the grid of the base -> one :class:`ConvStage` for each input layer.

    The student has features of its own at every input layer.

    Args:
        input_layers: of the base, in their order; the last is ``latent``.
        base_width: channels D of the base.
        width: channels of the maps, a multiple of 32.
        depth: :class:`Residual` blocks of each stage.
    """

    def __init__(self, input_layers: Sequence[str], base_width: int, width: int, depth: int):
        super().__init__()
        self.input_layers = tuple(input_layers)
        quarter, half = width // 4, width // 2
        self.stem = nn.Sequential(
            _conv3x3(3, quarter, 2),
            *_norm_gelu(quarter),
            _conv3x3(quarter, half, 2),
            Residual(half),
            *_norm_gelu(half),
            _conv3x3(half, width, 2),
        )
        self.rungs = nn.ModuleDict({layer: ConvStage(base_width, width, depth) for layer in input_layers})

    def adapt(self, base_features: Mapping[str, Features], pixels: Tensor) -> dict[str, Features]:
        """Features of the student, from the base's features (at the input layers at least) and normalised pixels."""
        if not self.enabled:
            return dict(base_features)
        x = self.stem(pixels.contiguous(memory_format=torch.channels_last))  # (B, W, h / 8, w / 8)
        grid = base_features["latent"].grid
        if x.shape[2:] != grid:
            # in fp32: CPUs have no bf16 kernel for antialiased resizing
            x = F.interpolate(x.float(), grid, mode="bilinear", antialias=True).to(x.dtype)
        student_features = dict(base_features)
        for layer, stage in self.rungs.items():
            x, student_features[layer] = stage(x, base_features[layer])
        return student_features


def _conv3x3(width_in: int, width: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(width_in, width, 3, stride, padding=1)


def _norm_gelu(width: int) -> tuple[nn.Module, ...]:
    return nn.GroupNorm(NORM_GROUPS, width), nn.GELU()

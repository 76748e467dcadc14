"""Convolutions beside the base: they look at the pixels themselves, and read what the base says on the way.

A frozen ViT with large patches has forgotten where in a patch something was, and small adapters inside it learn shapes
slowly; convolutions know both by birth. That is the spatial prior of ViT-Adapter (arXiv 2205.08534), here without
attention and without a way back into the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Features
from shoulders.student.adapters import Adapter

GROUPS = 8  # of channels that are normalised together


class Residual(nn.Module):
    """Two 3 x 3 convolutions on top of what was there."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(*_before(width), _three(width, width), *_before(width), _three(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, W, H, W') -> the same."""
        return x + self.layers(x)


class Rung(nn.Module):
    """What the base says at one place joins the map; places mix; what is found is added to what the base says."""

    def __init__(self, d: int, width: int, depth: int):
        super().__init__()
        self.down = nn.Linear(d, width)
        self.mix = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.up = nn.ModuleDict({part: nn.Linear(width, d) for part in ("summary", "spatial")})
        for zero in self.up.parameters():
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, said: Features) -> tuple[Tensor, Features]:
        """Map (B, W, H, W') and the base's word (width D) at this place -> the next map, and the student's word."""
        own = said.parts()
        # a few channels of a ViT are a hundred times as loud as the rest
        narrow = self.down(F.layer_norm(own["spatial"], own["spatial"].shape[-1:]))  # (B, N, W)
        x = self.mix(x + narrow.transpose(1, 2).unflatten(2, said.grid))
        found = self.norm(x.flatten(2).transpose(1, 2))  # (B, N, W)
        summary = own["summary"] + self.up["summary"](found.mean(1))
        return x, Features(summary, own["spatial"] + self.up["spatial"](found), said.grid)


class Convolutions(Adapter):
    """Pixels -> stride 4 -> stride 8 -> the grid of the base, and a :class:`Rung` for each place read.

    Args:
        places: of the base, in their order; the last is ``latent``. The student has its own word at each of them.
        d: width of the base.
        width: of the maps, a multiple of 32.
        depth: :class:`Residual` blocks of a rung.
    """

    def __init__(self, places: Sequence[str], d: int, width: int, depth: int):
        super().__init__()
        self.input_layers = tuple(places)
        quarter, half = width // 4, width // 2
        self.stem = nn.Sequential(
            _three(3, quarter, 2),
            *_before(quarter),
            _three(quarter, half, 2),
            Residual(half),
            *_before(half),
            _three(half, width, 2),
        )
        self.rungs = nn.ModuleDict({place: Rung(d, width, depth) for place in places})

    def refine(self, said: Mapping[str, Features], pixels: Tensor) -> dict[str, Features]:
        """What the base says, at the places read at least, and normalised pixels -> what the student says there."""
        if not self.enabled:
            return dict(said)
        x = self.stem(pixels.contiguous(memory_format=torch.channels_last))  # (B, W, h / 8, w / 8)
        grid = said["latent"].grid
        if x.shape[2:] != grid:
            # in fp32: a CPU has no other for it
            x = F.interpolate(x.float(), grid, mode="bilinear", antialias=True).to(x.dtype)
        found = dict(said)
        for place, rung in self.rungs.items():
            x, found[place] = rung(x, said[place])
        return found


def _three(width_in: int, width: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(width_in, width, 3, stride, padding=1)


def _before(width: int) -> tuple[nn.Module, ...]:
    """What stands before a convolution."""
    return nn.GroupNorm(GROUPS, width), nn.GELU()

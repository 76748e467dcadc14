"""Views of scenes for the base: crops of one tile of the scene, turned, mirrored, recoloured, made noisy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def tiles(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """One square of each scene (B, 3, H, W), a third to nine tenths as wide: centre and half side (B, 3).

    In image coordinates from -1 to 1. Centres are drawn where the contrast is high, at a scale above that of the noise.
    """
    grey = F.avg_pool2d(pixels.float().mean(1, keepdim=True), 4)  # (B, 1, H / 4, W / 4)
    contrast = F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 1)) + F.pad(grey.diff(dim=3).abs(), (0, 1))
    contrast = F.avg_pool2d(contrast, 2).flatten(2)[:, 0]
    cell = torch.multinomial(contrast.square() + 1e-3, 1, generator=generator)
    grid = pixels.shape[2] // 8
    draw = torch.rand(len(pixels), 3, generator=generator)
    centre = 2 * (torch.cat([cell % grid, cell // grid], 1) + draw[:, :2]) / grid - 1
    half = 0.33 + 0.57 * draw[:, 2:]
    return torch.cat([centre.clamp(half - 1, 1 - half), half], 1)


def whole(count: int) -> Tensor:
    """The whole of each scene as a tile (B, 3)."""
    return torch.tensor([0.0, 0.0, 1.0]).expand(count, -1)


def any_colour(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random hue, saturation, contrast and brightness as (B, 3, 3) and (B, 3); some grey, some negative."""
    draw = torch.rand(count, 6, generator=generator)
    saturation = (0.4 + 1.2 * draw[:, 0]) * (draw[:, 1] > 0.35)
    angle = 2 * math.pi * draw[:, 2]  # any hue
    to_luma = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turn = torch.zeros(count, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -saturation * angle.sin(), saturation * angle.sin()
    contrast, brightness = 0.5 + 0.8 * draw[:, 3], (draw[:, 4] - 0.5) * 0.4
    contrast = torch.where(draw[:, 5] < 0.25, -contrast, contrast)  # dark on light, light on dark: the same shape
    matrix = contrast[:, None, None] * (torch.linalg.inv(to_luma) @ turn @ to_luma)
    return matrix, (0.45 * (1 - contrast) + brightness)[:, None].expand(count, 3)


def frames(tile: Tensor, generator: torch.Generator) -> Tensor:
    """The affine map of a view of each tile (B, 2, 3): 40 to 100 % of the tile's area, at any angle, some mirrored."""
    draw = torch.rand(len(tile), 5, generator=generator)
    half = (0.4 + 0.6 * draw[:, 0]).sqrt()
    angle, flip = 2 * math.pi * draw[:, 1], torch.where(draw[:, 2] < 0.5, -1.0, 1.0)
    centre = tile[:, :2] + tile[:, 2:] * (2 * draw[:, 3:5] - 1) * (1 - half[:, None])
    scale = tile[:, 2] * half
    across = torch.stack([scale * flip * angle.cos(), -scale * angle.sin(), centre[:, 0]], 1)
    down = torch.stack([scale * flip * angle.sin(), scale * angle.cos(), centre[:, 1]], 1)
    return torch.stack([across, down], 1)


def render(pixels: Tensor, frame: Tensor, side: int) -> Tensor:
    """The part of uint8 images (B, 3, H, W) in each frame, as floats in [0, 1] (B, 3, side, side)."""
    positions = F.affine_grid(frame, [len(pixels), 3, side, side], align_corners=False)
    return F.grid_sample(
        pixels.float() / 255, positions, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def recolour(unit: Tensor, generator: torch.Generator) -> Tensor:
    """Other colours and noise, so that views of a scene cannot be matched by them."""
    matrix, offset = any_colour(len(unit), generator)
    noise = torch.randn(unit.shape, generator=generator)
    strength = 0.06 * torch.rand(len(unit), 1, 1, 1, generator=generator)
    recoloured = torch.baddbmm(offset[..., None], matrix, unit.flatten(2)).view_as(unit)
    return (recoloured + strength * noise).clamp(0, 1)


def spots(frame: Tensor, grid: int) -> Tensor:
    """The position that each token of a frame shows (B, grid**2, 2), in image coordinates from -1 to 1."""
    return F.affine_grid(frame, [len(frame), 3, grid, grid], align_corners=False).flatten(1, 2)

"""The training pixels of the base: tiles of every source, and random views with the spots they show."""

from __future__ import annotations

from pathlib import Path

import common
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE, PATCH = 64, 8
GRID = SIZE // PATCH
TILES = {"camvid/images/train": 12, "bccd/train": 12, "pennfudan/train": 24, "photos": 12}


def cut_tiles(file: Path, count: int, generator: torch.Generator) -> Tensor:
    """`count` random boxes of one photo, 10 to 100 % of its area, as uint8 (count, 3, 64, 64)."""
    pixels = common.to_pixels(Image.open(file))[None]
    height, width = pixels.shape[2:]
    tiles = []
    for area, stretch, at_y, at_x in torch.rand(count, 4, generator=generator).tolist():
        side, ratio = (0.1 + 0.9 * area) ** 0.5, (4 / 3) ** (stretch - 0.5)
        tall, wide = int(height * min(1, side * ratio)), int(width * min(1, side / ratio))
        top, left = int(at_y * (height - tall + 1)), int(at_x * (width - wide + 1))
        box = pixels[:, :, top : top + tall, left : left + wide]
        tiles.append(F.interpolate(box, size=(SIZE, SIZE), mode="bilinear", antialias=True))
    return torch.cat(tiles)


def load_images(data: Path, seed: int) -> Tensor:
    """All training pixels as uint8 (B, 3, 64, 64): CIFAR-10 enlarged, tiles of everything else."""
    small = common.load_cifar10(data, "train")[0]
    parts = [F.interpolate(part, size=(SIZE, SIZE), mode="bicubic", antialias=True) for part in small.split(5000)]
    generator = torch.Generator().manual_seed(seed)
    for folder, count in TILES.items():
        files = sorted(file for file in (data / folder).iterdir() if file.suffix.lower() in {".jpg", ".jpeg", ".png"})
        parts.extend(cut_tiles(file, count, generator) for file in files)
    return torch.cat(parts)


def colour_matrices(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random saturation, hue, contrast and brightness as (B, 3, 3) and (B, 3); one in five is grey."""
    draw = torch.rand(count, 6, generator=generator)
    saturation = (0.4 + 1.2 * draw[:, 0]) * (draw[:, 1] > 0.2)
    angle = (draw[:, 2] - 0.5) * 1.2  # hue, radians in the chroma plane
    to_luma = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turn = torch.zeros(count, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -saturation * angle.sin(), saturation * angle.sin()
    contrast, brightness = 0.5 + draw[:, 3], (draw[:, 4] - 0.5) * 0.6
    strength = (draw[:, 5] < 0.85).float()[:, None]  # the rest keeps its colours
    matrix = contrast[:, None, None] * (torch.linalg.inv(to_luma) @ turn @ to_luma)
    offset = (0.45 * (1 - contrast) + brightness)[:, None].expand(count, 3)
    return torch.lerp(torch.eye(3).expand(count, 3, 3), matrix, strength[..., None]), offset * strength


def make_views(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, 64, 64) to one random view each (B, 3, 64, 64) and the spots (B, N, 2) that its tokens show.

    Spots are in image coordinates from -1 to 1.
    """
    count = len(pixels)
    draw = torch.rand(count, 5, generator=generator)
    area, ratio = 0.2 + 0.8 * draw[:, 0], (4 / 3) ** (2 * draw[:, 1] - 1)
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # (B, 2)
    flip = torch.where(draw[:, 2] < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = half[:, 0] * flip, half[:, 1]
    theta[:, :, 2] = (2 * draw[:, 3:5] - 1) * (1 - half)
    positions = F.affine_grid(theta, [count, 3, SIZE, SIZE], align_corners=False)
    unit = F.grid_sample(pixels.float() / 255, positions, mode="bilinear", padding_mode="border", align_corners=False)
    matrix, offset = colour_matrices(count, generator)
    unit = (torch.bmm(matrix, unit.flatten(2)) + offset[..., None]).clamp(0, 1).view_as(unit)
    spots = F.affine_grid(theta, [count, 3, GRID, GRID], align_corners=False).flatten(1, 2)
    return common.normalize(unit), spots

"""Pictures of what heads answer and of what features hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from shoulders.features import Features

LEAST = 480  # px of the longer side: small images are enlarged, so that labels can be read
COLOURS = (
    (230, 75, 53),
    (77, 187, 213),
    (0, 160, 135),
    (84, 118, 214),
    (243, 155, 127),
    (132, 145, 180),
    (145, 209, 194),
    (220, 0, 0),
    (126, 97, 72),
    (176, 156, 133),
    (255, 198, 30),
    (160, 90, 200),
)


Colours = Mapping[str, tuple[int, int, int]]


def picture(image: Image.Image, answer: Any, colours: Colours | None = None) -> Image.Image:
    """An image with what a head says of it: boxes, masks with a legend, classes or depth.

    Args:
        image: the original.
        answer: of this image, as `shoulders.teachers.heads.post_process.post_process` gives it.
        colours: of the labels that occur; where they are given nothing is written into the picture, for whoever
            chose them says elsewhere what they mean.
    """
    scale = max(1.0, LEAST / max(image.size))
    large = image.convert("RGB").resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    if isinstance(answer, dict):
        return depth_picture(answer["predicted_depth"], large.size)
    if not answer:
        return large if colours is not None else with_legend(large, [("nothing found", (128, 128, 128))])
    names = list(dict.fromkeys(str(one["label"]) for one in answer))
    written = colours is None
    colours = palette(names) if colours is None else colours
    if "mask" in answer[0]:
        for one in answer:
            if one["label"] == "background":
                continue  # it stays as it is, so that what is not background stands out
            large = overlay(large, one["mask"], colours[str(one["label"])], edge=one["score"] is not None)
        shown = [(name, colours[name]) for name in names if name != "background"]
        return with_legend(large, shown) if written else large
    if "box" in answer[0]:
        for one in reversed(answer):
            draw_box(large, one, colours[str(one["label"])], large.width / image.width, written)
        return large
    if not written:
        return large
    return with_legend(large, [(f"{one['label']}  {one['score']:.2f}", colours[str(one["label"])]) for one in answer])


def enlarged(size: tuple[int, int]) -> tuple[int, int]:
    """The size in px that an image is shown at."""
    scale = max(1.0, LEAST / max(size))
    return round(size[0] * scale), round(size[1] * scale)


def palette(names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """A colour for each name: nearly always the same in every picture, and never one twice while there are others."""
    chosen: dict[str, tuple[int, int, int]] = {}
    for name in sorted(names):
        turns = [COLOURS[(_number(name) + turn) % len(COLOURS)] for turn in range(len(COLOURS))]
        chosen[name] = next((colour for colour in turns if colour not in chosen.values()), turns[0])
    return chosen


def overlay(image: Image.Image, mask: Tensor, colour: tuple[int, int, int], edge: bool) -> Image.Image:
    """The image with a mask (h, w) laid over it half transparent, and its edge drawn."""
    cover = Image.fromarray((mask.cpu().numpy() * 255).astype("uint8")).resize(image.size, Image.Resampling.BILINEAR)
    tinted = Image.blend(image, Image.new("RGB", image.size, colour), 0.5)
    painted = Image.composite(tinted, image, cover)
    if edge:
        inside = torch.from_numpy(np.array(cover)) > 127
        border = inside & ~(inside.roll(2, 0) & inside.roll(-2, 0) & inside.roll(2, 1) & inside.roll(-2, 1))
        line = Image.fromarray((border.numpy() * 255).astype("uint8"))
        painted.paste(Image.new("RGB", image.size, colour), mask=line)
    return painted


def draw_box(
    image: Image.Image, one: dict[str, Any], colour: tuple[int, int, int], scale: float, written: bool
) -> None:
    """A box, in place; with its label and score where they are to be written."""
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    left, top, right, bottom = (value * scale for value in one["box"].values())
    pen.rectangle((left, top, right, bottom), outline=colour, width=2 if written else 4)
    if not written:
        return
    text = f"{one['label']} {one['score']:.2f}"
    width, height = pen.textbbox((0, 0), text, font=font)[2:]
    x, y = min(max(left, 0), max(image.width - width - 6, 0)), max(top - height - 4, 0)
    pen.rectangle((x, y, x + width + 6, y + height + 4), fill=colour)
    pen.text((x + 3, y + 1), text, fill=_ink(colour), font=font)


def with_legend(image: Image.Image, rows: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """The image with a strip of names and their colours below, as many to a line as fit."""
    font, pen = ImageFont.load_default(size=15), ImageDraw.Draw(image)
    lines: list[list[tuple[str, tuple[int, int, int], int]]] = [[]]
    x = 8
    for name, colour in rows:
        wide = 34 + round(pen.textlength(name, font=font))
        if x + wide > image.width and lines[-1]:
            lines.append([])
            x = 8
        lines[-1].append((name, colour, x))
        x += wide
    sheet = Image.new("RGB", (image.width, image.height + 24 * len(lines) + 8), (255, 255, 255))
    sheet.paste(image, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        y = image.height + 6 + 24 * number
        for name, colour, x in line:
            pen.rectangle((x, y + 2, x + 14, y + 16), fill=colour)
            pen.text((x + 20, y), name, fill=(30, 30, 30), font=font)
    return sheet


def depth_picture(depth: Tensor, size: tuple[int, int]) -> Image.Image:
    """Depth (h, w) as grey, the largest value white."""
    low, high = depth.min(), depth.max()
    grey = ((depth - low) / (high - low).clamp_min(1e-6) * 255).byte().cpu().numpy()
    return Image.fromarray(grey).convert("RGB").resize(size, Image.Resampling.BICUBIC)


def pca_pictures(features: Features, size: tuple[int, int], like: Features | None = None) -> list[Image.Image]:
    """The first three principal components of spatial features as red, green and blue, one picture per image.

    Args:
        features: of B images; the components are those of all of them together.
        size: (width, height) of the pictures in px.
        like: features of the same width whose components and range of colours are used instead, for pictures that
            can be held against those of `like`.
    """
    spatial = features.parts()["spatial"].float()  # (B, N, C)
    reference = (features if like is None else like).parts()["spatial"].float().flatten(0, 1)
    mean = reference.mean(0)
    reference = reference - mean
    axes = torch.linalg.svd(reference.T @ reference)[0][:, :3]
    axes = axes * axes.sum(0).sign()  # a sign of its own, so that the same features give the same colours
    seen = reference @ axes  # (B * N, 3)
    low, high = seen.quantile(0.02, dim=0), seen.quantile(0.98, dim=0)
    shown = (spatial.flatten(0, 1) - mean) @ axes
    colours = ((shown - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).view(*spatial.shape[:2], 3)
    maps = (colours * 255).byte().unflatten(1, features.grid).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(image).resize(size, Image.Resampling.NEAREST) for image in maps]


def _number(name: str) -> int:
    """A number that belongs to a name, so that a class has one colour everywhere."""
    return sum((place + 1) * ord(letter) for place, letter in enumerate(name))


def _ink(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = colour
    return (0, 0, 0) if 0.3 * red + 0.6 * green + 0.1 * blue > 140 else (255, 255, 255)

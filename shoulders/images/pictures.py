"""Pictures of predictions and of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from shoulders.errors import printable
from shoulders.features import Features

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255
Colours = Mapping[str, Colour]  # by label

MAX_SIDE_PX = 1600  # of the longer side: larger images are reduced, or their pictures would cost more than the model
MIN_SIDE_PX = 480  # of the longer side: smaller images are enlarged, so that labels can be read
BACKGROUND = "background"  # is not painted, so that everything else stands out
GREY = (128, 128, 128)
COLOURS: tuple[Colour, ...] = (
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


def draw_prediction(
    image: Image.Image, prediction: Any, colours: Colours | None = None, size: tuple[int, int] | None = None
) -> Image.Image:
    """An image with a head's prediction drawn on it: boxes, masks with a legend, classes, or depth.

    Args:
        image: the original, or a copy of it at another size.
        prediction: for this image, as `shoulders.teachers.heads.post_process.post_process` returns it.
        colours: of the labels in the prediction. If given, no text is drawn: the caller shows the labels elsewhere.
        size: (width, height) of the original in px; default: that of ``image``.

    Returns:
        A picture whose longer side has `MIN_SIDE_PX` to `MAX_SIDE_PX` px.
    """
    size = size or image.size
    large = display_copy(image)
    if isinstance(prediction, dict):
        return depth_picture(prediction["predicted_depth"], large.size)
    if not prediction:
        return large if colours is not None else add_legend(large, [("nothing found", GREY)])
    with_text = colours is None
    colours = assign_colours([str(item["label"]) for item in prediction]) if colours is None else colours
    if "mask" in prediction[0]:
        return _draw_masks(large, prediction, colours, with_text)
    if "box" in prediction[0]:
        for item in reversed(prediction):
            draw_box(large, item, colours[str(item["label"])], large.width / size[0], with_text)
        return large
    if not with_text:
        return large
    scores = [(f"{item['label']}  {item['score']:.2f}", colours[str(item["label"])]) for item in prediction]
    return add_legend(large, scores)


def _draw_masks(
    image: Image.Image, prediction: Sequence[Mapping[str, Any]], colours: Colours, legend: bool
) -> Image.Image:
    for item in prediction:
        if item["label"] != BACKGROUND:
            # instances have a score, and an edge that separates them; semantic masks have neither
            image = overlay_mask(image, item["mask"], colours[str(item["label"])], edge=item["score"] is not None)
    labels = dict.fromkeys(str(item["label"]) for item in prediction if item["label"] != BACKGROUND)
    return add_legend(image, [(label, colours[label]) for label in labels]) if legend else image


def display_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) in px of the picture of an image of ``size`` px."""
    scale = min(max(1.0, MIN_SIDE_PX / max(size)), MAX_SIDE_PX / max(size))
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def display_copy(image: Image.Image) -> Image.Image:
    """A copy of an image in RGB at the size of its pictures."""
    # large images are first averaged over whole pixels, down to twice the size: a few times faster
    return image.convert("RGB").resize(display_size(image.size), Image.Resampling.BICUBIC, reducing_gap=2.0)


def assign_colours(labels: Sequence[str]) -> dict[str, Colour]:
    """A colour for each label: the same in nearly all pictures, and different from the others while colours last."""
    chosen: dict[str, Colour] = {}
    for label in sorted(set(labels)):
        candidates = [COLOURS[(_label_number(label) + offset) % len(COLOURS)] for offset in range(len(COLOURS))]
        chosen[label] = next((colour for colour in candidates if colour not in chosen.values()), candidates[0])
    return chosen


def overlay_mask(image: Image.Image, mask: Tensor, colour: Colour, edge: bool) -> Image.Image:
    """The image with a half transparent mask (h, w) over it, and the edge of the mask."""
    # a large mask is first reduced to its nearest pixels, so that the cost is that of the picture
    grey = (_reduce(mask, image.size).cpu().numpy() * 255).astype("uint8")
    cover = Image.fromarray(grey).resize(image.size, Image.Resampling.BILINEAR)
    tinted = Image.blend(image, Image.new("RGB", image.size, colour), 0.5)
    painted = Image.composite(tinted, image, cover)
    if edge:
        inside = torch.from_numpy(np.array(cover)) > 127
        border = inside & ~(inside.roll(2, 0) & inside.roll(-2, 0) & inside.roll(2, 1) & inside.roll(-2, 1))
        line = Image.fromarray((border.numpy() * 255).astype("uint8"))
        painted.paste(Image.new("RGB", image.size, colour), mask=line)
    return painted


def draw_box(image: Image.Image, item: Mapping[str, Any], colour: Colour, scale: float, with_text: bool) -> None:
    """Draw a box into the image, with its label and score where ``with_text``.

    Args:
        item: of a prediction, with a box in px of the original image.
        scale: px of the image for each px of the original.
    """
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    left, top, right, bottom = (value * scale for value in item["box"].values())
    pen.rectangle((left, top, right, bottom), outline=colour, width=2 if with_text else 4)
    if not with_text:
        return
    text = printable(f"{item['label']} {item['score']:.2f}")
    width, height = pen.textbbox((0, 0), text, font=font)[2:]
    x, y = min(max(left, 0), max(image.width - width - 6, 0)), max(top - height - 4, 0)
    pen.rectangle((x, y, x + width + 6, y + height + 4), fill=colour)
    pen.text((x + 3, y + 1), text, fill=_text_colour(colour), font=font)


def add_legend(image: Image.Image, entries: Sequence[tuple[str, Colour]]) -> Image.Image:
    """The image with names and their colours below it, as many in a line as fit."""
    font, pen = ImageFont.load_default(size=15), ImageDraw.Draw(image)
    lines: list[list[tuple[str, Colour, int]]] = [[]]
    x = 8
    for name, colour in ((printable(name), colour) for name, colour in entries):  # Pillow measures one line alone
        width = 34 + round(pen.textlength(name, font=font))
        if x + width > image.width and lines[-1]:
            lines.append([])
            x = 8
        lines[-1].append((name, colour, x))
        x += width
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
    """Depth (h, w) in grey, with the largest value white, at ``size`` = (width, height) px."""
    depth = _reduce(depth, size)
    low, high = depth.min(), depth.max()
    grey = ((depth - low) / (high - low).clamp_min(1e-6) * 255).byte().cpu().numpy()
    return Image.fromarray(grey).convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _reduce(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Values (H, W) at their nearest pixels, with no more rows and columns than ``size`` = (width, height)."""
    for axis, limit in enumerate(reversed(size)):
        length = values.shape[axis]
        if length > limit:
            centres = (torch.arange(limit, device=values.device) * 2 + 1) * length // (2 * limit)
            values = values.index_select(axis, centres)
    return values


def pca_pictures(features: Features, size: tuple[int, int], like: Features | None = None) -> list[Image.Image]:
    """The first three principal components of spatial features as red, green and blue, one picture for each image.

    Args:
        features: of B images; the components are those of all images together.
        size: (width, height) of the pictures in px.
        like: features of the same width. Their components and range of colours are used, so that the pictures can be
            compared with those of ``like``.
    """
    spatial = features.components()["spatial"].float()  # (B, N, C)
    reference = (features if like is None else like).components()["spatial"].float().flatten(0, 1)  # (B * N, C)
    mean = reference.mean(0)
    reference = reference - mean
    axes = torch.linalg.svd(reference.T @ reference)[0][:, :3]
    axes = axes * axes.sum(0).sign()  # a fixed sign, so that the same features have the same colours
    projected = reference @ axes  # (B * N, 3)
    low, high = projected.quantile(0.02, dim=0), projected.quantile(0.98, dim=0)
    components = (spatial.flatten(0, 1) - mean) @ axes  # (B * N, 3)
    colours = ((components - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).view(*spatial.shape[:2], 3)
    maps = (colours * 255).byte().unflatten(1, features.grid).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(image).resize(size, Image.Resampling.NEAREST) for image in maps]


def _label_number(label: str) -> int:
    """A number for a label, so that a class has the same colour everywhere."""
    return sum((position + 1) * ord(letter) for position, letter in enumerate(label))


def _text_colour(background: Colour) -> Colour:
    """Black or white, whichever can be read on this background."""
    red, green, blue = background
    return (0, 0, 0) if 0.3 * red + 0.6 * green + 0.1 * blue > 140 else (255, 255, 255)

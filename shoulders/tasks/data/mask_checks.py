"""Signs that the numbers of masks are not the indices of classes."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from shoulders.tasks.data.class_counts import warn_absent
from shoulders.tasks.data.mask_files import IGNORE_INDEX, Mask, open_mask
from shoulders.tasks.data.splits import MAX_NAMES, first_names

MAX_EDGE_MASKS = 32  # masks whose edges are looked at
MIN_SEAM_PIXELS = 20  # of a class in them
MIN_SEAM_MASKS = 3  # in so many of them, and in a tenth
MIN_BETWEEN = 0.5  # fraction of a class between a lower and a higher index; .08 at most in CamVid and VOC
MAX_INSIDE = 0.02  # fraction of a class that has only its own index around it; .31 at least in CamVid and VOC
MAX_SHOWN = 5  # indices in a message


class MaskContents:
    """What the masks of a split hold.

    Attributes:
        masks: the number of masks with an index, by index, `IGNORE_INDEX` left out.
        colours: of each index, in all palettes.
        digests: of the indices of each mask.
    """

    def __init__(self) -> None:
        self.masks: Counter[int] = Counter()
        self.colours: defaultdict[int, set[bytes]] = defaultdict(set)
        self.digests: list[bytes] = []

    def add(self, mask: Mask) -> None:
        """Count a mask."""
        present = [index for index in np.unique(mask.indices).tolist() if index != IGNORE_INDEX]
        self.masks.update(present)
        self.digests.append(hashlib.sha256(mask.indices.tobytes()).digest())
        if mask.palette is not None:
            for index in present:
                self.colours[index].add(mask.palette[index : index + 1].tobytes())  # none beyond the palette


def check_contents(path: Path, classes: tuple[str, ...], contents: Mapping[str, MaskContents], has_names: bool) -> None:
    """Name indices that are ignored, classes that train lacks, and palettes that differ."""
    masks = sum((content.masks for content in contents.values()), Counter[int]())
    if unnamed := sorted(index for index in masks if not 0 <= index < len(classes)):
        shown = ", ".join(f"{index} (in {masks[index]})" for index in unnamed[:MAX_SHOWN])
        dots = ", .." if len(unnamed) > MAX_SHOWN else ""
        source = "classes.json names" if has_names else "classes are"
        question = "is its first name that of index 0?" if has_names else f"the highest index is {IGNORE_INDEX - 1}"
        warnings.warn(
            f"{path}: masks hold {shown}{dots}, {source} 0 to {len(classes) - 1}: such pixels are ignored; {question}",
            stacklevel=3,
        )
    used = ", ".join(map(str, sorted(masks)[:MAX_SHOWN])) + (", .." if len(masks) > MAX_SHOWN else "")
    hint = "" if has_names else f"; the masks hold {used}: are these indices, or greys?"
    if "train" in contents:
        warn_absent(path, classes, {name: content.masks for name, content in contents.items()}, "a pixel", hint)
    _warn_palettes(path, contents)


def _warn_palettes(path: Path, contents: Mapping[str, MaskContents]) -> None:
    colours: defaultdict[int, set[bytes]] = defaultdict(set)
    for content in contents.values():
        for index, of_index in content.colours.items():
            colours[index] |= of_index
    if several := sorted(index for index in colours if len(colours[index]) > 1):
        warnings.warn(
            f"{path}: the palettes differ in {len(several)} of {len(colours)} indices ({first_names(several)}); "
            "where the colours mean the classes, save masks of indices",
            stacklevel=4,
        )


def warn_interpolated(path: Path, name: str, files: Sequence[Path]) -> None:
    """Name classes that lie only in lines between a lower and a higher index, as interpolation makes them.

    Args:
        path: of the data set.
        name: of a split.
        files: its masks, of which `MAX_EDGE_MASKS` are looked at.
    """
    edges = [_edges(file) for file in files[:: -(-len(files) // MAX_EDGE_MASKS)]]
    pixels, between, inside = np.sum(edges, 0)  # (256,) each
    masks = np.sum([counts[0] > 0 for counts in edges], 0)  # (256,)
    is_seam = (pixels >= MIN_SEAM_PIXELS) & (masks >= max(MIN_SEAM_MASKS, len(edges) / 10))
    is_seam &= (between >= MIN_BETWEEN * pixels) & (inside <= MAX_INSIDE * pixels)
    seams = np.flatnonzero(is_seam[:IGNORE_INDEX]).tolist()
    if seams:
        shown = ", ".join(f"{index} (in {masks[index]})" for index in seams[:MAX_NAMES])
        warnings.warn(
            f"{path}: {len(seams)} indices are only in thin lines between others, in {len(edges)} masks of {name} "
            f"({shown}{', ..' if len(seams) > MAX_NAMES else ''}), as after resizing with interpolation: resize masks "
            "with the nearest pixel",
            stacklevel=3,
        )


def _edges(file: Path) -> NDArray[np.int64]:
    """(3, 256) pixels of each index: all, between a lower and a higher one, and with only their own around them."""
    indices = open_mask(file).indices.clip(0, IGNORE_INDEX).astype(np.uint8)  # (H, W)
    image = Image.fromarray(indices)
    lowest, highest = (np.asarray(image.filter(kind(3))) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    chosen = (indices, indices[(lowest < indices) & (indices < highest)], indices[lowest == highest])
    return np.stack([np.bincount(part.ravel(), minlength=IGNORE_INDEX + 1) for part in chosen])

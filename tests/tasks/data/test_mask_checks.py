"""Files that change indices are refused; indices that are likely to be something else are counted in a warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shoulders.errors import DataError
from shoulders.tasks.data.mask_files import read_mask
from shoulders.tasks.data.masks import find_masks
from tests.tasks.scenes import save_masks

SIDE = 64
Y, X = np.mgrid[:SIDE, :SIDE]
DISC = (X - 30) ** 2 + (Y - 33) ** 2 < 300  # (64, 64)
SPLITS = ("train", "val")


def save(root: Path, save_mask: Callable[[Path, str, int], object], count: int = 4, names: str = "") -> Path:
    """Images of noise; ``save_mask`` writes the mask of one."""
    for split in SPLITS:
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            noise = np.random.default_rng((index, len(split))).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f"images/{split}/{index}.png")
            save_mask(root / f"annotations/{split}/{index}.png", split, index)
    if names:
        (root / "classes.json").write_text(json.dumps(names.split()))
    return root


def mask_of(inside: Any, outside: Any = 0, kind: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.where(DISC, inside, outside).astype(kind))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "JPEG"}, "it is a JPEG file, which need not keep every index; save it as PNG"),
        ({"format": "WEBP"}, "it is a WEBP file"),
        ({"format": "GIF"}, "it is a GIF file"),
        ({"format": "TIFF", "compression": "jpeg"}, "its compression, jpeg, need not keep every index"),
    ],
)
def test_lossy_masks_are_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    root = save(tmp_path, lambda file, split, index: mask_of(7).save(file, **settings))
    with pytest.raises(DataError, match=rf"train/0\.png: not a mask that can be read: {reason}") as refused:
        find_masks(root)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [{"format": name} for name in ("PNG", "BMP", "PPM", "TIFF")]
    + [{"format": "TIFF", "compression": how} for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits")],
)
def test_lossless_masks_are_read(settings: dict[str, Any], tmp_path: Path) -> None:
    mask_of(7).save(tmp_path / "mask.png", **settings)
    assert np.array_equal(read_mask(tmp_path / "mask.png", 8), np.where(DISC, 7, 0))


def test_animated_masks_are_refused(tmp_path: Path) -> None:
    """Only the first frame would be read."""
    blank = Image.fromarray(np.eye(SIDE, dtype=np.uint8))
    blank.save(tmp_path / "mask.png", save_all=True, append_images=[mask_of(7)])
    with pytest.raises(DataError, match=r"mask\.png: .* it holds 2 images; save the one with the classes"):
        read_mask(tmp_path / "mask.png", 8)


@pytest.mark.filterwarnings("ignore:.*classes without a pixel")
def test_interpolated_masks_are_reported(tmp_path: Path) -> None:
    """Classes 1 to 6 are the edge between 0 and 7; a class in lines of its own is not."""

    def blurred(file: Path, split: str, index: int) -> None:
        mask_of(7).resize((48, 48), Image.Resampling.BILINEAR).resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(
            file
        )

    with pytest.warns(UserWarning, match=r"6 indices are only in thin lines .* in 4 masks of train \(1 \(in 4\), 2 "):
        find_masks(save(tmp_path / "blurred", blurred))

    def poles(file: Path, split: str, index: int) -> None:
        Image.fromarray(np.where(X % 16 == 0, 7, np.where(DISC, 3, 0)).astype(np.uint8)).save(file)

    find_masks(save(tmp_path / "poles", poles))


def test_indices_beyond_254_are_counted(tmp_path: Path) -> None:
    halves = 1 + (X > 32)
    root = save(tmp_path, lambda file, split, index: mask_of(1003, halves, np.uint16).save(file), names="a b c")
    with (
        pytest.warns(UserWarning, match=r"masks hold 1003 \(in 8\), classes\.json names 0 to 2: such pixels"),
        pytest.warns(UserWarning, match="classes without a pixel in train: 1 of 3"),
    ):
        find_masks(root)
    (root / "classes.json").unlink()
    with (
        pytest.warns(UserWarning, match=r"1003 \(in 8\), classes are 0 to 2: .* ignored; the highest index is 254"),
        pytest.warns(UserWarning, match="classes without a pixel in train: 1 of 3"),
    ):
        find_masks(root)


def test_classes_without_a_pixel_in_train_are_reported(tmp_path: Path) -> None:
    thirds = np.where(X > 32, 254, 127)
    root = save(tmp_path / "greys", lambda file, split, index: mask_of(thirds).save(file))
    expected = r"train: 252 of 255 \('1', '2', '3', \.\.\); the masks hold 0, 127, 254: are these indices, or greys\?"
    with pytest.warns(UserWarning, match=expected):
        find_masks(root)
    root = save(tmp_path / "val", lambda file, split, index: mask_of(SPLITS.index(split) + 1).save(file), names="a b c")
    with pytest.warns(UserWarning, match=r"1 of 3 \('c'\); other splits have 'c', which a probe cannot learn$"):
        find_masks(root)


@pytest.mark.parametrize("same", [True, False])
def test_palettes_that_differ_are_reported(same: bool, tmp_path: Path) -> None:
    """A mask that was saved as colours and then reduced to a palette of its own has no indices of classes."""

    def coloured(file: Path, split: str, index: int) -> None:
        mask = mask_of(1).convert("P")
        mask.putpalette([0, 0, 0, 255 * (same or index % 2), 99, 0])
        mask.save(file)

    root = save(tmp_path, coloured)
    if same:
        assert find_masks(root).classes == ("0", "1")
    else:
        with pytest.warns(UserWarning, match=r"the palettes differ in 1 of 2 indices \(1\)"):
            find_masks(root)


def test_an_index_beyond_the_palette_has_no_colour(tmp_path: Path) -> None:
    def short(file: Path, split: str, index: int) -> None:
        mask = mask_of(1).convert("P")
        mask.putpalette([0, 0, 0])
        mask.save(file)

    assert find_masks(save(tmp_path, short)).classes == ("0", "1")


def test_a_mask_belongs_to_one_image(tmp_path: Path) -> None:
    root = save(tmp_path, lambda file, split, index: mask_of(1).save(file))
    Image.new("RGB", (SIDE, SIDE)).save(root / "images/val/0.jpg")
    with pytest.raises(DataError, match=r"val/0\.png: is the mask of two images, 0\.jpg and 0\.png"):
        find_masks(root)
    (root / "images/val/0.jpg").unlink()
    for index in range(20, 26):
        mask_of(1).save(root / f"annotations/val/{index}.png")
    with pytest.warns(UserWarning, match=r"val: 6 of 10 masks belong to no image of .* \('20\.png', '21\.png', "):
        find_masks(root)


def test_the_extension_of_a_mask_may_be_in_capitals(tmp_path: Path) -> None:
    root = save(tmp_path, lambda file, split, index: mask_of(1).save(file))
    file = root / "annotations/val/2.png"
    file.rename(file.with_suffix(".PNG"))
    assert find_masks(root).test.annotations[2].path == file.with_suffix(".PNG")
    mask_of(2).save(file)
    with pytest.raises(DataError, match=r"2\.png: 2\.PNG is the mask of the same image|2\.PNG: 2\.png is the mask of"):
        find_masks(root)


def test_images_that_train_holds_too_are_counted(tmp_path: Path) -> None:
    """Equal masks alone are no evidence: all of these are equal."""
    root = save(tmp_path, lambda file, split, index: mask_of(1).save(file))
    assert len(find_masks(root).test.annotations) == 4
    (root / "images/val/3.png").write_bytes((root / "images/train/1.png").read_bytes())
    with pytest.warns(UserWarning, match=r"1 of 4 images of val are in train too \('3\.png'\)"):
        find_masks(root)


def test_masks_of_scenes_are_read_without_a_word(tmp_path: Path) -> None:
    assert find_masks(save_masks(tmp_path)).classes == ("ground", "red", "blue")

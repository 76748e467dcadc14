"""A student takes floats in [0, 1]: bytes and normalized pixels are refused, and its folder says what it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from shoulders.model import ShouldersBackbone, save_student
from shoulders.student.pixels import check_pixels
from tests.test_model import make_student
from tests.tiny import MEAN, STD


def photo() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (photo() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pale() -> Tensor:
    """A sheet without black: normalized by .5 and .5 it is inside of -.5 to 1, as microscopy often is."""
    return torch.where(torch.arange(32) < 2, 0.3, 0.95).expand(2, 3, 32, 32)


WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "bytes": (lambda: (photo() * 255).to(torch.uint8), "got torch.uint8; divide bytes by 255"),
    "0 to 255": (lambda: photo() * 255, r"got values from .* to 255; divide bytes by 255"),
    "normalized": (lambda: normalized(MEAN, STD), "leave out mean and std"),
    "-1 to 1": (lambda: normalized((0.5,) * 3, (0.5,) * 3), "got values from -1 to 1;"),
    "pale, -1 to 1": (lambda: pale() * 2 - 1, "got values from -0.4 to 0.9;"),
    "black at -1": (lambda: photo() * 0 - 1, "got values from -1 to -1;"),
    "not finite": (lambda: photo() * float("nan"), "got values from nan to nan"),
    "channels last": (lambda: photo().movedim(1, 3), r"got \(2, 32, 32, 3\)"),
    "grey": (lambda: photo()[:, :1], r"got \(2, 1, 32, 32\)"),
    "one image": (lambda: photo()[0], r"got \(3, 32, 32\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_pixels_in_another_range_or_shape_are_refused(wrong: str) -> None:
    make, message = WRONG[wrong]
    ours = make_student()
    backbone = ShouldersBackbone(ours.config).eval()
    for call in (ours, ours.predict_teacher_features, backbone):
        with torch.no_grad():
            call(photo())
            with pytest.raises(ValueError, match=f"^pixels: a student takes floats .*{message}"):
                call(make())


def test_what_resizing_leaves_of_the_range_is_accepted() -> None:
    edges = (photo() > 0.5).float()
    resized = torch.nn.functional.interpolate(edges, (80, 80), mode="bicubic")
    assert resized.min() < -0.1 and resized.max() > 1.1
    check_pixels(resized)
    lines = (torch.arange(96) % 6 < 2).float().expand(1, 3, 96, 96)
    for contrast in (0.5, 0.8, 1.0):
        for size in (64, 80, 224):
            check_pixels(contrast * torch.nn.functional.interpolate(lines, (size, size), mode="bicubic"))
    check_pixels(pale())
    check_pixels(photo().bfloat16())
    check_pixels(photo()[:0])


def test_the_folder_names_the_pixels_that_the_student_takes(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    ours = make_student()
    ours.config.teachers = {}
    save_student(ours, tmp_path / "student", heads={})
    processor = AutoImageProcessor.from_pretrained(tmp_path / "student")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.from_numpy(image).movedim(2, 0)[None] / 255)
    large = Image.fromarray(image).resize((100, 70))
    assert processor(large, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)

"""A view is a pure function of its key, is inside the image, and does not depend on the decoded size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.images.decode import decode_with_size
from shoulders.images.views import View, central_view, min_decode_side, random_view, render

SCALE = (0.4, 1.0)
PINNED_VIEW = (0.029832128957756703, 0.01716262587545041, 0.9638759798957648, 0.8177660372878796)


def test_a_view_depends_only_on_seed_image_and_visit() -> None:
    first = random_view(3, 17, 0, SCALE, True, (400, 500))
    assert first == random_view(3, 17, 0, SCALE, True, (400, 500))
    others = [random_view(*key, SCALE, True, (400, 500)) for key in [(4, 17, 0), (3, 18, 0), (3, 17, 1)]]
    assert len({first, *others}) == 4


def test_views_are_pinned() -> None:
    """A run that is resumed with a later version must get the same views."""
    view = random_view(0, 2**62 + 1, 5, SCALE, True, (400, 500))
    assert (view.top, view.left, view.height, view.width) == pytest.approx(PINNED_VIEW, rel=1e-12)
    assert not view.flip


@pytest.mark.parametrize("original", [(400, 500), (500, 400), (300, 300), (100, 400), (1, 5000), (5000, 1)])
def test_boxes_are_inside_the_image_and_have_a_ratio_in_range(original: tuple[int, int]) -> None:
    for visit in range(300):
        view = random_view(0, 1, visit, SCALE, True, original)
        assert 0 <= view.top <= view.top + view.height <= 1 + 1e-12
        assert 0 <= view.left <= view.left + view.width <= 1 + 1e-12
        assert 3 / 4 - 1e-9 <= view.width * original[1] / (view.height * original[0]) <= 4 / 3 + 1e-9


def test_areas_positions_and_flips_are_evenly_distributed() -> None:
    views = [random_view(0, image, 0, SCALE, True, (375, 500)) for image in range(3000)]
    areas = np.array([view.height * view.width for view in views])
    assert areas.min() >= 0.4 and areas.max() > 0.95
    assert abs(np.mean([view.flip for view in views]) - 0.5) < 0.03
    centres = np.array([[view.top + view.height / 2, view.left + view.width / 2] for view in views])
    assert np.abs(centres.mean(axis=0) - 0.5).max() < 0.02
    assert not any(random_view(0, image, 0, SCALE, False, (375, 500)).flip for image in range(50))


def test_a_scale_of_one_shows_the_whole_image() -> None:
    view = random_view(0, 1, 0, (1.0, 1.0), False, (400, 500))
    assert (view.height, view.width) == (1, 1)


@pytest.mark.parametrize(
    ("original", "size", "box"),
    [
        ((300, 400), (224, 224), (0, 0.125, 1, 0.75)),
        ((400, 300), (224, 224), (0.125, 0, 0.75, 1)),
        ((100, 100), (50, 100), (0.25, 0, 0.5, 1)),
        ((100, 200), (50, 100), (0, 0, 1, 1)),
    ],
)
def test_central_views(
    original: tuple[int, int], size: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    assert central_view(original, size) == View(*box)


def test_rendering_crops_then_resizes_then_mirrors() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    rendered = render(pixels, View(0.25, 0.5, 0.5, 0.26, flip=True), (8, 12))
    # width first and then height, as PyTorch does; Pillow chooses the order by cost
    narrow = image.crop((30, 10, 46, 30)).resize((12, 20), Image.Resampling.BICUBIC)
    expected = narrow.resize((12, 8), Image.Resampling.BICUBIC)
    mirrored = np.asarray(expected)[:, ::-1].astype(int)
    assert np.abs(rendered.permute(1, 2, 0).numpy().astype(int) - mirrored).max() <= 1
    assert rendered.is_contiguous() and rendered.dtype == torch.uint8


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 2)])
def test_thin_images_can_be_rendered(shape: tuple[int, int]) -> None:
    pixels = torch.full((3, *shape), 77, dtype=torch.uint8)
    for visit in range(20):
        rendered = render(pixels, random_view(0, 9, visit, SCALE, True, shape), (32, 16))
        assert rendered.shape == (3, 32, 16) and (rendered == 77).all()


def test_a_view_shows_the_same_part_at_another_decoded_size() -> None:
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    full, full_size = decode_with_size(file.getvalue(), 10**7)
    reduced, same_size = decode_with_size(file.getvalue(), 10**7, min_decode_side([(64, 64)], SCALE))
    assert full.shape[1] == 8 * reduced.shape[1] and full_size == same_size == (1200, 1600)
    view = random_view(0, 5, 0, SCALE, True, full_size)
    difference = render(full, view, (64, 64)).int() - render(reduced, view, (64, 64)).int()
    assert difference.abs().float().mean() < 2


def test_no_view_is_enlarged_at_the_smallest_decoded_side() -> None:
    side = min_decode_side([(224, 160), (96, 96)], SCALE)
    for visit in range(300):
        view = random_view(0, 1, visit, SCALE, False, (side, 2 * side))
        assert view.height * side >= 223.5 and view.width * 2 * side >= 223.5

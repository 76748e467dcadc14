"""Data sets that decode images and render their views: one item is one batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from shoulders.config import sections
from shoulders.config.section import as_size
from shoulders.errors import DataError
from shoulders.features import CENTRAL, Skipped
from shoulders.images.decode import Undecodable
from shoulders.images.image_set import Collection, ImageSet
from shoulders.images.views import View, central_view, longest_side, min_decode_side, random_view, render

Size = tuple[int, int]
# the five fields of Batch in plain containers, because DataLoader pins the memory of no others
Rendered = tuple[Tensor, dict[Size, Tensor], Tensor | None, tuple[Skipped, ...], Tensor]


class Views(Dataset[Rendered | DataError]):
    """Batches of views. Each worker writes down which image it decodes, in case that the image ends the worker.

    Args:
        images: all images.
    """

    def __init__(self, images: Collection) -> None:
        self.images = images
        self.decoding = torch.empty(0, 2, dtype=torch.int64)  # by worker: process id, index of an image or -1

    def share(self, workers: int) -> None:
        """Prepare to be read by worker processes."""
        self.decoding = torch.full((workers, 2), -1).share_memory_()

    def decode(self, index: int, max_pixels: int, min_side: int | None) -> tuple[Tensor, Size]:
        """As `Collection.pixels`."""
        if (worker := get_worker_info()) is not None:
            self.decoding[worker.id, 1] = index
        return self.images.pixels(index, max_pixels, min_side)


class TrainingViews(Views):
    """Item (B, 2) of image indices and visits -> random views of these images.

    Args:
        image_set: the images.
        sizes: every (h, w) in px to render.
        settings: views, scale, flip and max_pixels are used.
        seed: of the views.
        decode_sizes: the sizes that images are decoded for.
    """

    def __init__(
        self, image_set: ImageSet, sizes: list[Size], settings: sections.Images, seed: int, decode_sizes: list[Size]
    ) -> None:
        super().__init__(image_set.collection)
        self.image_set, self.sizes, self.settings, self.seed = image_set, sizes, settings, seed
        self.min_side = min_decode_side(decode_sizes, settings.scale)

    def __getitem__(self, visits: NDArray[np.int64]) -> Rendered | DataError:
        """A batch of B views, or the error to raise in the main process: a worker would add its traceback."""
        ids = torch.empty(len(visits), dtype=torch.int64)
        numbers = torch.empty(len(visits), dtype=torch.int64)
        pixels = _empty_pixels(self.sizes, len(visits))
        skipped: list[Skipped] = []
        for i, (index, visit) in enumerate(visits.tolist()):
            try:
                used, original, full_size = self._decode(index, skipped)
            except DataError as error:
                return error
            ids[i] = identity = int(self.image_set.collection.ids[used])
            numbers[i] = number = visit if self.settings.views == "fresh" else visit % self.settings.views
            view = random_view(self.seed, identity, number, self.settings.scale, self.settings.flip, full_size)
            for size in self.sizes:
                pixels[size][i] = render(original, view, size)
        return ids, pixels, None, tuple(skipped), numbers

    def _decode(self, index: int, skipped: list[Skipped]) -> tuple[int, Tensor, Size]:
        """Index, pixels and full size of the image, or of the first replacement that can be decoded."""
        for candidate in [index, *self.image_set.replacements(index)]:
            try:
                return candidate, *self.decode(candidate, self.settings.max_pixels, self.min_side)
            except Undecodable as error:
                skipped.append(Skipped(self.images.name(candidate), str(error)))
        raise DataError(
            f"{skipped[-1].name!r} ({skipped[-1].reason}): nor could any other image tried in place of "
            f"{self.images.name(index)!r} be decoded; check that images.path contains complete image files"
        )


class CentralViews(Views):
    """Item (B,) of image indices -> central views of the images that can be decoded.

    Args:
        images: the images.
        sizes: every (h, w) in px to render.
        max_pixels: images of more pixels are skipped.
        decode_sizes: the sizes that images are decoded for.
        shape: as in `shoulders.images.evaluation_batches`.
    """

    def __init__(
        self, images: Collection, sizes: list[Size], max_pixels: int, decode_sizes: list[Size], shape: Size | None
    ) -> None:
        super().__init__(images)
        self.sizes, self.max_pixels, self.shape = sizes, max_pixels, shape
        self.min_side = longest_side(decode_sizes)

    def __getitem__(self, indices: NDArray[np.int64]) -> Rendered | DataError:
        """A batch of at most B views."""
        used: list[int] = []
        pixels = _empty_pixels(self.sizes, len(indices))
        skipped: list[Skipped] = []
        for index in indices.tolist():
            try:
                original, full_size = self.decode(index, self.max_pixels, self.min_side)
            except Undecodable as error:
                skipped.append(Skipped(self.images.name(index), str(error)))
                continue
            for size in self.sizes:
                pixels[size][len(used)] = render(original, central_view(full_size, self.shape or size), size)
            used.append(index)
        labels = None if self.images.labels is None else torch.from_numpy(self.images.labels[used])
        numbers = torch.full((len(used),), CENTRAL)
        return torch.from_numpy(self.images.ids[used]), _first(pixels, len(used)), labels, tuple(skipped), numbers


class ListedViews(Views):
    """Item (B, 2) of image indices and view numbers -> these views of the images that can be decoded.

    Args:
        image_set: the images.
        sizes: every (h, w) in px to render.
        settings: size, scale, flip and max_pixels are used.
        seed: of the views.
    """

    def __init__(self, image_set: ImageSet, sizes: list[Size], settings: sections.Images, seed: int) -> None:
        super().__init__(image_set.collection)
        self.sizes, self.settings, self.seed = sizes, settings, seed
        self.shape = as_size(settings.size)  # central views have the aspect ratio of the student's input

    def __getitem__(self, views: NDArray[np.int64]) -> Rendered | DataError:
        """A batch of at most B views."""
        used: list[tuple[int, int]] = []
        pixels = _empty_pixels(self.sizes, len(views))
        skipped: list[Skipped] = []
        for index, number in views.tolist():
            is_random = number != CENTRAL
            min_side = min_decode_side(self.sizes, self.settings.scale) if is_random else longest_side(self.sizes)
            try:
                original, full_size = self.decode(index, self.settings.max_pixels, min_side)
            except Undecodable as error:
                skipped.append(Skipped(self.images.name(index), str(error)))
                continue
            for size in self.sizes:
                view = self._random(index, number, full_size) if is_random else central_view(full_size, self.shape)
                pixels[size][len(used)] = render(original, view, size)
            used.append((int(self.images.ids[index]), number))
        ids, numbers = torch.tensor(used, dtype=torch.int64).view(-1, 2).unbind(1)
        return ids, _first(pixels, len(used)), None, tuple(skipped), numbers

    def _random(self, index: int, number: int, full_size: Size) -> View:
        identity, settings = int(self.images.ids[index]), self.settings
        return random_view(self.seed, identity, number, settings.scale, settings.flip, full_size)


def _empty_pixels(sizes: list[Size], count: int) -> dict[Size, Tensor]:
    return {size: torch.empty(count, 3, *size, dtype=torch.uint8) for size in sizes}  # (B, 3, h, w) by size


def _first(pixels: dict[Size, Tensor], count: int) -> dict[Size, Tensor]:
    return {size: images[:count].contiguous() for size, images in pixels.items()}

"""The order of records: which record holds which view of which image, by image id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from shoulders.errors import DataError
from shoulders.features import CENTRAL, Batch
from shoulders.images import ImageSet

Numbers = NDArray[np.int64]


class RecordIndex:
    """K views of each training image in the order of ids, then the central view of each held-out image.

    The order depends neither on paths nor on the order of files.

    Args:
        images: of the run.
        views: K.
        sources: names of the sources whose images are in the index; None: all.
    """

    def __init__(self, images: ImageSet, views: int, sources: Sequence[str] | None = None) -> None:
        self.images, self.views, self.sources = images, views, sources
        training = self._by_id(np.concatenate(list(images.training.values())))
        self.indices = np.concatenate([training, self._by_id(images.heldout)])
        self.ids = images.collection.ids[self.indices]
        self.num_training = len(training)  # images, the first ones of ``indices``
        self.first_heldout = self.num_training * views

    def __len__(self) -> int:
        """Number of records."""
        return self.first_heldout + len(self.indices) - self.num_training

    def views_of(self, numbers: Numbers) -> Numbers:
        """(B, 2) index of the image and number of its view, for records (B,)."""
        is_training = numbers < self.first_heldout
        position, view = np.divmod(numbers, self.views)
        position = np.where(is_training, position, numbers - self.first_heldout + self.num_training)
        return np.stack([self.indices[position], np.where(is_training, view, CENTRAL)], axis=1)

    def keys(self, numbers: Numbers) -> list[tuple[int, int]]:
        """(image id, number of the view) of records (B,)."""
        views = self.views_of(numbers)
        return list(zip(self.images.collection.ids[views[:, 0]].tolist(), views[:, 1].tolist(), strict=True))

    def select(self, views: Numbers) -> tuple[Numbers, Numbers]:
        """Select the views of images that are in this index.

        Args:
            views: (B, 2), as from `views_of` of another index.

        Returns:
            Indices into ``views`` (b,) and the records of these views (b,).
        """
        ids = self.images.collection.ids[views[:, 0]]
        rows = self._rows(ids)
        return rows, self._find(ids[rows], views[rows, 1])

    def restrict(self, batch: Batch) -> Batch:
        """The images of a batch that are in this index."""
        return batch if self.sources is None else batch.take(torch.from_numpy(self._rows(batch.ids.numpy())))

    def records_of(self, batch: Batch) -> Numbers:
        """The records (B,) of a batch.

        Raises:
            DataError: there is no record of a view.
        """
        if batch.views is None:
            raise DataError("cache: this batch does not record the numbers of its views")
        return self._find(batch.ids.numpy(), batch.views.numpy())

    def _by_id(self, indices: Numbers) -> Numbers:
        """The images of the sources among ``indices`` (n,), in the order of ids."""
        ids = self.images.collection.ids[indices]
        rows = self._rows(ids)
        return indices[rows[np.argsort(ids[rows])]]

    def _rows(self, ids: Numbers) -> Numbers:
        """Indices into ``ids`` (n,) of the images of the sources."""
        return np.arange(len(ids)) if self.sources is None else self.images.collection.indices_from(self.sources, ids)

    def _find(self, ids: Numbers, views: Numbers) -> Numbers:
        """The records (B,) of images with these ids (B,) and views (B,)."""
        central = views == CENTRAL
        if (views[~central] >= self.views).any():
            raise DataError(f"cache: view {views.max()} is needed, but the cache has {self.views} views of each image")
        numbers = np.where(central, self.first_heldout, 0)
        training, heldout = self.ids[: self.num_training], self.ids[self.num_training :]
        for known, selected, step in ((training, ~central, self.views), (heldout, central, 1)):
            position = np.searchsorted(known, ids[selected]).clip(max=max(0, len(known) - 1))
            if selected.any() and (known[position] != ids[selected]).any():
                raise DataError("cache: an image is needed that is not in the cache; build the cache again")
            numbers[selected] += position * step
        numbers[~central] += views[~central]
        return numbers

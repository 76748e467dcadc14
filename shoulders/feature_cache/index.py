"""Which record holds which view of which image: by id, so that neither paths nor the order of files matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from shoulders.errors import DataError
from shoulders.features import CENTRAL, Batch
from shoulders.images import ImageSet

Numbers = NDArray[np.int64]


class Index:
    """K views of each training image in the order of ids, then the central view of each held-out one.

    Args:
        images: of the run.
        views: K.
        home: the sources whose images alone count; None: all.
    """

    def __init__(self, images: ImageSet, views: int, home: Sequence[str] | None = None) -> None:
        self.images, self.views, self.home = images, views, home
        training = self._in_order(np.concatenate(list(images.training.values())))
        self.indices = np.concatenate([training, self._in_order(images.heldout)])
        self.ids = images.collection.ids[self.indices]
        self.trained = len(training)  # images, the first of these
        self.first_heldout = self.trained * views

    def _in_order(self, indices: Numbers) -> Numbers:
        ids = self.images.collection.ids[indices]
        ours = self._rows(ids)
        return indices[ours[np.argsort(ids[ours])]]

    def _rows(self, ids: Numbers) -> Numbers:
        """Which of some images count, as indices into ``ids`` (n,)."""
        return np.arange(len(ids)) if self.home is None else self.images.collection.indices_from(self.home, ids)

    def __len__(self) -> int:
        """Records in all."""
        return self.first_heldout + len(self.indices) - self.trained

    def wanted(self, numbers: Numbers) -> Numbers:
        """(B, 2) index of the image and number of its view, for records (B,)."""
        trained = numbers < self.first_heldout
        place, view = np.divmod(numbers, self.views)
        place = np.where(trained, place, numbers - self.first_heldout + self.trained)
        return np.stack([self.indices[place], np.where(trained, view, CENTRAL)], axis=1)

    def keys(self, numbers: Numbers) -> list[tuple[int, int]]:
        """(image id, view) of records (B,)."""
        wanted = self.wanted(numbers)
        return list(zip(self.images.collection.ids[wanted[:, 0]].tolist(), wanted[:, 1].tolist(), strict=True))

    def counting(self, wanted: Numbers) -> tuple[Numbers, Numbers]:
        """Which of some views (B, 2), as `wanted` gives them, count here, and the records that hold those."""
        ids = self.images.collection.ids[wanted[:, 0]]
        rows = self._rows(ids)
        return rows, self._find(ids[rows], wanted[rows, 1])

    def among(self, batch: Batch) -> Batch:
        """Those images of a batch that count here."""
        return batch if self.home is None else batch.take(torch.from_numpy(self._rows(batch.ids.numpy())))

    def of(self, batch: Batch) -> Numbers:
        """The records (B,) of a batch.

        Raises:
            DataError: a view that no record holds.
        """
        if batch.views is None:
            raise DataError("cache: this batch does not say which views of its images it holds")
        return self._find(batch.ids.numpy(), batch.views.numpy())

    def _find(self, ids: Numbers, views: Numbers) -> Numbers:
        central = views == CENTRAL
        if (views[~central] >= self.views).any():
            raise DataError(f"cache: asked for view {views.max()}, but only {self.views} of each image were made")
        found = np.where(central, self.first_heldout, 0)
        training, heldout = self.ids[: self.trained], self.ids[self.trained :]
        for known, here, step in ((training, ~central, self.views), (heldout, central, 1)):
            place = np.searchsorted(known, ids[here]).clip(max=max(0, len(known) - 1))
            if here.any() and (known[place] != ids[here]).any():
                raise DataError("cache: asked for an image that is not among those it was made of; make it anew")
            found[here] += place * step
        found[~central] += views[~central]
        return found

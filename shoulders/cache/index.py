"""Which record holds which view of which image: by id, so that neither paths nor the order of files matter."""

from __future__ import annotations

import numpy as np
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
    """

    def __init__(self, images: ImageSet, views: int) -> None:
        self.images, self.views = images, views
        training = np.concatenate(list(images.training.values()))
        self.training = training[np.argsort(images.images.ids[training])]
        self.heldout = images.heldout[np.argsort(images.images.ids[images.heldout])]
        self.first_heldout = len(self.training) * views

    def __len__(self) -> int:
        """Records in all."""
        return self.first_heldout + len(self.heldout)

    def wanted(self, numbers: Numbers) -> Numbers:
        """(B, 2) index of the image and number of its view, for records (B,)."""
        trained = numbers < self.first_heldout
        place, view = np.divmod(np.where(trained, numbers, 0), self.views)
        kept_out = np.where(trained, 0, numbers - self.first_heldout)
        index = np.where(trained, self.training[place], self.heldout[kept_out])
        return np.stack([index, np.where(trained, view, CENTRAL)], axis=1)

    def keys(self, numbers: Numbers) -> list[tuple[int, int]]:
        """(image id, view) of records (B,)."""
        wanted = self.wanted(numbers)
        return list(zip(self.images.images.ids[wanted[:, 0]].tolist(), wanted[:, 1].tolist(), strict=True))

    def of(self, batch: Batch) -> Numbers:
        """The records (B,) of a batch.

        Raises:
            DataError: a view that no record holds.
        """
        if batch.views is None:
            raise DataError("cache: this batch does not say which views of its images it holds")
        ids, views = batch.ids.numpy(), batch.views.numpy()
        central = views == CENTRAL
        if (views[~central] >= self.views).any():
            raise DataError(f"cache: asked for view {views.max()}, but only {self.views} of each image were made")
        found = np.where(central, self.first_heldout, 0)
        for indices, here, step in ((self.training, ~central, self.views), (self.heldout, central, 1)):
            known = self.images.images.ids[indices]
            place = np.searchsorted(known, ids[here]).clip(max=max(0, len(known) - 1))
            if here.any() and (known[place] != ids[here]).any():
                raise DataError("cache: asked for an image that is not among those it was made of; make it anew")
            found[here] += place * step
        found[~central] += views[~central]
        return found

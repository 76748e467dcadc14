"""All images of a run: several sources as one, what is held out, and the order of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shoulders.errors import DataError
from shoulders.images.decode import Undecodable, decode_with_size
from shoulders.images.order import permutation, quotas, stream
from shoulders.images.source import ImageSource, image_id

_REPLACEMENTS = 20
_FEWEST_HELD_OUT = 8


class Collection:
    """Several sources as one list of images, each with a stable id.

    Args:
        sources: opened sources by name.

    Attributes:
        ids: (count,) int64.
        labels: (count,) int64, -1 where an image has none; None unless there is one source and it has labels.
        classes: names of the classes, where that source has them.

    Raises:
        DataError: two images of one source have the same name.
    """

    def __init__(self, sources: Mapping[str, ImageSource]) -> None:
        self.sources = dict(sources)
        self.ends = np.cumsum([len(source) for source in self.sources.values()])
        only = next(iter(self.sources.values())) if len(self.sources) == 1 else None
        # class numbers of different sources mean different things
        self.labels = None if only is None else only.labels
        self.classes = None if only is None else only.classes
        ids = [
            np.fromiter((image_id(key, source.name(index)) for index in range(len(source))), np.int64, len(source))
            for key, source in self.sources.items()
        ]
        self.ids = np.concatenate(ids)
        self._by_id = np.argsort(self.ids, kind="stable")
        twins = np.flatnonzero(np.diff(self.ids[self._by_id]) == 0)
        if len(twins):
            name = self.name(int(self._by_id[twins[0]]))
            raise DataError(f"{name!r}: two images have this name; rename or remove one")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def name(self, index: int) -> str:
        """Name of an image in its source, with the source's own name in front where there are several."""
        key, inside = self._locate(index)
        name = self.sources[key].name(inside)
        return name if len(self.sources) == 1 else f"{key}/{name}"

    def name_of(self, identity: int) -> str:
        """Name of the image with this id."""
        return self.name(int(np.flatnonzero(self.ids == identity)[0]))

    def indices_from(self, sources: Sequence[str], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the images with these ids (n,) are of some sources, as indices into ``ids``."""
        numbers = [list(self.sources).index(source) for source in sources]
        indices = self._by_id[np.searchsorted(self.ids, ids, sorter=self._by_id)]
        return np.flatnonzero(np.isin(np.searchsorted(self.ends, indices, side="right"), numbers))

    def pixels(self, index: int, max_pixels: int, min_side: int | None) -> tuple[Tensor, tuple[int, int]]:
        """The decoded image (3, H, W) uint8 and its full size, as `decode_with_size`.

        Raises:
            Undecodable: if it cannot be read or decoded.
        """
        key, inside = self._locate(index)
        try:
            data = self.sources[key].read(inside)
        except Undecodable:
            raise
        except Exception as error:  # a file that went away, a disk error, a damaged page of a parquet file
            raise Undecodable(f"cannot be read: {' '.join(str(error).split())}"[:200]) from error
        return decode_with_size(data, max_pixels, min_side)

    def _locate(self, index: int) -> tuple[str, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        key = list(self.sources)[number]
        return key, index - int(self.ends[number] - len(self.sources[key]))


class ImageSet:
    """The images of a run: a held-out set that never trains, and an endless order of the others.

    An epoch has as many positions as there are training images; each source fills its share of them from its
    own endless shuffled stream. With one source that is the usual shuffled epoch.

    Args:
        sources: opened sources by name.
        shares: of each epoch by source; None: see `quotas`.
        seed: of the order. The held-out set does not depend on it.
        holdout: images kept out of training, of every source its share; at most a tenth of it, but some in any case.

    Attributes:
        images: the `Collection` that all indices below point into.
        heldout: (n,) int64, indices of the images of each source with the lowest ids.
        training: indices of the others, by source.

    Raises:
        RecipeError: shares that leave nothing for a source.
        DataError: fewer than two images, or two with the same name.
    """

    def __init__(
        self, sources: Mapping[str, ImageSource], shares: Mapping[str, float | None], seed: int, holdout: int
    ) -> None:
        self.collection = Collection(sources)
        self.seed = seed
        count = len(self.collection)
        if count < 2:
            raise DataError("only one image: give at least two, one of them is held out for evaluation")
        # ids are hashes: their order is random, the same wherever the files lie and however they are listed
        by_id = np.argsort(self.collection.ids)
        owner = np.searchsorted(self.collection.ends, by_id, side="right")
        parts = {key: by_id[owner == number] for number, key in enumerate(self.collection.sources)}
        wanted = quotas({key: len(part) for key, part in parts.items()}, dict(shares))
        kept = {key: _kept_out(len(part), holdout * wanted[key] / count) for key, part in parts.items()}
        heldout = np.concatenate([part[: kept[key]] for key, part in parts.items()])
        self.heldout = heldout[np.argsort(self.collection.ids[heldout])]
        self.training = {key: part[kept[key] :] for key, part in parts.items()}
        self.count = count - len(heldout)
        for key, indices in self.training.items():
            if len(indices) == 0:
                raise DataError(f"images.sources.{key}: no image is left to train on; add some, or leave it out")
        counts = {key: len(indices) for key, indices in self.training.items()}
        self.quotas = quotas(counts, dict(shares))
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Training images, which is also the length of an epoch."""
        return self.count

    def shares(self) -> dict[str, float]:
        """The fraction of training positions that each source fills."""
        return {key: amount / self.count for key, amount in self.quotas.items()}

    def visits(self, epoch: int) -> NDArray[np.int64]:
        """The order of one epoch, (len(self), 2): index of the image, and how often it came before."""
        if self._epoch is None or self._epoch[0] != epoch:
            parts = []
            for key, amount in self.quotas.items():
                indices = self.training[key]
                part = stream(epoch * amount, amount, len(indices), self.seed, "source", key)
                part[:, 0] = indices[part[:, 0]]
                parts.append(part)
            order = permutation(self.count, self.seed, "epoch", epoch)
            self._epoch = epoch, np.concatenate(parts)[order]
        return self._epoch[1]

    def positions(self, first: int, amount: int) -> NDArray[np.int64]:
        """Positions [first, first + amount) of all epochs in a row, (amount, 2) as in `visits`."""
        parts = []
        while amount > 0:
            epoch, start = divmod(first, self.count)
            part = self.visits(epoch)[start : start + amount]
            parts.append(part)
            first, amount = first + len(part), amount - len(part)
        return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)

    def replacements(self, index: int) -> list[int]:
        """Training images of the same source to try in place of one that cannot be decoded, in this order."""
        number = int(np.searchsorted(self.collection.ends, index, side="right"))
        indices = self.training[list(self.training)[number]]
        identity = int(self.collection.ids[index])
        words = np.random.Philox(key=identity).random_raw(_REPLACEMENTS)
        return [int(indices[int(word) % len(indices)]) for word in words]


def _kept_out(count: int, wanted: float) -> int:
    """How many of a source's ``count`` images are held out, where so many are wanted of it."""
    few = min(_FEWEST_HELD_OUT, count // 2)
    return min(max(round(wanted), few), max(count // 10, few))

"""All images of a run: several sources as one collection, the held-out images, and the order of training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from shoulders.errors import DataError
from shoulders.images.decode import Undecodable, decode_with_size, has_orientation
from shoulders.images.grey import SourceRanges
from shoulders.images.order import permutation, quotas, stream
from shoulders.images.source import ImageSource, image_id

NUM_REPLACEMENTS = 20  # images to try in place of one that cannot be decoded
MIN_HELDOUT = 8  # images of each source, or half of a smaller source


class Collection:
    """Several sources as one list of images, each with a stable id.

    Args:
        sources: opened sources by name.
        upright: whether EXIF orientations are applied; if not, pixels are as they are stored, and the first image with
            an orientation is named in a warning. Labels are in stored pixels, see docs/images.md.

    Attributes:
        ids: (count,) int64.
        labels: (count,) int64, -1 for an image without one; None unless there is a single source and it has labels.
        classes: names of the classes of that source, if it has them.

    Raises:
        DataError: two images of one source have the same name.
    """

    def __init__(self, sources: Mapping[str, ImageSource], upright: bool = True) -> None:
        self.sources, self.upright = dict(sources), upright
        self.warn_orientation = not upright
        self.grey_ranges = {name: SourceRanges(source) for name, source in self.sources.items()}
        self.ends = np.cumsum([len(source) for source in self.sources.values()])
        only = next(iter(self.sources.values())) if len(self.sources) == 1 else None
        # the class numbers of different sources mean different classes
        self.labels = None if only is None else only.labels
        self.classes = None if only is None else only.classes
        ids = [
            np.fromiter((image_id(key, source.name(index)) for index in range(len(source))), np.int64, len(source))
            for key, source in self.sources.items()
        ]
        self.ids = np.concatenate(ids)
        self._by_id = np.argsort(self.ids, kind="stable")
        duplicates = np.flatnonzero(np.diff(self.ids[self._by_id]) == 0)
        if len(duplicates):
            name = self.name(int(self._by_id[duplicates[0]]))
            raise DataError(f"{name!r}: two images have this name; rename or remove one")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def name(self, index: int) -> str:
        """Name of an image in its source; if there are several sources, it starts with the name of the source."""
        key, inside = self._locate(index)
        name = self.sources[key].name(inside)
        return name if len(self.sources) == 1 else f"{key}/{name}"

    def name_of_id(self, identity: int) -> str:
        """Name of the image with this id."""
        return self.name(int(np.flatnonzero(self.ids == identity)[0]))

    def indices_from(self, sources: Sequence[str], ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices into ``ids`` (n,) of the images that belong to some sources."""
        return np.flatnonzero(np.isin(self.source_of(ids), self.source_indices(sources)))

    def source_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The source (n,) of the images with these ids (n,), as an index into the names of the sources."""
        indices = self._by_id[np.searchsorted(self.ids, ids, sorter=self._by_id)]
        return np.searchsorted(self.ends, indices, side="right")

    def source_indices(self, names: Sequence[str]) -> list[int]:
        """The indices that `source_of` gives for the sources with these names."""
        return [list(self.sources).index(name) for name in names]

    def encoded(self, index: int) -> bytes:
        """The bytes of an image as they are stored.

        Raises:
            Undecodable: the image cannot be read.
        """
        key, inside = self._locate(index)
        try:
            return self.sources[key].read(inside)
        except Undecodable:
            raise
        except Exception as error:  # a deleted file, a disk error, a damaged page of a parquet file, ...
            raise Undecodable(f"cannot be read: {' '.join(str(error).split())}"[:200]) from error

    def pixels(self, index: int, max_pixels: int, min_side: int | None) -> tuple[Tensor, tuple[int, int]]:
        """The decoded image (3, H, W) uint8 and its full size (H, W), see `decode_with_size`.

        Raises:
            Undecodable: the image cannot be read or decoded.
        """
        data = self.encoded(index)
        if self.warn_orientation and get_worker_info() is None and has_orientation(data):
            self.warn_orientation = False
            warnings.warn(
                f"{self.name(index)}: has an EXIF orientation; images with labels are used as they are stored, as in "
                "COCO (further ones are not named): if the labels are for upright images, save these upright",
                stacklevel=2,
            )
        ranges = self.grey_ranges[self._locate(index)[0]]
        choose_range = partial(ranges.choose, name=partial(self.name, index))
        decoded = decode_with_size(data, max_pixels, min_side, self.upright, choose_range)
        ranges.print_notes()
        return decoded

    def _locate(self, index: int) -> tuple[str, int]:
        """Name of the source of an image, and the index of the image in it."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        key = list(self.sources)[number]
        return key, index - int(self.ends[number] - len(self.sources[key]))


class ImageSet:
    """The images of a run: held-out images, which are never trained on, and an endless order of the others.

    An epoch has as many positions as there are training images. Each source fills its quota of them from its own
    endless shuffled stream. With one source this is the usual shuffled epoch.

    Args:
        sources: opened sources by name.
        shares: of each epoch by source; None: see `quotas`.
        seed: of the order. The held-out images do not depend on it.
        holdout: number of held-out images, divided among the sources like an epoch; at most a tenth of each source,
            but at least `MIN_HELDOUT` of it, or half of a smaller one.

    Attributes:
        collection: the `Collection` that all indices below point into.
        heldout: (n,) int64, indices of the images of each source with the lowest ids, in the order of ids.
        training: indices of the other images, by source.
        quotas: images of each source in an epoch.

    Raises:
        RecipeError: shares that leave no image to a source.
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
        # ids are hashes, so their order is random, and it does not depend on paths or on the order of files
        by_id = np.argsort(self.collection.ids)
        source_number = np.searchsorted(self.collection.ends, by_id, side="right")
        parts = {key: by_id[source_number == number] for number, key in enumerate(self.collection.sources)}
        wanted = quotas({key: len(part) for key, part in parts.items()}, dict(shares))
        held = {key: _num_heldout(len(part), holdout * wanted[key] / count) for key, part in parts.items()}
        heldout = np.concatenate([part[: held[key]] for key, part in parts.items()])
        self.heldout = heldout[np.argsort(self.collection.ids[heldout])]
        self.training = {key: part[held[key] :] for key, part in parts.items()}
        self.num_training = count - len(heldout)
        for key, indices in self.training.items():
            if len(indices) == 0:
                raise DataError(f"images.sources.{key}: no image is left to train on; add some, or leave it out")
        counts = {key: len(indices) for key, indices in self.training.items()}
        self.quotas = quotas(counts, dict(shares))
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Number of training images, which is also the length of an epoch."""
        return self.num_training

    def shares(self) -> dict[str, float]:
        """The fraction of an epoch that each source fills."""
        return {key: quota / self.num_training for key, quota in self.quotas.items()}

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """The order of one epoch, (len(self), 2): index of the image, and number of its earlier visits."""
        if self._epoch is None or self._epoch[0] != epoch:
            parts = []
            for key, quota in self.quotas.items():
                indices = self.training[key]
                part = stream(epoch * quota, quota, len(indices), self.seed, "source", key)
                part[:, 0] = indices[part[:, 0]]
                parts.append(part)
            order = permutation(self.num_training, self.seed, "epoch", epoch)
            self._epoch = epoch, np.concatenate(parts)[order]
        return self._epoch[1]

    def positions(self, first: int, length: int) -> NDArray[np.int64]:
        """Positions [first, first + length) of all epochs in sequence, (length, 2) as in `epoch_order`."""
        parts = []
        while length > 0:
            epoch, start = divmod(first, self.num_training)
            part = self.epoch_order(epoch)[start : start + length]
            parts.append(part)
            first, length = first + len(part), length - len(part)
        return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)

    def replacements(self, index: int) -> list[int]:
        """Training images of the same source to try, in this order, in place of one that cannot be decoded."""
        number = int(np.searchsorted(self.collection.ends, index, side="right"))
        indices = self.training[list(self.training)[number]]
        identity = int(self.collection.ids[index])
        words = np.random.Philox(key=identity).random_raw(NUM_REPLACEMENTS)
        return [int(indices[int(word) % len(indices)]) for word in words]


def _num_heldout(count: int, wanted: float) -> int:
    """Number of held-out images of a source with ``count`` images, of which about ``wanted`` should be held out."""
    smallest = min(MIN_HELDOUT, count // 2)
    return min(max(round(wanted), smallest), max(count // 10, smallest))

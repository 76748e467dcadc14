"""Teacher features from a cache, with the same interface as live teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from zlib_ng import zlib_ng

from shoulders.config.recipe import Recipe
from shoulders.config.section import as_size
from shoulders.distributed.context import DistContext
from shoulders.errors import DataError, RecipeError
from shoulders.feature_cache.fingerprint import CacheEntry, Size, all_sizes, cache_entries, fingerprints
from shoulders.feature_cache.shard_files import MAX_OPEN_FILES
from shoulders.feature_cache.spec import build_command, cache_folder, num_views, record_indices
from shoulders.feature_cache.teacher_store import TeacherStore, open_store
from shoulders.features import CENTRAL, Batch, Features
from shoulders.images import ImageSet
from shoulders.teachers import AnyTeachers, Tap, Teacher, load_teacher
from shoulders.teachers.teacher import empty_features
from shoulders.transfer.losses import BASE


class CachedTeachers(AnyTeachers):
    """Reads the features of all teachers instead of running them; no teacher is loaded, and no pixels are needed.

    Args:
        stores: by teacher; ``base`` is one of them if the base is preserved.
        entries: by teacher.
        sizes: all sizes (h, w) in px that images are decoded for.
        size: (h, w) in px of the images that the student receives.
        bf16: whether the run computes in bfloat16.
        load: name -> the live teacher, for code that needs the model itself.
        sources: see `shoulders.teachers.AnyTeachers`.
    """

    fingerprint: Tensor

    def __init__(
        self,
        stores: Mapping[str, TeacherStore],
        entries: Mapping[str, CacheEntry],
        sizes: list[Size],
        size: Size,
        bf16: bool,
        load: Callable[[str], Teacher],
        sources: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(bf16, sources)
        self.stores, self.entries, self._sizes, self.load = dict(stores), dict(entries), sizes, load
        # the pixels of the student are compared with those of one teacher of the same size: the one with most images
        comparable = [store for store in self.stores.values() if store.size == size]
        self.compared = max(comparable, key=lambda store: len(store.index), default=None)
        salts = torch.tensor([store.salt for store in self.stores.values()])
        self.register_buffer("fingerprint", salts)  # in place of weights, where runs are compared

    @property
    def sizes(self) -> list[Size]:
        return self._sizes

    @property
    def render_sizes(self) -> list[Size]:
        return []  # only the student needs pixels

    @property
    def taps(self) -> dict[str, Tap]:
        named = {name: store.codec.taps for name, store in self.stores.items() if name != BASE}
        return {f"{name}/{tap}": shape for name, taps in named.items() for tap, shape in taps.items()}

    def preprocessing(self) -> dict[str, list[list[float]]]:
        return {}  # it is part of the fingerprint

    def provenance(self) -> dict[str, dict[str, str | None]]:
        return {name: entry.provenance for name, entry in self.entries.items() if name != BASE}

    def forward(self, batch: Batch) -> dict[str, Features]:
        """``{"name/tap": Features}`` in float32, on the device of the pixels; those of the base are ``base/layer``.

        Raises:
            DataError: a record is damaged, or the pixels differ from those that the teacher received.
        """
        features: dict[str, Features] = {}
        for name, store in self.stores.items():
            rows = batch.rows_of(self.sources.get(name))
            by_tap, finite = self._read(store, batch if rows is None else batch.take(rows))
            on_device = None if rows is None else rows.to(batch.device, non_blocking=True)
            by_tap = {tap: replace(one, rows=on_device) for tap, one in by_tap.items()}
            if not finite.all():
                by_tap = _without(name, by_tap, torch.from_numpy(finite).to(batch.device))
            features |= {f"{name}/{tap}": one for tap, one in by_tap.items()}
        return features

    def _read(self, store: TeacherStore, batch: Batch) -> tuple[dict[str, Features], NDArray[np.bool_]]:
        """``{tap: Features}`` of a batch, and (B,) whether they are finite."""
        if not len(batch):
            empty = {tap: empty_features(shape, batch.device) for tap, shape in store.codec.taps.items()}
            return empty, np.ones(0, np.bool_)
        features, checksums, finite = store.features(store.index.records_of(batch), batch.device)
        if store is self.compared:
            self._check_pixels(store, checksums, batch)
        return features, finite

    def _check_pixels(self, store: TeacherStore, checksums: list[int | None], batch: Batch) -> None:
        """Compare the pixels of the student with those that the teacher received.

        On a GPU only batches of central views are compared: copying the pixels back would delay training.
        """
        rendered = batch.rendered[store.size]
        if rendered.device.type != "cpu" and not (batch.views == CENTRAL).all():  # type: ignore[union-attr]
            return
        for identity, checksum, pixels in zip(batch.ids.tolist(), checksums, rendered.cpu().numpy(), strict=True):
            if checksum != zlib_ng.crc32(pixels):
                name = store.index.images.collection.name_of_id(identity)
                raise DataError(
                    f"{name!r} has other pixels than when {store.folder} was built (a changed file, or another "
                    f"decoder); remove {store.folder.parent}, then: {store.command}"
                )

    def __getitem__(self, name: str) -> Teacher:
        return self.load(name)


def _without(teacher: str, features: Mapping[str, Features], finite: Tensor) -> dict[str, Features]:
    """Features as live teachers return them, where those of some images are not finite: ``finite`` (B,)."""
    if teacher == BASE:  # the student contains it: its features have to be of all images
        return {tap: one.map(partial(_fill_nan, rows=~finite)) for tap, one in features.items()}
    return {tap: one.keep(finite) for tap, one in features.items()}


def _fill_nan(x: Tensor, rows: Tensor) -> Tensor:
    return x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), torch.nan)


def open_cache(
    recipe: Recipe, extra_teachers: Mapping[str, Teacher], images: ImageSet, bf16: bool, dist: DistContext
) -> CachedTeachers | None:
    """Open the cache of a recipe, or return None if the teachers have to run; all ranks get the same result.

    Args:
        recipe: the recipe.
        extra_teachers: teachers that are not in the recipe, by name.
        images: of the recipe.
        bf16: whether the run computes in bfloat16.
        dist: this process.

    Raises:
        DataError: with ``cache.mode: require``, if the cache is incomplete or was built for something else.
        RecipeError: with ``cache.mode: require``, if the recipe cannot be cached.
    """
    if recipe.cache.path is None or recipe.cache.mode == "off":
        return None
    cached = None
    try:
        cached = _open(recipe, extra_teachers, images, bf16)
    except (DataError, RecipeError) as error:
        if recipe.cache.mode == "require":
            raise
        dist.log(f"running the teachers, not reading the cache: {error}")
    if dist.any(cached is None):
        return None
    dist.log(f"reading the teachers' features from {recipe.cache.path} ({recipe.cache.dtype})")
    return cached


def _open(recipe: Recipe, extra_teachers: Mapping[str, Teacher], images: ImageSet, bf16: bool) -> CachedTeachers:
    path, command = cache_folder(recipe), build_command(recipe)
    entries = cache_entries(recipe, extra_teachers)
    indices = record_indices(recipe, entries, images, num_views(recipe))
    max_open = max(1, MAX_OPEN_FILES // len(entries))
    stores = {
        name: open_store(path / entries[name].folder, fingerprint, command, indices[name], max_open=max_open)
        for name, fingerprint in fingerprints(recipe, entries, images, bf16).items()
    }

    def load(name: str) -> Teacher:
        return extra_teachers[name] if name in extra_teachers else load_teacher(name, recipe.teachers[name])

    sources = {name: images.collection.source_indices(names) for name, names in recipe.teacher_sources.items()}
    size = as_size(recipe.images.size)
    return CachedTeachers(stores, entries, all_sizes(recipe, entries), size, bf16, load, sources)

"""Teachers out of a cache: asked like live ones, ``{"name/tap": Features}`` of a batch."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zlib_ng import zlib_ng

from shoulders.config.recipe import Cache, Recipe, as_size
from shoulders.distributed.context import DistContext
from shoulders.errors import DataError, RecipeError
from shoulders.feature_cache import store
from shoulders.feature_cache.channels import load_channels
from shoulders.feature_cache.codec import Codec
from shoulders.feature_cache.fingerprint import Asked, Fields, Size, asked_of, differences, fingerprints, sizes_of
from shoulders.feature_cache.index import Index, Numbers
from shoulders.features import CENTRAL, Batch, Features
from shoulders.images import ImageSet
from shoulders.teachers import AnyTeachers, Tap, Teacher, load_teacher
from shoulders.teachers.teacher import empty_features
from shoulders.transfer.losses import BASE

AT_ONCE = 2**20  # bytes that are read, checked and decoded before the next: about what a core's own memory holds


class TeacherStore:
    """What one teacher says, on disk.

    Args:
        folder: of this teacher.
        fingerprint: what the features must depend on.
        command: that makes the cache, for messages.
        index: of the images that this teacher is asked about.
        whole: refuse one that is not finished; else its finished shards can be read.

    Raises:
        DataError: not there, not finished, damaged, or made for something else.
    """

    def __init__(self, folder: Path, fingerprint: Fields, command: str, index: Index, whole: bool = True) -> None:
        self.folder, self.command, self.index = folder, command, index
        if not (folder / store.PLAN).exists():
            raise DataError(f"{folder}: no cache of this teacher is here; make it with: {command}")
        self.plan = store.read_json(folder / store.PLAN)
        check_fingerprint(folder, self.plan.get("fingerprint", {}), fingerprint)
        self.codec = open_codec(folder, self.plan)
        self.salt = store.salt_of(fingerprint)
        self.shards = store.Shards(folder, self.codec.bytes + store.TRAILER, self.plan["shards"])
        height, width = fingerprint["size"]
        self.size: Size = (height, width)
        if whole:
            self._check_whole()

    def _check_whole(self) -> None:
        if not (self.folder / store.MANIFEST).exists():
            needed = self.shards.needed
            done = sum(map(self.shards.has, needed))
            raise DataError(f"{self.folder}: {done} of {len(needed)} shards are there; finish it with: {self.command}")
        self.manifest = store.read_json(self.folder / store.MANIFEST)
        for shard in self.shards.needed:
            if not self.shards.has(shard):
                raise DataError(f"{self.shards.path(shard)}: missing, or of another size; make it anew: {self.command}")

    def told(self, numbers: Numbers, device: torch.device) -> tuple[dict[str, Features], list[int | None]]:
        """``{tap: Features}`` of records (B,), and the crc32 of the pixels of each.

        Raises:
            DataError: as `records`.
        """
        few = len(numbers) if device.type == "cuda" else max(1, AT_ONCE // self.shards.record)
        seen: list[int | None] = []

        def parts() -> Iterator[Tensor]:
            for start in range(0, len(numbers), few):
                records = self.records(numbers[start : start + few])
                seen.extend(store.pixels_seen(records.numpy()))
                yield records.to(device, non_blocking=True)

        return self.codec.decode_parts(parts(), len(numbers)), seen

    def records(self, numbers: Numbers, absent_too: bool = False) -> Tensor:
        """Records (B, bytes) uint8, each checked against its checksum.

        Args:
            absent_too: also those that only say that their image could not be decoded.

        Raises:
            DataError: one is damaged, says that its image could not be decoded, or is not there.
        """
        shape = (len(numbers), self.shards.record)
        if torch.cuda.is_available():
            records = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            records = torch.from_numpy(np.empty(shape, np.uint8))  # in huge pages
        keys = self.index.keys(numbers)
        for record, key, (shard, row) in zip(records.numpy(), keys, self.shards.where(numbers), strict=True):
            self.shards.read(shard, row, record)
            if not store.is_sound(record, key, self.salt):
                raise DataError(
                    f"{self.shards.path(shard)}: record {row} is damaged; remove this file, then: {self.command}"
                )
        if not absent_too and None in (seen := store.pixels_seen(records.numpy())):
            name = self.index.images.collection.name_of_id(keys[seen.index(None)][0])
            raise DataError(
                f"{name!r} could not be decoded when {self.folder} was made; remove {self.folder.parent}, then: "
                f"{self.command}"
            )
        return records


def check_fingerprint(folder: Path, old: Fields, new: Fields) -> None:
    """Refuse features of something else.

    Raises:
        DataError: naming every field that differs.
    """
    found = differences(old, new)
    if found:
        raise DataError(
            f"{folder}: made for something else: {'; '.join(found)}; make another one with: shoulders cache RECIPE "
            f"cache.path=OTHER, or remove {folder} first"
        )


def open_codec(folder: Path, plan: Mapping[str, Any]) -> Codec:
    """How the records of a folder are laid out, with what is done to its channels.

    Raises:
        DataError: that is damaged.
    """
    how = plan["fingerprint"]
    cache = Cache(dtype=how["cache.dtype"], pool=how["cache.pool"], pca=how["cache.pca"])
    taps = {tap: Tap(facts[0], facts[1], (facts[2], facts[3])) for tap, facts in plan["taps"]}
    if plan["channels"] is None:
        return Codec(taps, cache)
    path = folder / store.CHANNELS
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != plan["channels"]:
        raise DataError(f"{path}: missing or damaged; remove {folder} and make it anew")
    return Codec(taps, cache, load_channels(path, data))


class CachedTeachers(AnyTeachers):
    """Teacher features read from a cache; no teacher is loaded, and no pixel is needed.

    Args:
        stores: by teacher; ``base`` among them where the base is to be preserved.
        asked: by teacher, as the recipe says.
        sizes: all that images are decoded for; ``size``: the student's.
        bf16: whether the run computes in bfloat16.
        load: name -> the live teacher, for code that needs the model itself.
        sources: see `shoulders.teachers.AnyTeachers`.
    """

    fingerprint: Tensor

    def __init__(
        self,
        stores: Mapping[str, TeacherStore],
        asked: Mapping[str, Asked],
        sizes: list[Size],
        size: Size,
        bf16: bool,
        load: Callable[[str], Teacher],
        sources: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(bf16, sources)
        self.stores, self.asked, self._sizes, self.load = dict(stores), dict(asked), sizes, load
        for shelf in self.stores.values():
            shelf.shards.most = max(1, store.MOST_OPEN // len(self.stores))
        # one that saw images at the very size that the student sees them at, if there is one, and as many as possible
        seeing = [shelf for shelf in self.stores.values() if shelf.size == size]
        self.seeing = max(seeing, key=lambda shelf: len(shelf.index), default=None)
        salts = torch.tensor([shelf.salt for shelf in self.stores.values()])
        self.register_buffer("fingerprint", salts)  # stands for the weights, wherever those are compared

    @property
    def sizes(self) -> list[Size]:
        return self._sizes

    @property
    def render_sizes(self) -> list[Size]:
        return []  # the pixels of the student alone are needed

    @property
    def taps(self) -> dict[str, Tap]:
        named = {name: shelf.codec.taps for name, shelf in self.stores.items() if name != BASE}
        return {f"{name}/{tap}": facts for name, taps in named.items() for tap, facts in taps.items()}

    def preprocessing(self) -> dict[str, list[list[float]]]:
        return {}  # the fingerprints of the caches record it

    def provenance(self) -> dict[str, dict[str, str | None]]:
        return {name: asked.whose for name, asked in self.asked.items() if name != BASE}

    def forward(self, batch: Batch) -> dict[str, Features]:
        """``{"name/tap": Features}`` in float32, on the device of the batch's pixels; ``base/latent`` among them.

        Raises:
            DataError: a record is damaged, or the pixels are not those that the teacher's features were computed from.
        """
        features: dict[str, Features] = {}
        for name, shelf in self.stores.items():
            rows = batch.rows_of(self.sources.get(name))
            by_tap = self._read(shelf, batch if rows is None else batch.take(rows))
            on_device = None if rows is None else rows.to(batch.device, non_blocking=True)
            features |= {f"{name}/{tap}": replace(one, rows=on_device) for tap, one in by_tap.items()}
        return features

    def _read(self, shelf: TeacherStore, batch: Batch) -> dict[str, Features]:
        if not len(batch):
            return {tap: empty_features(shape, batch.device) for tap, shape in shelf.codec.taps.items()}
        features, checksums = shelf.told(shelf.index.of(batch), batch.device)
        if shelf is self.seeing:
            self._check_pixels(shelf, checksums, batch)
        return features

    def _check_pixels(self, shelf: TeacherStore, seen: list[int | None], batch: Batch) -> None:
        """The student must see what the teacher saw. Pixels on a GPU are only asked for in evaluation, which waits."""
        drawn = batch.rendered[shelf.size]
        if drawn.device.type != "cpu" and not (batch.views == CENTRAL).all():  # type: ignore[union-attr]
            return
        for identity, checksum, pixels in zip(batch.ids.tolist(), seen, drawn.cpu().numpy(), strict=True):
            if checksum != zlib_ng.crc32(pixels):
                name = shelf.index.images.collection.name_of_id(identity)
                raise DataError(
                    f"{name!r} does not look as it did when {shelf.folder} was made (a changed file, or another "
                    f"decoder); remove {shelf.folder.parent}, then: {shelf.command}"
                )

    def __getitem__(self, name: str) -> Teacher:
        return self.load(name)


def open_cache(
    recipe: Recipe, extra_teachers: Mapping[str, Teacher], images: ImageSet, bf16: bool, dist: DistContext
) -> CachedTeachers | None:
    """The teachers of a recipe out of its cache, or None where they are to be asked live; the same on all ranks.

    Raises:
        DataError: with ``cache.mode: require``, where the cache is not whole or does not fit.
        RecipeError: with ``cache.mode: require``, where a recipe cannot be cached.
    """
    if recipe.cache.path is None or recipe.cache.mode == "off":
        return None
    cached = None
    try:
        cached = _open(recipe, dict(extra_teachers), images, bf16)
    except (DataError, RecipeError) as error:
        if recipe.cache.mode == "require":
            raise
        dist.log(f"asking the teachers live, not from the cache: {error}")
    if dist.any(cached is None):
        return None
    dist.log(f"teachers out of {recipe.cache.path} ({recipe.cache.dtype})")
    return cached


def _open(recipe: Recipe, extra_teachers: dict[str, Teacher], images: ImageSet, bf16: bool) -> CachedTeachers:
    path, views = folder_of(recipe), views_of(recipe)
    asked = asked_of(recipe, extra_teachers)
    prints = fingerprints(recipe, asked, images, bf16)
    indices = indices_of(recipe, prints, images, views)
    stores = {
        name: TeacherStore(path / asked[name].folder, fields, command(recipe), indices[name])
        for name, fields in prints.items()
    }

    def load(name: str) -> Teacher:
        return extra_teachers[name] if name in extra_teachers else load_teacher(name, recipe.teachers[name])

    sources = {name: images.collection.source_indices(names) for name, names in recipe.teacher_sources.items()}
    return CachedTeachers(stores, asked, sizes_of(recipe, asked), as_size(recipe.images.size), bf16, load, sources)


def indices_of(recipe: Recipe, names: Iterable[str], images: ImageSet, views: int) -> dict[str, Index]:
    """The index of the images that each teacher is asked about."""
    every = Index(images, views)
    return {
        name: Index(images, views, recipe.teacher_sources[name]) if name in recipe.teacher_sources else every
        for name in names
    }


def folder_of(recipe: Recipe) -> Path:
    """Where the recipe's cache lies.

    Raises:
        RecipeError: it has none.
    """
    if recipe.cache.path is None:
        raise RecipeError("cache.path: none; give cache.path=FOLDER on the command line, or path: in the recipe")
    return recipe.cache.path


def views_of(recipe: Recipe) -> int:
    """The number of views of each image.

    Raises:
        RecipeError: there is no end of them.
    """
    if recipe.images.views == "fresh":
        raise RecipeError("images.views: fresh views never end, so they cannot be cached; give a number, such as 4")
    return recipe.images.views


def command(recipe: Recipe) -> str:
    """What makes the cache of a recipe, whichever changes to its file it was read with."""
    how = recipe.cache.model_dump(mode="json", exclude_defaults=True, exclude={"mode"})
    told = {f"cache.{key}": value for key, value in how.items()} | {"images.views": recipe.images.views}
    return " ".join(["shoulders cache RECIPE", *(shlex.quote(f"{key}={value}") for key, value in told.items())])

"""What the cache of a recipe consists of, and which of its shards are missing."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from shoulders.config.recipe import Recipe
from shoulders.distributed.device import this_device, use_bf16
from shoulders.errors import RecipeError
from shoulders.feature_cache.fingerprint import all_sizes, cache_entries, fingerprints
from shoulders.feature_cache.index import Numbers, RecordIndex
from shoulders.feature_cache.metadata import LAYOUT, MANIFEST, read_json
from shoulders.feature_cache.teacher_runner import TeacherRunner
from shoulders.feature_cache.teacher_store import TeacherStore, check_fingerprint, open_store
from shoulders.features import Batch
from shoulders.images import ImageSet, listed_batches, open_images
from shoulders.teachers import Teacher
from shoulders.training.preflight import check_inputs

SHARD_RECORDS = 256


class CacheSpec:
    """The teachers, records and shards of the cache of a recipe.

    Args:
        recipe: with a cache.path and a number of views.
        extra_teachers: teachers that are not in the recipe, by name.
        shard_records: number of records in a shard.

    Attributes:
        path: folder of the cache.
        images: of the recipe.
        fingerprints: by teacher.
        folders: by teacher.
        sizes: all (h, w) in px that teachers and student receive.
        indices: of the records by teacher.
        index: of the records of a teacher that learns from all images; views are drawn by it.
        num_shards: of such a teacher.
        counts: by teacher, the number of records in each shard.

    Raises:
        RecipeError: the recipe cannot be cached.
        DataError: the folder holds a cache of something else; it stays as it is.
    """

    def __init__(
        self, recipe: Recipe, extra_teachers: Mapping[str, Teacher], shard_records: int = SHARD_RECORDS
    ) -> None:
        self.recipe, self.extra_teachers, self.shard_records = recipe, dict(extra_teachers), shard_records
        check_inputs(recipe, self.extra_teachers)
        self.path, views = cache_folder(recipe), num_views(recipe)
        self.images = open_images(recipe.images, recipe.train.seed)
        entries = cache_entries(recipe, self.extra_teachers)
        self.device = this_device(int(os.environ.get("LOCAL_RANK", "0")))
        self.bf16 = use_bf16(recipe.train.precision, self.device)
        self.fingerprints = fingerprints(recipe, entries, self.images, self.bf16)
        self.folders = {name: self.path / entry.folder for name, entry in entries.items()}
        self.sizes = all_sizes(recipe, entries)
        self.indices = record_indices(recipe, entries, self.images, views)
        self.index = RecordIndex(self.images, views)
        self.num_shards = -(-len(self.index) // shard_records)
        self.counts = {name: self._count(index) for name, index in self.indices.items()}
        for name in self.fingerprints:
            self._check_layout(name)

    def has_layout(self, name: str) -> bool:
        """Whether the layout of a teacher's records has been decided."""
        return (self.folders[name] / LAYOUT).exists()

    def unfinished(self) -> list[str]:
        """The teachers without a complete cache."""
        return [
            name
            for name in self.fingerprints
            if not (self.folders[name] / MANIFEST).exists() or self.missing_shards(name)
        ]

    def missing_shards(self, name: str) -> list[int]:
        """The shards of a teacher that do not exist yet."""
        if not self.has_layout(name):
            return [shard for shard, count in enumerate(self.counts[name]) if count]
        shards = self.store(name).shards
        return [shard for shard in range(self.num_shards) if not shards.is_complete(shard)]

    def missing_by_shard(self, names: Iterable[str]) -> dict[int, list[str]]:
        """The missing shards of some teachers, each with the teachers that lack it."""
        missing: dict[int, list[str]] = {}
        for name in names:
            for shard in self.missing_shards(name):
                missing.setdefault(shard, []).append(name)
        return dict(sorted(missing.items()))

    def missing_records(self, name: str) -> int:
        """Number of records in the missing shards of a teacher."""
        return sum(self.counts[name][shard] for shard in self.missing_shards(name))

    def shard_range(self, shard: int) -> range:
        """The records of a shard of a teacher that learns from all images."""
        first = shard * self.shard_records
        return range(first, min(first + self.shard_records, len(self.index)))

    def store(self, name: str) -> TeacherStore:
        """The records of a teacher that exist, once their layout has been decided."""
        command = build_command(self.recipe)
        return open_store(self.folders[name], self.fingerprints[name], command, self.indices[name], complete=False)

    def load_runner(self, name: str) -> TeacherRunner:
        """Load a teacher."""
        return TeacherRunner(name, self.recipe, self.extra_teachers, self.bf16, self.device)

    def draw(self, index: RecordIndex, parts: Iterable[Numbers]) -> Iterator[Batch]:
        """A batch of views for each part (B,) of the records of an index, rendered at the sizes of all teachers."""
        views = (index.views_of(numbers) for numbers in parts)
        return listed_batches(self.images, views, self.sizes, self.recipe.images, self.recipe.train.seed)

    def _count(self, index: RecordIndex) -> list[int]:
        """Number of a teacher's records in each shard: fewer if it learns from some sources only."""
        rows = np.arange(len(self.index))
        if index.sources is not None:
            rows, _ = index.select(self.index.views_of(rows))
        return np.bincount(rows // self.shard_records, minlength=self.num_shards).tolist()

    def _check_layout(self, name: str) -> None:
        if self.has_layout(name):
            folder = self.folders[name]
            layout = read_json(folder / LAYOUT)
            check_fingerprint(folder, layout.get("fingerprint", {}), self.fingerprints[name])


def cache_folder(recipe: Recipe) -> Path:
    """The folder of the recipe's cache.

    Raises:
        RecipeError: the recipe has none.
    """
    if recipe.cache.path is None:
        raise RecipeError("cache.path: none; give cache.path=FOLDER on the command line, or path: in the recipe")
    return recipe.cache.path


def num_views(recipe: Recipe) -> int:
    """The number of views of each image.

    Raises:
        RecipeError: the views are fresh in every epoch.
    """
    if recipe.images.views == "fresh":
        raise RecipeError("images.views: fresh views never repeat, so they cannot be cached; give a number, such as 4")
    return recipe.images.views


def record_indices(recipe: Recipe, names: Iterable[str], images: ImageSet, views: int) -> dict[str, RecordIndex]:
    """The index of the records of each teacher: of all images, or of those of its sources."""
    all_images = RecordIndex(images, views)
    sources = recipe.teacher_sources
    return {name: RecordIndex(images, views, sources[name]) if name in sources else all_images for name in names}


def build_command(recipe: Recipe) -> str:
    """The command that builds the cache of a recipe, with all settings of the cache as overrides."""
    settings = recipe.cache.model_dump(mode="json", exclude_defaults=True, exclude={"mode"})
    overrides = {f"cache.{key}": value for key, value in settings.items()} | {"images.views": recipe.images.views}
    return " ".join(["shoulders cache RECIPE", *(shlex.quote(f"{key}={value}") for key, value in overrides.items())])

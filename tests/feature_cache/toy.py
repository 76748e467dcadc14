"""Caches that are built in milliseconds: toy teachers, few images, shards of a few records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.config.recipe import Recipe
from shoulders.distributed.context import DistContext
from shoulders.feature_cache import BuildSettings, build_cache
from shoulders.feature_cache.build import Builder
from shoulders.feature_cache.spec import CacheSpec
from shoulders.features import Features
from shoulders.teachers import Teacher
from tests.tiny import save_base, save_images, tiny_recipe

SMALL_SHARDS = BuildSettings(shard_records=8, batch=4, poll_s=0.02)
SINGLE_PROCESS = DistContext(0, 1, torch.device("cpu"))


class Colours(nn.Module):
    """Mean colours of an image and of its patches, in ``width`` channels."""

    mix: Tensor

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(width)
        self.register_buffer("mix", torch.randn(3, width, generator=generator) * scale)

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        maps = nn.functional.avg_pool2d(pixels, 4)
        spatial = maps.flatten(2).transpose(1, 2) @ self.mix
        return {
            "mean": Features(pixels.mean((2, 3)) @ self.mix, None),
            "map": Features(None, spatial, (maps.shape[2], maps.shape[3])),
        }


def teachers() -> dict[str, Teacher]:
    """Two teachers of different sizes."""
    return {"small": Teacher(Colours(4), size=(16, 16)), "large": Teacher(Colours(6, 20.0), size=(24, 24))}


def toy_recipe(root: Path, cache: Path, **changes: Any) -> Recipe:
    """A recipe over the images of `save_toy_world`, without teachers; the base is not needed.

    Args:
        root: of the world.
        cache: the folder of the cache.
        changes: ``section__key=value``.
    """
    settings: dict[str, Any] = {
        "student__adapter": None,
        "teachers": {},
        "images__size": 16,
        "images__views": 1,
        "images__holdout": 8,
        "transfer": {"preserve": 0.0},
        "train": {"precision": "fp32"},
        "cache": {"path": str(cache), "dtype": "int8", "mode": "require"},
    }
    return tiny_recipe(root, "out", **settings | changes)


def save_toy_world(root: Path, images: int = 24) -> Path:
    """A base and images."""
    save_base(root / "base")
    save_images(root / "images", images)
    return root


def build(
    recipe: Recipe, extra_teachers: Mapping[str, Teacher] | None = None, settings: BuildSettings = SMALL_SHARDS
) -> dict[str, Any]:
    """Build a cache of `teachers`, or of others."""
    return build_cache(
        recipe, extra_teachers=teachers() if extra_teachers is None else extra_teachers, settings=settings
    )


def toy_spec(recipe: Recipe, extra_teachers: Mapping[str, Teacher] | None = None) -> CacheSpec:
    return CacheSpec(recipe, teachers() if extra_teachers is None else extra_teachers, SMALL_SHARDS.shard_records)


def toy_builder(recipe: Recipe, log: Any = print) -> Builder:
    return Builder(toy_spec(recipe), SMALL_SHARDS, log)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

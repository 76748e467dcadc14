"""Caches small enough to be built a hundred times in a test: toy teachers, few images, shards of a few records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoulders.config.recipe import Recipe, check_recipe
from shoulders.distributed.context import DistContext
from shoulders.feature_cache import build_cache
from shoulders.feature_cache.build import Builder
from shoulders.feature_cache.read import TeacherStore
from shoulders.features import Features
from shoulders.teachers import Teacher
from tests.tiny import save_base, save_images

SHARD = 8  # records
HERE = DistContext(0, 1, torch.device("cpu"))


class Colours(nn.Module):
    """Mean colours of an image and of its parts, in ``width`` channels."""

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
    """A recipe over 24 images and no teacher of its own; the base is never asked."""
    tree: dict[str, Any] = {
        "student": {"base": str(root / "base")},
        "images": {"path": str(root / "images"), "size": 16, "views": 1, "holdout": 8, "workers": 0},
        "transfer": {"preserve": 0.0},
        "train": {"precision": "fp32"},
        "cache": {"path": str(cache), "dtype": "int8", "mode": "require"},
        "out": str(root / "out"),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = tree[section] | {name: value}
    return check_recipe(tree)


def save_toy_world(root: Path, images: int = 24) -> Path:
    """A base and images."""
    save_base(root / "base")
    save_images(root / "images", images)
    return root


def build(recipe: Recipe, own: Mapping[str, Teacher] | None = None) -> dict[str, Any]:
    return build_cache(recipe, extra_teachers=teachers() if own is None else own)


def shelves(recipe: Recipe, own: Mapping[str, Teacher] | None = None) -> tuple[list[TeacherStore], Builder]:
    """A finished cache, opened."""
    builder = Builder(recipe, teachers() if own is None else own, print)
    prints, indices = builder.prints.items(), builder.indices
    return [TeacherStore(builder.folders[name], fields, "make it", indices[name]) for name, fields in prints], builder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def few_records(patch: pytest.MonkeyPatch) -> None:
    """Shards of a few records, so that a toy has several."""
    patch.setattr("shoulders.feature_cache.build.SHARD_RECORDS", SHARD)
    patch.setattr("shoulders.feature_cache.build.BATCH", SHARD // 2)
    patch.setattr("shoulders.feature_cache.build.WAIT_S", 0.02)

"""The variants: what one step of each is, on random weights and random images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from plain import Plain

from shoulders.config.recipe import Recipe, check_recipe
from shoulders.distillation import Trainer, prepare
from shoulders.distributed.context import DistContext
from shoulders.distributed.device import this_device
from shoulders.feature_cache import CachedTeachers, build_cache
from shoulders.features import Batch
from shoulders.training.optimizers import Optimizers
from shoulders.training.step import TrainStep
from shoulders.transfer.losses import BASE

SIZE, IMAGES, HIDDEN = 224, 64, 960  # px; images of the cache; width of projectors: 101 M trainable parameters in all
VIT_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": SIZE}
VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
MODELS: dict[str, Callable[[], Any]] = {
    "student": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT_S), add_pooling_layer=False),
    "base": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT_B), add_pooling_layer=False),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT_B), add_pooling_layer=False),
    "clip": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**VIT_B, intermediate_size=3072, patch_size=16)
    ),
    "dino": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VIT_B, patch_size=14)),
    "siglip": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**VIT_B, intermediate_size=3072, patch_size=16)
    ),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**VIT_B), add_pooling_layer=False),
}
TEACHERS = ("vit", "clip", "dino", "siglip", "deit")  # the first three, unless a variant says how many

LADDER = {"layers": [*(f"block{i}" for i in range(11)), "latent"], "projector_width": HIDDEN}
LEAN = {"projector_width": HIDDEN}
NARROW = {"projector_width": 512}  # the side network contains an MLP already
INSIDE = {"kind": "bottleneck", "width": 64}
SIDE = {"kind": "side", "width": 192, "blocks": 4}

# name: whether the whole student is trained, its adapter, its projectors, what is read from the cache, the number of
# teachers; forward: only the forward pass of the teachers
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain_bf16": {},
    "teachers": {"whole": True, "transfer": LEAN, "forward": True},
    "online": {"whole": True, "transfer": LADDER},
    "online_int8": {"whole": True, "transfer": LADDER, "int8": True},
    "online_lean": {"whole": True, "transfer": LEAN},
    "cached": {"whole": True, "transfer": LADDER, "cached": "teachers"},
    "cached_lean": {"whole": True, "transfer": LEAN, "cached": "teachers"},
    **{
        f"cached_lean_{count}": {"whole": True, "transfer": LEAN, "cached": "teachers", "teachers": count}
        for count in (1, 2, 4, 5)
    },
    "bottleneck_online": {"adapter": INSIDE, "transfer": LEAN},
    "bottleneck_cached": {"adapter": INSIDE, "transfer": LEAN, "cached": "teachers"},
    "side_online": {"adapter": SIDE, "transfer": NARROW},
    "side_targets_cached": {"adapter": SIDE, "transfer": NARROW, "cached": "teachers"},
    "side_cached": {"adapter": SIDE, "transfer": NARROW, "cached": "all"},
}


def write_world(folder: Path) -> None:
    """Random models and images, once for all variants."""
    for name, make in MODELS.items():
        if not (folder / name).exists():
            torch.manual_seed(0)
            make().save_pretrained(folder / name)
    if (folder / "images" / "done").exists():
        return
    (folder / "images").mkdir(exist_ok=True)
    dice = np.random.default_rng(0)
    for i in range(IMAGES + 8):
        Image.fromarray(dice.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    (folder / "images" / "done").touch()


def recipe_of(variant: str, folder: Path, batch: int) -> Recipe:
    """The recipe of one of the library's variants."""
    how = VARIANTS[variant]
    base = "student" if how.get("whole") else "base"
    cached = {"path": str(folder / "cache"), "dtype": "int8", "mode": "require" if "cached" in how else "off"}
    return check_recipe(
        {
            "student": {"base": str(folder / base), "adapter": how.get("adapter", {"kind": "bottleneck", "width": 1})},
            "teachers": {
                name: {"model": str(folder / name), "size": SIZE, "int8": "int8" in how}
                for name in TEACHERS[: how.get("teachers", 3)]
            },
            "images": {"path": str(folder / "images"), "size": SIZE, "workers": 0, "views": 1, "holdout": 8},
            "transfer": {
                "standardize": "channel",
                "cosine_weight": 0.5,
                "t2s": "none",
                "preserve": 0,
                **how["transfer"],
            },
            "train": {"batch": batch, "steps": 1000, "optimizer": "adamw"},
            "cache": cached,
            "out": str(folder / "run"),
        }
    )


def write_cache(variant: str, folder: Path) -> None:
    """Build the cache that a cached variant reads."""
    if "cached" in VARIANTS[variant]:
        build_cache(recipe_of(variant, folder, 8))


def job(variant: str, folder: Path, batch: int) -> Callable[[], object]:
    """A function that runs one step of a variant."""
    device = this_device()
    if variant.startswith("plain"):
        models = {name: type(MODELS[name]()).from_pretrained(folder / name) for name in ("student", *TEACHERS[:3])}
        plain = Plain(models.pop("student"), models, HIDDEN, bf16=variant == "plain_bf16").to(device)
        return partial(plain.step, torch.randn(batch, 3, SIZE, SIZE, device=device))
    trainer = prepare(recipe_of(variant, folder, batch), {}, DistContext(0, 1, device))
    settings = VARIANTS[variant]
    (images,) = trainer.batches.training(0, 1)
    if settings.get("forward"):
        return partial(trainer.teachers, images)
    step = trainer.step
    if settings.get("cached") == "teachers" and isinstance(trainer.teachers, CachedTeachers):
        step = replace(step, teachers=without_base(trainer.teachers))
    return whole_student(trainer, step, images) if settings.get("whole") else partial(step, 1, images)


def without_base(teachers: CachedTeachers) -> CachedTeachers:
    """The same cached teachers; the base is run, not read from the cache."""
    stores = {name: store for name, store in teachers.stores.items() if name != BASE}
    size = (SIZE, SIZE)
    return CachedTeachers(stores, teachers.entries, teachers.sizes, size, teachers.bf16, teachers.load)


def whole_student(trainer: Trainer, step: TrainStep, images: Batch) -> Callable[[], object]:
    """A step that trains the whole student without an adapter: a student that is trained from scratch."""
    encoder = trainer.student.encoder
    encoder.adapter.requires_grad_(False)
    encoder.base.requires_grad_(True)
    whole = replace(step, optimizers=Optimizers(trainer.module, trainer.recipe.train))

    def run() -> None:
        with encoder.adapters_disabled():
            whole(1, images)

    return run

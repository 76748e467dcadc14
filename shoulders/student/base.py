"""The base: which pretrained models can carry a student, and how one is checked and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import transformers

from shoulders.config.recipe import as_size
from shoulders.config.student import Conv, Side, Student
from shoulders.errors import RecipeError
from shoulders.hub import (
    HALF,
    IMAGENET,
    Preprocessing,
    Pretrained,
    check_weights,
    license_of,
    load_strict,
    open_pretrained,
    read_config,
    read_preprocessing,
)
from shoulders.student.encoder import BASES
from shoulders.student.kinds import places_read

# full image-text checkpoints: the base is the image tower that this part of the config describes
TOWERS = {"siglip": "vision_config"}
# normalisation of those that were not trained with ImageNet's, where a folder does not state its own
STATS = {"siglip_vision_model": HALF, "vit": HALF}


@dataclass(frozen=True)
class Base:
    """A loaded base.

    Args:
        model: in float32, in evaluation mode.
        preprocessing: its own pixel normalisation.
        license: as its card states it, or "unknown".
        revision: the commit that a hub id was resolved to; None for a folder.
    """

    model: transformers.PreTrainedModel
    preprocessing: Preprocessing
    license: str
    revision: str | None


def check_base(spec: Student, size: tuple[int, int], layers: Sequence[str] = ()) -> None:
    """What can be known before weights load: the family is supported, the size fits its patches, the places exist.

    Args:
        size: (h, w) in px that the student is trained at.
        layers: places that the projectors are to read.

    Raises:
        RecipeError: one line with the fix.
    """
    pretrained, config = _open(spec)
    _preprocessing(pretrained, config)
    patch = config.patch_size
    if any(side % patch or side < patch for side in size):
        legal = tuple(max(patch, round(side / patch) * patch) for side in size)
        raise RecipeError(
            f"images.size: {size} is not a multiple of the base's patch size {patch}; the nearest is {legal}"
        )
    _places_beside(spec, config.num_hidden_layers)
    places = ["latent", *(f"block{i}" for i in range(config.num_hidden_layers))]
    unknown = [place for place in layers if place not in places]
    if unknown:
        raise RecipeError(
            f"transfer.layers: no place {unknown[0]!r} in {spec.base!r}; it has latent, block0 .. {places[-1]}"
        )


def load_base(spec: Student) -> Base:
    """The pretrained base with its own normalisation.

    Raises:
        RecipeError: the recipe's base cannot work; see :func:`check_base`.
        DataError: if a weight is missing, or the weights are broken.
    """
    pretrained, config = _open(spec)
    family = BASES[config.model_type]
    model = load_strict(pretrained, getattr(transformers, family.model), config, **family.build)
    return Base(model.eval(), _preprocessing(pretrained, config), license_of(pretrained), pretrained.revision)


def read_base(spec: Student) -> tuple[Pretrained, Preprocessing]:
    """What is known of a base before its weights: where its files are, and its own pixel normalisation.

    Raises:
        RecipeError: as `check_base`.
    """
    pretrained, config = _open(spec)
    return pretrained, _preprocessing(pretrained, config)


def asked_of_base(spec: Student, layers: Sequence[str], preserve: bool) -> tuple[str, ...]:
    """The places at which a run asks the base itself, before its weights are loaded: as ``ShouldersModel.asks``.

    Args:
        layers: places that the projectors read.
        preserve: whether the base is a teacher.

    Raises:
        RecipeError: as `check_base`.
    """
    beside = _places_beside(spec, _open(spec)[1].num_hidden_layers)
    kept = ("latent",) if preserve else ()
    return tuple(dict.fromkeys((*kept, *beside, *(("latent", *layers) if beside else ()))))


def _places_beside(spec: Student, depth: int) -> tuple[str, ...]:
    """What an adapter beside a base of ``depth`` blocks layers of it; one inside it layers nothing."""
    try:
        return places_read(depth, spec.adapter.blocks or []) if isinstance(spec.adapter, Side | Conv) else ()
    except ValueError as error:
        raise RecipeError(f"student.adapter.blocks: {error}; {spec.base!r} has {depth}") from error


def _open(spec: Student) -> tuple[Pretrained, transformers.PreTrainedConfig]:
    """The base's files and the config of its image encoder, after the checks that need no size."""
    pretrained = open_pretrained("student.base", spec.base, spec.revision)
    kind = pretrained.tree.get("model_type")
    if kind not in (*BASES, *TOWERS):
        allowed = ", ".join(sorted([*BASES, *TOWERS]))
        raise pretrained.fault(f"is of model type {kind!r}, which cannot carry a student; a base is one of {allowed}")
    config = read_config(pretrained)
    config = getattr(config, TOWERS[kind]) if kind in TOWERS else config
    if why := _unfit(config):
        raise pretrained.fault(f"cannot carry a student: {why}")
    check_weights(pretrained)
    return pretrained, config


def _unfit(config: transformers.PreTrainedConfig) -> str:
    """Why a model of a family that can carry a student cannot, or ""."""
    if config.num_channels != 3:
        return f"it takes {config.num_channels} channels; images have red, green and blue"
    if not getattr(config, "vision_use_head", True):
        return "it has no pooling head (vision_use_head: false), and so no vector for the whole image"
    if not isinstance(config.patch_size, int):
        return f"its config says patch_size {config.patch_size}; a single number is known here"
    h, w = as_size(config.image_size)
    return "" if h == w else f"it was made for images of {h} x {w} px; position tables of square ones alone are resized"


def _preprocessing(pretrained: Pretrained, config: transformers.PreTrainedConfig) -> Preprocessing:
    stats = STATS.get(config.model_type, IMAGENET)
    return read_preprocessing(pretrained, Preprocessing(as_size(config.image_size), *stats))

"""Loading the base of a student, and refusing models that cannot be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import transformers

from shoulders.config.section import as_size
from shoulders.config.student import Conv, Side, Student
from shoulders.errors import RecipeError
from shoulders.hub import (
    Preprocessing,
    Pretrained,
    check_weights,
    load_strict,
    open_pretrained,
    read_config,
    read_license,
    read_preprocessing,
)
from shoulders.student.families import BASES, IMAGE_CONFIGS
from shoulders.student.kinds import select_input_layers


@dataclass(frozen=True)
class Base:
    """A loaded base.

    Args:
        model: in float32, in evaluation mode.
        preprocessing: its own pixel normalisation.
        license: as its model card states it, or "unknown".
        revision: the commit that a hub id was resolved to; None for a folder.
    """

    model: transformers.PreTrainedModel
    preprocessing: Preprocessing
    license: str
    revision: str | None


def check_base(spec: Student, size: tuple[int, int], layers: Sequence[str] = ()) -> None:
    """Check a base without loading its weights: its family, the image size against its patches, the layers.

    Args:
        spec: the student of a recipe.
        size: (h, w) in px that the student is trained at.
        layers: layers that the projectors take as input.

    Raises:
        RecipeError: one line with the fix.
    """
    pretrained, config = _open_base(spec)
    _read_preprocessing(pretrained, config)
    patch = config.patch_size
    if any(side % patch or side < patch for side in size):
        nearest = tuple(max(patch, round(side / patch) * patch) for side in size)
        raise RecipeError(
            f"images.size: {size} is not a multiple of the base's patch size {patch}; the nearest is {nearest}"
        )
    _adapter_input_layers(spec, config.num_hidden_layers)
    known = ["latent", *(f"block{i}" for i in range(config.num_hidden_layers))]
    unknown = [layer for layer in layers if layer not in known]
    if unknown:
        raise RecipeError(
            f"transfer.layers: {spec.base!r} has no layer {unknown[0]!r}; it has latent, block0 .. {known[-1]}"
        )


def load_base(spec: Student) -> Base:
    """Load the pretrained base.

    Raises:
        RecipeError: the recipe's base cannot work; see :func:`check_base`.
        DataError: if a weight is missing, or the weights are broken.
    """
    pretrained, config = _open_base(spec)
    family = BASES[config.model_type]
    model = load_strict(pretrained, getattr(transformers, family.model), config, **family.build)
    return Base(model.eval(), _read_preprocessing(pretrained, config), read_license(pretrained), pretrained.revision)


def read_base(spec: Student) -> tuple[Pretrained, Preprocessing]:
    """The files of a base and its pixel normalisation, without loading the weights.

    Raises:
        RecipeError: as `check_base`.
    """
    pretrained, config = _open_base(spec)
    return pretrained, _read_preprocessing(pretrained, config)


def base_layers_needed(spec: Student, layers: Sequence[str], preserve: bool) -> tuple[str, ...]:
    """The layers at which a run needs features of the base alone: what the built student needs, before it is built.

    Args:
        spec: the student of a recipe.
        layers: layers that the projectors take as input.
        preserve: whether the base is also a teacher.

    Raises:
        RecipeError: as `check_base`.
    """
    beside = _adapter_input_layers(spec, _open_base(spec)[1].num_hidden_layers)
    preserved = ("latent",) if preserve else ()
    return tuple(dict.fromkeys((*preserved, *beside, *(("latent", *layers) if beside else ()))))


def _adapter_input_layers(spec: Student, depth: int) -> tuple[str, ...]:
    """The input layers of the adapter for a base of ``depth`` blocks; none for an adapter inside the base."""
    if not isinstance(spec.adapter, Side | Conv):
        return ()
    try:
        return select_input_layers(depth, spec.adapter.blocks or [])
    except ValueError as error:
        raise RecipeError(f"student.adapter.blocks: {error}; {spec.base!r} has {depth} blocks") from error


def _open_base(spec: Student) -> tuple[Pretrained, transformers.PreTrainedConfig]:
    """The files of the base and the config of its image encoder, after all checks that do not depend on the size."""
    pretrained = open_pretrained("student.base", spec.base, spec.revision)
    model_type = pretrained.config.get("model_type")
    if model_type not in (*BASES, *IMAGE_CONFIGS):
        allowed = ", ".join(sorted([*BASES, *IMAGE_CONFIGS]))
        raise pretrained.error(
            f"is of model type {model_type!r}, which cannot be the base of a student; a base is one of {allowed}"
        )
    config = read_config(pretrained)
    config = getattr(config, IMAGE_CONFIGS[model_type]) if model_type in IMAGE_CONFIGS else config
    if reason := _why_unusable(config):
        raise pretrained.error(f"cannot be the base of a student: {reason}")
    check_weights(pretrained)
    return pretrained, config


def _why_unusable(config: transformers.PreTrainedConfig) -> str:
    """Why a model of a known family cannot be a base, or ""."""
    if config.num_channels != 3:
        return f"it takes {config.num_channels} channels; images have red, green and blue"
    if not getattr(config, "vision_use_head", True):
        return "it has no pooling head (vision_use_head: false), and so no vector for the whole image"
    if not isinstance(config.patch_size, int):
        return f"the patch_size of its config is {config.patch_size}; only a single number is supported"
    h, w = as_size(config.image_size)
    return "" if h == w else f"it was made for images of {h} x {w} px; only square position tables can be resized"


def _read_preprocessing(pretrained: Pretrained, config: transformers.PreTrainedConfig) -> Preprocessing:
    stats = BASES[config.model_type].pixel_stats
    return read_preprocessing(pretrained, Preprocessing(as_size(config.image_size), *stats))

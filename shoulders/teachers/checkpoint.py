"""Everything about a teacher's checkpoint that is known before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shoulders.config.sections import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.hub import (
    COMMIT_PATTERN,
    Preprocessing,
    Pretrained,
    check_weights,
    open_pretrained,
    read_config,
    read_license,
    read_preprocessing,
    resolve_source,
)
from shoulders.teachers.families import FAMILIES, REMOTE, Family, family_name


def teacher_error(name: str, key: str, message: str) -> RecipeError:
    """An error about one key of one teacher of a recipe, in one line."""
    return RecipeError(f"teachers.{name}.{key}: {message}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its weights.

    Args:
        pretrained: its files.
        family: its row in the table of families.
        config: the transformers config; ``image_config`` is the part of it that describes the image encoder.
        preprocessing: input size (one that the family allows), mean and std.
        taps: the taps to use.
        license: as its model card names it.
    """

    pretrained: Pretrained
    family: Family
    config: Any
    image_config: Any
    preprocessing: Preprocessing
    taps: tuple[str, ...]
    license: str


def read_checkpoint(name: str, spec: TeacherSpec) -> Checkpoint:
    """Read and check a teacher's checkpoint, apart from its weights.

    Args:
        name: the teacher's name in the recipe.
        spec: its entry there, with a ``model:``.

    Raises:
        RecipeError: there is no such model, it is not supported or cannot be loaded, or it has no such taps or size;
            one line that begins with the recipe's key.
    """
    key, model = f"teachers.{name}.model", str(spec.model)
    _check_remote_code(name, spec, is_folder=Path(resolve_source(key, model)).is_dir())
    pretrained = open_pretrained(key, model, spec.revision)
    family = _choose_family(name, spec, pretrained.config)
    config = read_config(pretrained, remote_code=family is REMOTE)
    image_config = getattr(config, family.image_config) if family.image_config else config
    channels = getattr(image_config, "num_channels", 3)
    if channels != 3:
        raise teacher_error(name, "model", f"{model!r} takes {channels} channels; images have red, green and blue")
    if family is REMOTE and not hasattr(image_config, "patch_size"):
        message = f"{model!r} has no patch_size in its config; give it as a module: of your own"
        raise teacher_error(name, "trust_remote_code", message)
    check_weights(pretrained)
    return Checkpoint(
        pretrained=pretrained,
        family=family,
        config=config,
        image_config=image_config,
        preprocessing=_preprocessing(name, spec, pretrained, family, image_config),
        taps=_choose_taps(name, spec, family, image_config),
        license=read_license(pretrained),
    )


def _check_remote_code(name: str, spec: TeacherSpec, is_folder: bool) -> None:
    """Code from the hub runs only at a commit named in full, so that it cannot change."""
    if spec.trust_remote_code and not is_folder and not COMMIT_PATTERN.fullmatch(spec.revision or ""):
        message = f"remote code runs only at a fixed commit; give 40 hex digits, got {spec.revision!r}"
        raise teacher_error(name, "revision", message)


def _choose_family(name: str, spec: TeacherSpec, config: dict[str, Any]) -> Family:
    """The row of the table for a config.json, or REMOTE where the checkpoint has code and the recipe trusts it."""
    if spec.trust_remote_code and "auto_map" in config:
        if any("--" in str(location) for location in config["auto_map"].values()):
            raise teacher_error(
                name,
                "trust_remote_code",
                f"{spec.model!r} takes its code from another repository, "
                "which no revision fixes; give that repository's code in a module: of your own",
            )
        return REMOTE
    if family_name(config) not in FAMILIES:
        raise teacher_error(
            name,
            "model",
            f"{spec.model!r} is of model type {config.get('model_type')!r}, which is not supported; "
            f"known: {', '.join(sorted(FAMILIES))}; "
            "or write a function that builds it and give module: package.module:function",
        )
    _check_timm(name, spec, config)
    return FAMILIES[family_name(config)]


def _check_timm(name: str, spec: TeacherSpec, config: dict[str, Any]) -> None:
    backbone = config.get("backbone_config") or {}
    uses_timm = config.get("use_timm_backbone") or backbone.get("model_type") == "timm_backbone"
    if uses_timm and find_spec("timm") is None:
        raise teacher_error(
            name,
            "model",
            f"{spec.model!r} has a timm backbone; install timm, "
            "or give a revision of it with a transformers backbone (for facebook/detr-*: no_timm)",
        )


def _choose_taps(name: str, spec: TeacherSpec, family: Family, config: Any) -> tuple[str, ...]:
    names = family.taps.names(config)
    if spec.taps is None:
        return family.taps.default_names(config)
    unknown = [tap for tap in spec.taps if tap not in names]
    if unknown or not spec.taps:
        message = f"no tap {', '.join(unknown) or 'given'}; {spec.model!r} has {', '.join(names)}"
        raise teacher_error(name, "taps", message)
    return tuple(dict.fromkeys(spec.taps))


def _preprocessing(name: str, spec: TeacherSpec, pretrained: Pretrained, family: Family, config: Any) -> Preprocessing:
    config_size, side = _image_size(config), family.default_size
    default_size = (side, side) if side else config_size or (224, 224)
    preprocessing = read_preprocessing(pretrained, Preprocessing(default_size, *family.pixel_stats))
    step = family.size_step(config)
    if spec.size is not None:
        size = (spec.size, spec.size) if isinstance(spec.size, int) else spec.size
        _check_size(name, size, config_size if family.fixed_size else None, step)
    elif family.fixed_size and config_size:
        size = config_size
    else:  # some checkpoints resize to a shortest edge that the encoder itself would pad
        size = (_nearest(preprocessing.size[0], step), _nearest(preprocessing.size[1], step))
    return Preprocessing(size, preprocessing.mean, preprocessing.std)


def _check_size(name: str, size: tuple[int, int], only: tuple[int, int] | None, step: int) -> None:
    if only is not None and size != only:
        message = f"{size[0]} x {size[1]} given, but this model takes only {only[0]} x {only[1]}"
        raise teacher_error(name, "size", message)
    for side in size:
        below, above = side // step * step, -(-side // step) * step
        if side < 1 or below != above:
            legal = " and ".join(str(s) for s in (below, max(above, step)) if s > 0)
            raise teacher_error(name, "size", f"{side} px is not a multiple of {step}; nearest legal: {legal}")


def _nearest(side: int, step: int) -> int:
    return max(step, round(side / step) * step)


def _image_size(config: Any) -> tuple[int, int] | None:
    """The image size (h, w) that a config, or the config of its backbone, was built for."""
    for part in (config, getattr(config, "backbone_config", None)):
        size = getattr(part, "image_size", None)
        if isinstance(size, int):
            return size, size
        if size:
            return int(size[0]), int(size[-1])
    return None

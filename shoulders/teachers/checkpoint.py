"""What a transformers checkpoint says of itself before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shoulders.config.recipe import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.hub import (
    COMMIT,
    Preprocessing,
    Pretrained,
    check_weights,
    license_of,
    locate,
    open_pretrained,
    read_config,
    read_preprocessing,
)
from shoulders.teachers.families import FAMILIES, REMOTE, Family, row_of


def fault(name: str, key: str, message: str) -> RecipeError:
    """The refusal of one key of one teacher, in one line."""
    return RecipeError(f"teachers.{name}.{key}: {message}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's own description: everything but the weights.

    Args:
        pretrained: where its files come from.
        row: of the table of families; ``family`` is what stands there.
        config: the transformers config; ``image_config`` is the part of it that describes the image encoder.
        preprocessing: input size (legal for this family), mean and std.
        taps: the taps to use.
    """

    pretrained: Pretrained
    row: str
    family: Family
    config: Any
    image_config: Any
    preprocessing: Preprocessing
    taps: tuple[str, ...]
    license: str


def read_checkpoint(name: str, spec: TeacherSpec) -> Checkpoint:
    """Read and judge everything that is known before the weights.

    Raises:
        RecipeError: the model is not there, not supported or not loadable, or has no such taps or size; one
            line that begins with the recipe's key.
    """
    where, model = f"teachers.{name}.model", str(spec.model)
    in_folder = Path(locate(where, model)).is_dir()
    if spec.trust_remote_code and not in_folder and not COMMIT.fullmatch(spec.revision or ""):
        raise fault(
            name, "revision", f"remote code runs only at a fixed commit; give 40 hex digits, got {spec.revision!r}"
        )
    pretrained = open_pretrained(where, model, spec.revision)
    family = _choose_family(name, spec, pretrained.tree)
    config = read_config(pretrained, remote_code=family is REMOTE)
    image_config = getattr(config, family.part) if family.part else config
    if getattr(image_config, "num_channels", 3) != 3:
        raise fault(
            name, "model", f"{model!r} takes {image_config.num_channels} channels; teachers see red, green, blue"
        )
    if family is REMOTE and not hasattr(image_config, "patch_size"):
        raise fault(name, "trust_remote_code", f"{model!r} says no patch_size; give it as a module: of your own")
    check_weights(pretrained)
    return Checkpoint(
        pretrained=pretrained,
        row=row_of(pretrained.tree),
        family=family,
        config=config,
        image_config=image_config,
        preprocessing=_preprocessing(name, spec, pretrained, family, image_config),
        taps=_choose_taps(name, spec, family, image_config),
        license=license_of(pretrained),
    )


def _choose_family(name: str, spec: TeacherSpec, tree: dict[str, Any]) -> Family:
    """The row of the table for a config.json, or REMOTE where its code is asked for and there."""
    if spec.trust_remote_code and "auto_map" in tree:
        if any("--" in str(place) for place in tree["auto_map"].values()):
            raise fault(
                name,
                "trust_remote_code",
                f"{spec.model!r} takes its code from another repository, "
                "which no revision fixes; give that repository's code in a module: of your own",
            )
        return REMOTE
    model_type = tree.get("model_type")
    if row_of(tree) not in FAMILIES:
        raise fault(
            name,
            "model",
            f"{spec.model!r} is of model type {model_type!r}, which is not supported; "
            f"known: {', '.join(sorted(FAMILIES))}; "
            "or write a function that builds it and give module: package.module:function",
        )
    backbone = tree.get("backbone_config") or {}
    uses_timm = tree.get("use_timm_backbone") or backbone.get("model_type") == "timm_backbone"
    if uses_timm and find_spec("timm") is None:
        raise fault(
            name,
            "model",
            f"{spec.model!r} has a timm backbone; install timm, "
            "or give a revision of it with a transformers backbone (for facebook/detr-*: no_timm)",
        )
    return FAMILIES[row_of(tree)]


def _choose_taps(name: str, spec: TeacherSpec, family: Family, config: Any) -> tuple[str, ...]:
    names = family.taps.names(config)
    if spec.taps is None:
        return family.taps.chosen(config)
    unknown = [tap for tap in spec.taps if tap not in names]
    if unknown or not spec.taps:
        raise fault(name, "taps", f"no tap {', '.join(unknown) or 'given'}; {spec.model!r} has {', '.join(names)}")
    return tuple(dict.fromkeys(spec.taps))


def _preprocessing(name: str, spec: TeacherSpec, pretrained: Pretrained, family: Family, config: Any) -> Preprocessing:
    own = _image_size(config)
    side = (family.size, family.size) if family.size else own or (224, 224)
    said = read_preprocessing(pretrained, Preprocessing(side, *family.stats))
    step = family.step(config)
    if spec.size is not None:
        size = (spec.size, spec.size) if isinstance(spec.size, int) else spec.size
        _check_size(name, size, own if family.fixed else None, step)
    elif family.fixed and own:
        size = own
    else:  # some checkpoints resize to a shortest edge that the encoder itself would pad
        size = (_nearest(said.size[0], step), _nearest(said.size[1], step))
    return Preprocessing(size, said.mean, said.std)


def _check_size(name: str, size: tuple[int, int], only: tuple[int, int] | None, step: int) -> None:
    if only is not None and size != only:
        raise fault(name, "size", f"{size[0]} x {size[1]} given, but this model takes only {only[0]} x {only[1]}")
    for side in size:
        below, above = side // step * step, -(-side // step) * step
        if side < 1 or below != above:
            legal = " and ".join(str(s) for s in (below, max(above, step)) if s > 0)
            raise fault(name, "size", f"{side} px is not a multiple of {step}; nearest legal: {legal}")


def _nearest(side: int, step: int) -> int:
    return max(step, round(side / step) * step)


def _image_size(config: Any) -> tuple[int, int] | None:
    """The image size that a config, or the backbone's config in it, was built for."""
    for part in (config, getattr(config, "backbone_config", None)):
        size = getattr(part, "image_size", None)
        if isinstance(size, int):
            return size, size
        if size:
            return int(size[0]), int(size[-1])
    return None

"""Pretrained weights, from a local folder or the Hugging Face hub: read with care, loaded strictly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from shoulders.errors import DataError, RecipeError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its pixels, which come in [0, 1]: (pixels - mean) / std at ``size`` = (h, w)."""

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_json(source: str, name: str, revision: str | None = None) -> dict[str, Any] | None:
    """A JSON file of a model, or None where the model has none."""
    path = _file(source, name, revision)
    return None if path is None else json.loads(Path(path).read_text())


def read_config(source: str, revision: str | None, where: str) -> dict[str, Any]:
    """``config.json`` of a model, after the cheap checks: it exists and its weights are safetensors.

    Args:
        where: key of the recipe that named the model, for the message.

    Raises:
        RecipeError: if there is no such model, or it has no safetensors.
    """
    if _looks_local(source) and not Path(source).is_dir():
        raise RecipeError(
            f"{where}: no folder {source!r}; give an existing folder or a hub id such as facebook/dinov2-base"
        )
    config = read_json(source, "config.json", revision)
    if config is None:
        raise RecipeError(f"{where}: {source!r} has no config.json; give a folder or hub id in transformers format")
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in WEIGHTS):
        raise RecipeError(
            f"{where}: {source!r} has no safetensors weights; load it once in transformers and save_pretrained it again"
        )
    return config


def read_preprocessing(source: str, revision: str | None = None) -> Preprocessing | None:
    """Size and normalisation from ``preprocessor_config.json``, read as plain data, or None where it is absent.

    transformers' own image processors are not used: several need torchvision, and pixels are rendered here.
    """
    spec = read_json(source, "preprocessor_config.json", revision)
    if spec is None:
        return None
    sized = spec.get("crop_size") if spec.get("do_center_crop") and spec.get("crop_size") else spec.get("size")
    mean, std = spec.get("image_mean") or IMAGENET[0], spec.get("image_std") or IMAGENET[1]
    if spec.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    # transformers multiplies the 0..255 values by rescale_factor and then normalises; ours come in [0, 1]
    factor = 255 * spec.get("rescale_factor", 1 / 255) if spec.get("do_rescale", True) else 255.0
    return Preprocessing(_size(sized), tuple(m / factor for m in mean), tuple(s / factor for s in std))


def load_strict(
    model_class: type, source: str, revision: str | None = None, *, trust_remote_code: bool = False,
    where: str = "model", **settings: Any,
) -> PreTrainedModel:  # fmt: skip
    """``from_pretrained`` that takes safetensors only, in float32, and refuses a model with a weight missing.

    Weights left over are fine: a head, a text tower or a pooler that is not read.

    Raises:
        DataError: if a weight is missing, of another shape, or the file is damaged.
        RecipeError: if the model cannot be found.
    """
    try:
        model, info = model_class.from_pretrained(
            source, revision=revision or "main", use_safetensors=True, output_loading_info=True,
            trust_remote_code=trust_remote_code, dtype=torch.float32, **settings,
        )  # fmt: skip
    except OSError as error:
        raise RecipeError(f"{where}: cannot load {source!r}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # safetensors raises its own class, transformers several
        raise DataError(f"{where}: cannot load {source!r}: {' '.join(str(error).split())[:300]}") from error
    missing = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if missing:
        raise DataError(
            f"{where}: {source!r} lacks {len(missing)} weights of {model_class.__name__}, such as {missing[0]}"
        )
    return model


def licence_of(source: str, revision: str | None = None) -> str:
    """The licence that the model's card states in its front matter, or ``unknown``."""
    path = _file(source, "README.md", revision)
    lines = Path(path).read_text(errors="replace").splitlines() if path else []
    for line in lines[1 : lines.index("---", 1) if lines[:1] == ["---"] and "---" in lines[1:] else 0]:
        if line.startswith("license:"):
            return line.removeprefix("license:").strip().strip("'\"")
    return "unknown"


def _file(source: str, name: str, revision: str | None) -> str | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.is_file() else None
    try:
        return cached_file(
            source, name, revision=revision or "main", _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
    except OSError as error:
        raise RecipeError(f"{source!r}: {str(error).splitlines()[0]}") from error


def _looks_local(source: str) -> bool:
    """A hub id is ``name`` or ``owner/name``; anything else is a path."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _size(spec: Any) -> tuple[int, int] | None:
    if spec is None:
        return None
    if isinstance(spec, int):
        return spec, spec
    if "height" in spec:
        return spec["height"], spec["width"]
    edge = spec.get("shortest_edge") or spec.get("longest_edge")
    return (edge, edge) if edge else None

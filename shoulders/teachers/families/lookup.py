"""Look up rows of the table of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoulders.teachers.families.table import FAMILIES


def family_name(config: Mapping[str, Any]) -> str:
    """The key of `FAMILIES` for a config.json: its model type, with ``_backbone`` or ``_segmenter`` where it has two.

    The encoder of a DPT is a ViT of its own, or a backbone of another model type; the segmenter of a MobileNetV2 takes
    another map than the classifier.
    """
    model_type = str(config.get("model_type"))
    architectures = config.get("architectures") or [""]
    if f"{model_type}_segmenter" in FAMILIES and str(architectures[0]).endswith("ForSemanticSegmentation"):
        return f"{model_type}_segmenter"
    with_backbone = f"{model_type}_backbone"
    has_backbone = with_backbone in FAMILIES and config.get("backbone_config") and not config.get("is_hybrid")
    return with_backbone if has_backbone else model_type


def list_families() -> list[dict[str, str]]:
    """The table in words, one row per model type: kind, taps, default taps, size rule."""
    defaults = {"last": "the last one", "all": "all", "head": "those of its head"}
    return [
        {
            "model type": model_type,
            "kind": family.kind,
            "taps": family.taps.description,
            "default": defaults[family.taps.default],
            "size": family.size_rule,
        }
        for model_type, family in FAMILIES.items()
    ]

"""Look up rows of the table of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoulders.teachers.families.table import FAMILIES

# how the architecture of a checkpoint ends -> the suffix of its row, in families whose heads take different features
ROW_SUFFIXES = {
    "ForSemanticSegmentation": "_segmenter",
    "ForImageClassification": "_classifier",
    "ForImageClassificationWithTeacher": "_distilled",
}


def family_name(config: Mapping[str, Any]) -> str:
    """The key of `FAMILIES` for a config.json: its model type, with a suffix where the family has several rows.

    The encoder of a DPT is a ViT of its own, or a backbone of another model type.
    """
    model_type = str(config.get("model_type"))
    architecture = str((config.get("architectures") or [""])[0])
    rows = [f"{model_type}{suffix}" for ending, suffix in ROW_SUFFIXES.items() if architecture.endswith(ending)]
    if config.get("backbone_config") and not config.get("is_hybrid"):
        rows.append(f"{model_type}_backbone")
    return next((row for row in rows if row in FAMILIES), model_type)


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

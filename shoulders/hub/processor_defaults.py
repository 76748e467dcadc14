"""What transformers assumes for what a checkpoint's preprocessor_config.json leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

# sizes are not among them: that of the config is the one that the model was trained at
PIXEL_KEYS = (
    "do_rescale",
    "rescale_factor",
    "rescale_offset",
    "do_normalize",
    "image_mean",
    "image_std",
    "include_top",
)


def with_class_defaults(settings: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The settings of an image processor, completed by how its class in transformers rescales and normalizes.

    Args:
        settings: of a preprocessor_config.json; {} where the checkpoint has none.
        model_type: of the checkpoint, whose usual processor counts where the settings name no class.

    Returns:
        The settings themselves where there are none, or transformers has no class for them.
    """
    if not settings:
        return {}
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    return {**_class_settings(_class_name(name) if isinstance(name, str) else _usual_class(model_type)), **settings}


def _class_name(name: str) -> str:
    """The name of a processor's class without its backend; older checkpoints call it a feature extractor."""
    return name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def _usual_class(model_type: str) -> str:
    backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    names = [name for name in backends.values() if name] if isinstance(backends, Mapping) else [str(backends)]
    return _class_name(names[0]) if names else ""


def _class_settings(class_name: str) -> dict[str, Any]:
    """The settings that a class has by itself, read without making a processor; {} for an unknown class."""
    for name in (f"{class_name}Pil", class_name):
        try:
            processor = getattr(transformers, name, None)
            values = {key: getattr(processor, key, None) for key in PIXEL_KEYS}
        except ImportError:  # it needs a package that is not installed
            continue
        if found := {key: _as_list(value) for key, value in values.items() if value is not None}:
            return found
    return {}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

"""Pretrained models in transformers format, from a local folder or the hub: checked before use, loaded strictly.

Nothing in this package depends on the family of a model. Every error message begins with the key of the recipe that
names the model, such as ``student.base``.
"""

from shoulders.hub.config_limits import why_refused
from shoulders.hub.files import (
    COMMIT_PATTERN,
    Pretrained,
    find_file,
    open_pretrained,
    read_json,
    read_license,
    resolve_source,
)
from shoulders.hub.preprocessing import (
    HALF_STATS,
    IMAGENET_STATS,
    PixelStats,
    Preprocessing,
    read_preprocessing,
    write_unit_range,
)
from shoulders.hub.weight_files import check_weight_files, weight_paths
from shoulders.hub.weights import LOAD_ERRORS, check_finite, check_weights, load_strict, quiet, read_config

__all__ = [
    "COMMIT_PATTERN",
    "HALF_STATS",
    "IMAGENET_STATS",
    "LOAD_ERRORS",
    "PixelStats",
    "Preprocessing",
    "Pretrained",
    "check_finite",
    "check_weight_files",
    "check_weights",
    "find_file",
    "load_strict",
    "open_pretrained",
    "quiet",
    "read_config",
    "read_json",
    "read_license",
    "read_preprocessing",
    "resolve_source",
    "weight_paths",
    "why_refused",
    "write_unit_range",
]

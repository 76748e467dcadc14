"""Pretrained models in transformers format, from a local folder or the hub: read with care, loaded strictly.

What is particular to a family of teachers or bases is not here. Every message begins with ``where``: the key of the
recipe that names the model, such as ``student.base``.
"""

from shoulders.hub.files import COMMIT, Pretrained, find, license_of, locate, open_pretrained, read_json
from shoulders.hub.preprocessing import HALF, IMAGENET, PixelStats, Preprocessing, read_preprocessing
from shoulders.hub.weights import check_weights, load_strict, quiet, read_config

__all__ = [
    "COMMIT",
    "HALF",
    "IMAGENET",
    "PixelStats",
    "Preprocessing",
    "Pretrained",
    "check_weights",
    "find",
    "license_of",
    "load_strict",
    "locate",
    "open_pretrained",
    "read_config",
    "read_json",
    "quiet",
    "read_preprocessing",
]

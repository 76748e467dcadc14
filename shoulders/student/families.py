"""The families of models that can be the base of a student: plain vision transformers, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shoulders.hub import HALF_STATS, IMAGENET_STATS, PixelStats

# model type of an image-text checkpoint -> the part of its config that describes the image encoder, which is the base
IMAGE_CONFIGS = {"siglip": "vision_config"}


# functions with names, not lambdas: a student holds its family, and can be pickled


def _no_prefix(config: Any) -> int:
    """The patch tokens come first."""
    return 0


def _cls_prefix(config: Any) -> int:
    """The CLS token comes first."""
    return 1


def _register_prefix(config: Any) -> int:
    """The CLS token and the register tokens come first."""
    return 1 + int(config.num_register_tokens)


def _class_token(tokens: Tensor, base: nn.Module) -> Tensor:
    """Summary (B, D): the final CLS token, the first of the tokens (B, prefix + N, D)."""
    return tokens[:, 0]


def _attention_pool(tokens: Tensor, base: nn.Module) -> Tensor:
    """Summary (B, D): SigLIP's attention pooling over the patch tokens (B, N, D)."""
    return base.get_submodule("head")(tokens)


@dataclass(frozen=True)
class BaseFamily:
    """Where the parts of a base are and how its features are computed.

    Args:
        model: name of the class in transformers.
        blocks: path of the list of blocks; each block has an ``mlp``.
        prefix: config -> number of tokens before the patch tokens (CLS and registers).
        summary: (final tokens, base) -> summary.
        pixel_stats: pixel normalisation of a folder that does not state one.
        build: arguments of the class; they leave out modules that are not used.
        forward: arguments of its forward; they allow any input size.
    """

    model: str
    blocks: str
    prefix: Callable[[Any], int]
    summary: Callable[[Tensor, nn.Module], Tensor]
    pixel_stats: PixelStats = IMAGENET_STATS
    build: dict[str, Any] = field(default_factory=dict)
    forward: dict[str, Any] = field(default_factory=dict)


# model type of the config -> its family
BASES = {
    "dinov2": BaseFamily("Dinov2Model", "encoder.layer", _cls_prefix, _class_token),
    "dinov2_with_registers": BaseFamily("Dinov2WithRegistersModel", "encoder.layer", _register_prefix, _class_token),
    "dinov3_vit": BaseFamily("DINOv3ViTModel", "model.layer", _register_prefix, _class_token),
    "siglip_vision_model": BaseFamily(
        "SiglipVisionModel",
        "encoder.layers",
        _no_prefix,
        _attention_pool,
        HALF_STATS,
        forward={"interpolate_pos_encoding": True},
    ),
    "vit": BaseFamily(
        "ViTModel",
        "layers",
        _cls_prefix,
        _class_token,
        HALF_STATS,
        build={"add_pooling_layer": False},
        forward={"interpolate_pos_encoding": True},
    ),
}

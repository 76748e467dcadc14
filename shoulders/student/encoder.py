"""The student's encoder: a frozen general-purpose ViT with an adapter inside or beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from shoulders.features import Features
from shoulders.hub.fast import optimize_for_inference
from shoulders.student.kinds import build_adapter


def _class_token(tokens: Tensor, base: nn.Module) -> Tensor:
    """Summary (B, D) = the final CLS token, first of the tokens (B, prefix + N, D)."""
    return tokens[:, 0]


def _attention_pool(tokens: Tensor, base: nn.Module) -> Tensor:
    """Summary (B, D) = SigLIP's attention pooling over the patch tokens (B, N, D)."""
    return base.get_submodule("head")(tokens)


@dataclass(frozen=True)
class BaseFamily:
    """How a family of ViTs is read: where its blocks are, which tokens come first, what the summary is."""

    model: str  # class in transformers
    blocks: str  # path of the list of blocks; each block has an `mlp`
    norm: str  # path of the norm after the last block
    prefix: Callable[[Any], int]  # config -> tokens before the patch tokens
    summary: Callable[[Tensor, nn.Module], Tensor]
    build: dict[str, Any] = field(default_factory=dict)  # arguments that leave out what is not read
    forward: dict[str, Any] = field(default_factory=dict)  # arguments that make any input size work


# model_type of the config -> how to read it
BASES = {
    "dinov2": BaseFamily("Dinov2Model", "encoder.layer", "layernorm", lambda config: 1, _class_token),
    "dinov2_with_registers": BaseFamily(
        "Dinov2WithRegistersModel", "encoder.layer", "layernorm", lambda c: 1 + c.num_register_tokens, _class_token
    ),
    "dinov3_vit": BaseFamily(
        "DINOv3ViTModel", "model.layer", "norm", lambda c: 1 + c.num_register_tokens, _class_token
    ),
    "siglip_vision_model": BaseFamily(
        "SiglipVisionModel",
        "encoder.layers",
        "post_layernorm",
        lambda config: 0,
        _attention_pool,
        forward={"interpolate_pos_encoding": True},
    ),
    "vit": BaseFamily(
        "ViTModel",
        "layers",
        "layernorm",
        lambda config: 1,
        _class_token,
        build={"add_pooling_layer": False},
        forward={"interpolate_pos_encoding": True},
    ),
}


class Encoder(nn.Module):
    """Pixels in [0, 1] -> ``{place: Features}``: ``latent`` (final normed tokens) and ``block0`` .. on request.

    Args:
        base: the transformers model; frozen here, its weights and their names are never touched.
        adapter: ``{"kind": ..., **settings}`` as in the recipe.
        mean, std: the base's own pixel normalisation, per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, base: transformers.PreTrainedModel, adapter: dict[str, Any], mean: Sequence[float], std: Sequence[float]
    ):
        super().__init__()
        self.family = BASES[base.config.model_type]
        self.base = base.eval().requires_grad_(False)
        optimize_for_inference(self.base)
        self.width: int = base.config.hidden_size
        self.patch_size: int = base.config.patch_size
        self.prefix = self.family.prefix(base.config)
        self.depth = len(base.get_submodule(self.family.blocks))
        self.adapter = build_adapter(layers=base.get_submodule(self.family.blocks), d=self.width, **adapter)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> Encoder:
        """Adapters train; the base stays in evaluation mode for good."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, pixels: Tensor, places: Sequence[str] = ("latent",)) -> dict[str, Features]:
        """Features of pixels (B, 3, h, w) in [0, 1] at the places asked for.

        Raises:
            ValueError: if h or w is not a multiple of the patch size, or a place does not exist.
        """
        wanted = dict.fromkeys((*places, *self.adapter.input_layers))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.adapter.input_layers):
            said = self._ask(pixels, tuple(wanted))
        return self.refine(said, pixels, places)

    def refine(
        self, said: Mapping[str, Features], pixels: Tensor, places: Sequence[str] = ("latent",)
    ) -> dict[str, Features]:
        """What :meth:`forward` gives, from what the base has said already at the places that a side adapter reads.

        Args:
            said: of :meth:`own`, now or when a cache was made.
        """
        seen = self.adapter.refine(said, (pixels - self.mean) / self.std)
        return {place: seen[place] for place in places}

    @torch.no_grad()
    def own(self, pixels: Tensor, places: Sequence[str] = ("latent",)) -> dict[str, Features]:
        """What the base says by itself of pixels (B, 3, h, w), as :meth:`forward` with the adapter off."""
        with self.adapters_disabled():
            return self._ask(pixels, places)

    def _ask(self, pixels: Tensor, places: Sequence[str]) -> dict[str, Features]:
        """What the base says, with the adapters inside it."""
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        blocks = [self._block(place) for place in places if place != "latent"]
        out = self.base((pixels - self.mean) / self.std, output_hidden_states=bool(blocks), **self.family.forward)
        tokens = out.last_hidden_state  # (B, prefix + N, D)
        found = {"latent": Features(self.family.summary(tokens, self.base), tokens[:, self.prefix :], grid)}
        for block in blocks:
            inside = out.hidden_states[block + 1]  # (B, prefix + N, D), before the final norm; embeddings come first
            summary = inside[:, 0] if self.prefix else inside.mean(1)  # SigLIP has no CLS token
            found[f"block{block}"] = Features(summary, inside[:, self.prefix :], grid)
        return {place: found[place] for place in places}

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Within this context the adapter is off: the base answers, bit for bit."""
        return self.adapter.off()

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid (H, W) of an input of ``size`` = (h, w) px."""
        p = self.patch_size
        if size[0] % p or size[1] % p or not size[0] or not size[1]:
            legal = tuple(max(p, round(side / p) * p) for side in size)
            raise ValueError(f"input size {size} is not a multiple of the patch size {p}: the nearest is {legal}")
        return size[0] // p, size[1] // p

    def _block(self, place: str) -> int:
        number = place.removeprefix("block")
        if not number.isdecimal() or int(number) >= self.depth:
            raise ValueError(f"place {place!r} is not one of latent, block0 .. block{self.depth - 1}")
        return int(number)

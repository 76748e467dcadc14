"""The student's encoder: a frozen general-purpose ViT with an adapter inside or beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from shoulders.features import Features
from shoulders.hub.fast import optimize_for_inference
from shoulders.student.families import BASES
from shoulders.student.kinds import build_adapter


class Encoder(nn.Module):
    """Pixels in [0, 1] -> ``{layer: Features}``: ``latent`` (final normed tokens) and, on request, ``block0`` and on.

    Args:
        base: the transformers model; it is frozen here, and its weights and their names do not change.
        adapter: ``{"kind": ..., **settings}`` as in the recipe.
        mean, std: pixel normalisation of the base, per channel.
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
        blocks = base.get_submodule(self.family.blocks)
        self.depth = len(blocks)
        self.adapter = build_adapter(base_blocks=blocks, base_width=self.width, **adapter)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode of the adapter; the base stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(
        self,
        pixels: Tensor,
        layers: Sequence[str] = ("latent",),
        base_features: Mapping[str, Features] | None = None,
    ) -> dict[str, Features]:
        """Features of the student.

        Args:
            pixels: (B, 3, h, w) in [0, 1].
            layers: ``latent``, ``block0``, ..
            base_features: {layer: Features} of :meth:`base_features` for these pixels, where they exist already; only
                an adapter beside the base uses them.

        Returns:
            {layer: Features} of these layers.

        Raises:
            ValueError: if h or w is not a multiple of the patch size, or a layer does not exist.
        """
        if base_features and self.adapter.input_layers:
            return self.adapt(base_features, pixels, layers)
        needed = dict.fromkeys((*layers, *self.adapter.input_layers))
        # an adapter beside the base needs no gradient through the base
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.adapter.input_layers):
            base_features = self.run_base(pixels, tuple(needed))
        return self.adapt(base_features, pixels, layers)

    def adapt(
        self, base_features: Mapping[str, Features], pixels: Tensor, layers: Sequence[str] = ("latent",)
    ) -> dict[str, Features]:
        """The same as :meth:`forward`, from features of the base that exist already, such as cached ones.

        Args:
            base_features: {layer: Features} from :meth:`base_features`, at the input layers of the adapter at least.
            pixels: (B, 3, h, w) in [0, 1].
            layers: of the result.
        """
        student_features = self.adapter.adapt(base_features, (pixels - self.mean) / self.std)
        return {layer: student_features[layer] for layer in layers}

    @torch.no_grad()
    def base_features(self, pixels: Tensor, layers: Sequence[str] = ("latent",)) -> dict[str, Features]:
        """Features of the base alone, as :meth:`forward` with the adapter off and without gradient."""
        with self.adapters_disabled():
            return self.run_base(pixels, layers)

    def run_base(self, pixels: Tensor, layers: Sequence[str]) -> dict[str, Features]:
        """Features of the base with the adapters inside it; gradients reach the base where it is trainable.

        Args:
            pixels: (B, 3, h, w) in [0, 1].
            layers: of the result, as in :meth:`forward`.
        """
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        blocks = [self._block_index(layer) for layer in layers if layer != "latent"]
        output = self.base((pixels - self.mean) / self.std, output_hidden_states=bool(blocks), **self.family.forward)
        tokens = output.last_hidden_state  # (B, prefix + N, D)
        features = {"latent": Features(self.family.summary(tokens, self.base), tokens[:, self.prefix :], grid)}
        for block in blocks:
            hidden = output.hidden_states[block + 1]  # (B, prefix + N, D), before the final norm; embeddings come first
            summary = hidden[:, 0] if self.prefix else hidden.mean(1)  # SigLIP has no CLS token
            features[f"block{block}"] = Features(summary, hidden[:, self.prefix :], grid)
        return {layer: features[layer] for layer in layers}

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """A context in which the encoder computes the features of its base, bit for bit."""
        return self.adapter.disabled()

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid (H, W) of tokens for an input of ``size`` = (h, w) px.

        Raises:
            ValueError: if h or w is not a multiple of the patch size.
        """
        p = self.patch_size
        if size[0] % p or size[1] % p or not size[0] or not size[1]:
            nearest = tuple(max(p, round(side / p) * p) for side in size)
            raise ValueError(f"input size {size} is not a multiple of the patch size {p}: the nearest is {nearest}")
        return size[0] // p, size[1] // p

    def _block_index(self, layer: str) -> int:
        index = layer.removeprefix("block")
        if not index.isdecimal() or int(index) >= self.depth:
            raise ValueError(f"layer {layer!r} is not one of latent, block0 .. block{self.depth - 1}")
        return int(index)

"""The side adapter: a small transformer beside the base that takes features of its blocks (LST, arXiv 2206.06522).

No gradient goes through the base, so the features of the base may also come from a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Features
from shoulders.hub import fast
from shoulders.student.adapters import Adapter

HEAD_WIDTH = 64  # channels of one attention head


class SelfAttention(nn.Module):
    """Self-attention over all tokens: x + attention(LN(x))."""

    is_causal = False

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, W) -> the same shape."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(fast.attention(self, q, k, v)[0].flatten(2))


class SideBlock(nn.Module):
    """One layer of the base, narrowed and gated, joins the tokens of the ladder; then attention and an MLP follow."""

    def __init__(self, base_width: int, width: int):
        super().__init__()
        self.down = nn.Linear(base_width, width)
        self.gate = nn.Parameter(torch.ones(width))
        self.mixing = SelfAttention(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor | float, base_features: Features) -> Tensor:
        """Tokens of the ladder (B, 1 + N, W), or 0 at the first block, and the base's features (width D) of one layer.

        Returns:
            The next tokens (B, 1 + N, W).
        """
        base = base_features.components()
        tokens = torch.cat([base["summary"][:, None], base["spatial"]], 1)  # (B, 1 + N, D)
        # a few channels of a ViT are a hundred times larger than the rest
        x = self.mixing(x + self.gate * self.down(F.layer_norm(tokens, tokens.shape[-1:])))  # (B, 1 + N, W)
        return x + self.mlp(x)


class Ladder(Adapter):
    """One :class:`SideBlock` for each input layer, from the first blocks up; the result is added to the base's latent.

    At all other layers the student's features are those of the base.

    Args:
        input_layers: of the base, in their order; the last is ``latent``.
        base_width: channels D of the base.
        width: channels W of the ladder.
    """

    def __init__(self, input_layers: Sequence[str], base_width: int, width: int):
        super().__init__()
        self.input_layers = tuple(input_layers)
        self.rungs = nn.ModuleDict({layer: SideBlock(base_width, width) for layer in input_layers})
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, base_width)
        for parameter in (self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def adapt(self, base_features: Mapping[str, Features], pixels: Tensor) -> dict[str, Features]:
        """Features of the student, from the base's features at the input layers at least; the pixels are not used."""
        if not self.enabled:
            return dict(base_features)
        x: Tensor | float = 0.0
        for layer, block in self.rungs.items():
            x = block(x, base_features[layer])
        update = self.up(self.norm(x))  # (B, 1 + N, D)
        base = base_features["latent"].components()
        latent = Features(base["summary"] + update[:, 0], base["spatial"] + update[:, 1:], base_features["latent"].grid)
        return {**base_features, "latent": latent}

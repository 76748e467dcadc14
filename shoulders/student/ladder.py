"""The side adapter: a small network beside the base that reads what its blocks say (LST, arXiv 2206.06522).

Nothing goes back through the base, so what is read may as well come from a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Features
from shoulders.hub import fast
from shoulders.student.adapters import Adapter

HEAD = 64  # channels of one head of a ladder's attention


class SelfAttention(nn.Module):
    """Self-attention over all tokens: x + attention(LN(x))."""

    is_causal = False

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, W) -> the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(fast.attention(self, q, k, v)[0].flatten(2))


class Rung(nn.Module):
    """What the base says at one place, narrowed and gated, joins the state; then places mix, then channels."""

    def __init__(self, d: int, width: int):
        super().__init__()
        self.down = nn.Linear(d, width)
        self.gate = nn.Parameter(torch.ones(width))
        self.mixing = SelfAttention(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, state: Tensor | float, said: Features) -> Tensor:
        """State (B, 1 + N, W), or 0 below the first rung, and what the base says (width D) -> the next state."""
        parts = said.parts()
        tokens = torch.cat([parts["summary"][:, None], parts["spatial"]], 1)  # (B, 1 + N, D)
        # a few channels of a ViT are a hundred times as loud as the rest
        x = self.mixing(state + self.gate * self.down(F.layer_norm(tokens, tokens.shape[-1:])))  # (B, 1 + N, W)
        return x + self.mlp(x)


class Ladder(Adapter):
    """One rung for each place read, from the first blocks up; what they find is added to the base's latent.

    At the blocks the student says what the base says.

    Args:
        places: of the base, in their order; the last is ``latent``.
        d: width of the base.
        width: of the ladder.
    """

    def __init__(self, places: Sequence[str], d: int, width: int):
        super().__init__()
        self.input_layers = tuple(places)
        self.rungs = nn.ModuleDict({place: Rung(d, width) for place in places})
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, d)
        for zero in (self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def refine(self, said: Mapping[str, Features], pixels: Tensor) -> dict[str, Features]:
        """What the base says, at the places read at least, -> what the student says at the same places."""
        if not self.enabled:
            return dict(said)
        state: Tensor | float = 0.0
        for place, rung in self.rungs.items():
            state = rung(state, said[place])
        found = self.up(self.norm(state))  # (B, 1 + N, D)
        latent = said["latent"].parts()
        refined = Features(latent["summary"] + found[:, 0], latent["spatial"] + found[:, 1:], said["latent"].grid)
        return {**said, "latent": refined}

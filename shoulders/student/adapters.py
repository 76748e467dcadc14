"""Adapters: small trainable parts of a frozen base. All are zero at birth, so step 0 equals the base.

An adapter touches none of the base's weights or names. Those inside the base hook themselves onto its blocks; a ladder
stands beside it and reads. With ``enabled = False`` they step aside and the base answers alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Features


class Adapter(nn.Module):
    """What every kind shares: the switch, and what those beside the base do.

    ``input_layers`` are the places of the base that an adapter beside it reads; one inside the base has none.
    """

    enabled: bool = True
    input_layers: tuple[str, ...] = ()

    def refine(self, said: Mapping[str, Features], pixels: Tensor) -> dict[str, Features]:
        """What the base says of normalised pixels (B, 3, h, w), by place, -> what the student says.

        Adapters inside the base have had their say.
        """
        return dict(said)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this context the base answers alone."""
        parts = [part for part in self.modules() if isinstance(part, Adapter)]
        before = [part.enabled for part in parts]
        for part in parts:
            part.enabled = False
        try:
            yield
        finally:
            for part, enabled in zip(parts, before, strict=True):
                part.enabled = enabled


class Bottleneck(Adapter):
    """Parallel down-GELU-up beside one block's MLP, with a learned scale (AdaptFormer, arXiv 2205.13535)."""

    def __init__(self, mlp: nn.Module, d: int, width: int):
        super().__init__()
        self.down = nn.Linear(d, width)
        self.up = nn.Linear(width, d)
        self.scale = nn.Parameter(self.up.weight.new_ones(()))
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="relu")
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        # a bound method, not a closure: copy.deepcopy then rebinds it to the copied adapter
        mlp.register_forward_hook(self._beside)

    def _beside(self, mlp: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.enabled:
            return output
        return output + self.scale * self.up(F.gelu(self.down(inputs[0])))


class LowRank(Adapter):
    """Low-rank update of one linear layer, ``y + (alpha / rank) B A x`` (LoRA, arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.a = nn.Linear(linear.in_features, rank, bias=False)
        self.b = nn.Linear(rank, linear.out_features, bias=False)
        self.factor = alpha / rank
        nn.init.kaiming_uniform_(self.a.weight, a=5**0.5)
        nn.init.zeros_(self.b.weight)
        linear.register_forward_hook(self._beside)

    def _beside(self, linear: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.enabled:
            return output
        return output + self.factor * self.b(self.a(inputs[0]))


class AdapterSet(Adapter):
    """One adapter per layer that it sits at; keys are the layers' names in the base, so a changed base cannot load
    another base's adapters in silence."""

    def __init__(self, parts: dict[str, Adapter]):
        super().__init__()
        self.parts = nn.ModuleDict({name.replace(".", "-"): part for name, part in parts.items()})

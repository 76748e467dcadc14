"""Adapters: small trainable parts inside a frozen base. All are zero at birth, so step 0 equals the base.

An adapter is a module that hooks itself onto the blocks of the base and touches none of the base's weights or
names: with ``enabled = False`` the hooks step aside and the base answers alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """What every kind shares: the switch, and a place to refine what the base's blocks gave.

    ``refine`` is for adapters that do not sit inside the blocks but read them; the kinds here leave it as it is.
    """

    enabled: bool = True

    def refine(self, tokens: Tensor, hidden: tuple[Tensor, ...]) -> Tensor:
        """Final tokens (B, prefix + N, D) of the base -> those of the student; ``hidden`` are the block outputs."""
        return tokens

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


class PerBlock(Adapter):
    """One adapter per layer that it sits at; keys are the layers' names in the base, so a changed base cannot load
    another base's adapters in silence."""

    def __init__(self, parts: dict[str, Adapter]):
        super().__init__()
        self.parts = nn.ModuleDict({name.replace(".", "-"): part for name, part in parts.items()})


def bottleneck(blocks: nn.ModuleList, d: int, width: int) -> Adapter:
    """A :class:`Bottleneck` beside the MLP of every block."""
    return PerBlock({f"{i}.mlp": Bottleneck(block.get_submodule("mlp"), d, width) for i, block in enumerate(blocks)})


def lora(blocks: nn.ModuleList, d: int, rank: int, alpha: float) -> Adapter:
    """A :class:`LowRank` at every linear layer of every block, found by class: the names differ between families."""
    linears = {name: layer for name, layer in blocks.named_modules() if isinstance(layer, nn.Linear)}
    return PerBlock({name: LowRank(layer, rank, alpha) for name, layer in linears.items()})


# each: (blocks of the base, their width, its own settings) -> adapter
ADAPTERS: dict[str, Callable[..., Adapter]] = {"bottleneck": bottleneck, "lora": lora}


def build_adapter(kind: str, blocks: nn.ModuleList, d: int, **settings: Any) -> Adapter:
    """Hook a fresh adapter of this kind onto the blocks (width ``d``) of a base.

    Raises:
        ValueError: for a kind that is not in ``ADAPTERS``.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"adapter kind {kind!r} is not one of {', '.join(ADAPTERS)}")
    return ADAPTERS[kind](blocks, d, **settings)

"""The kinds of adapters, by the name that a recipe calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from shoulders.student.adapters import Adapter, AdapterSet, Bottleneck, LowRank
from shoulders.student.convolutions import Convolutions
from shoulders.student.ladder import Ladder


def bottleneck(layers: nn.ModuleList, d: int, width: int) -> Adapter:
    """A :class:`Bottleneck` beside the MLP of every block."""
    return AdapterSet({f"{i}.mlp": Bottleneck(block.get_submodule("mlp"), d, width) for i, block in enumerate(layers)})


def lora(layers: nn.ModuleList, d: int, rank: int, alpha: float) -> Adapter:
    """A :class:`LowRank` at every linear layer of every block, found by class: the names differ between families."""
    linears = {name: layer for name, layer in layers.named_modules() if isinstance(layer, nn.Linear)}
    return AdapterSet({name: LowRank(layer, rank, alpha) for name, layer in linears.items()})


def places_read(depth: int, blocks: int | Sequence[int]) -> tuple[str, ...]:
    """The places of a base of ``depth`` blocks that an adapter beside it reads.

    Args:
        blocks: so many places, evenly spaced and up to the latent; or those blocks and the latent.

    Raises:
        ValueError: the base has not so many blocks.
    """
    below = [depth * i // blocks - 1 for i in range(1, blocks)] if isinstance(blocks, int) else list(blocks)
    if any(not 0 <= block < depth for block in below) or sorted(set(below)) != below:
        raise ValueError(f"a base of {depth} blocks is read at 1 to {depth} places, or at blocks 0 .. {depth - 1}")
    return (*(f"block{block}" for block in below), "latent")


def side(layers: nn.ModuleList, d: int, width: int, blocks: int | Sequence[int]) -> Adapter:
    """A :class:`Ladder` beside the blocks."""
    return Ladder(places_read(len(layers), blocks), d, width)


def conv(layers: nn.ModuleList, d: int, width: int, depth: int, blocks: Sequence[int]) -> Adapter:
    """:class:`Convolutions` beside the blocks."""
    return Convolutions(places_read(len(layers), blocks), d, width, depth)


# each: (blocks of the base, their width, its own settings) -> adapter
ADAPTERS: dict[str, Callable[..., Adapter]] = {"bottleneck": bottleneck, "lora": lora, "side": side, "conv": conv}


def build_adapter(kind: str, layers: nn.ModuleList, d: int, **settings: Any) -> Adapter:
    """A fresh adapter of this kind for the blocks (width ``d``) of a base, hooked onto them or beside them.

    Raises:
        ValueError: for a kind that is not in ``ADAPTERS``.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"adapter kind {kind!r} is not one of {', '.join(ADAPTERS)}")
    return ADAPTERS[kind](layers, d, **settings)

"""The kinds of adapters, by their name in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from shoulders.student.adapters import Adapter, AdapterSet, Bottleneck, LowRank
from shoulders.student.convolutions import Convolutions
from shoulders.student.ladder import Ladder


def build_bottleneck(base_blocks: nn.ModuleList, base_width: int, width: int) -> Adapter:
    """A :class:`Bottleneck` beside the MLP of every block."""
    mlps = {f"{i}.mlp": block.get_submodule("mlp") for i, block in enumerate(base_blocks)}
    return AdapterSet({name: Bottleneck(mlp, base_width, width) for name, mlp in mlps.items()})


def build_lora(base_blocks: nn.ModuleList, base_width: int, rank: int, alpha: float) -> Adapter:
    """A :class:`LowRank` at every linear layer of every block, selected by class: names differ between families."""
    linears = {name: module for name, module in base_blocks.named_modules() if isinstance(module, nn.Linear)}
    return AdapterSet({name: LowRank(linear, rank, alpha) for name, linear in linears.items()})


def build_side(base_blocks: nn.ModuleList, base_width: int, width: int, blocks: int | Sequence[int]) -> Adapter:
    """A :class:`Ladder` beside the blocks."""
    return Ladder(select_input_layers(len(base_blocks), blocks), base_width, width)


def build_conv(base_blocks: nn.ModuleList, base_width: int, width: int, depth: int, blocks: Sequence[int]) -> Adapter:
    """:class:`Convolutions` beside the blocks."""
    return Convolutions(select_input_layers(len(base_blocks), blocks), base_width, width, depth)


# kind in the recipe -> function of (blocks of the base, their width, the other settings of the recipe)
ADAPTERS: dict[str, Callable[..., Adapter]] = {
    "bottleneck": build_bottleneck,
    "lora": build_lora,
    "side": build_side,
    "conv": build_conv,
}


def build_adapter(kind: str, base_blocks: nn.ModuleList, base_width: int, **settings: Any) -> Adapter:
    """A new adapter for the blocks of a base, hooked onto them or beside them.

    Args:
        kind: a key of ``ADAPTERS``.
        base_blocks: the blocks of the base.
        base_width: channels D of the base.
        settings: of this kind, as in the recipe.

    Raises:
        ValueError: for a kind that is not in ``ADAPTERS``.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"adapter kind {kind!r} is not one of {', '.join(ADAPTERS)}")
    return ADAPTERS[kind](base_blocks, base_width, **settings)


def select_input_layers(depth: int, blocks: int | Sequence[int]) -> tuple[str, ...]:
    """The layers of the base that an adapter beside it takes as input.

    Args:
        depth: blocks of the base.
        blocks: a number of layers, evenly spaced and ending with the latent; or indices of blocks, to which the latent
            is added.

    Returns:
        Names of layers, such as ``("block5", "latent")``.

    Raises:
        ValueError: the base has too few blocks.
    """
    indices = [depth * i // blocks - 1 for i in range(1, blocks)] if isinstance(blocks, int) else list(blocks)
    if any(not 0 <= block < depth for block in indices) or sorted(set(indices)) != indices:
        raise ValueError(
            f"an adapter beside a base of {depth} blocks takes 1 to {depth} layers, or blocks from 0 to {depth - 1}"
        )
    return (*(f"block{block}" for block in indices), "latent")

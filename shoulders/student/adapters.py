"""Adapters: small trainable modules that change the features of a frozen base.

An adapter changes neither the weights of the base nor their names. Adapters inside the base are forward hooks on its
modules; adapters beside the base take its features as input. Every adapter is initialised so that its output is zero:
an untrained student equals its base bit for bit, and so does a student within :meth:`Adapter.disabled`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Features


class _Disabled(threading.local):
    """The adapters that are off in this thread."""

    adapters: tuple[Adapter, ...] = ()


# of each thread its own: one thread may compute the features of the base while another runs the student
_DISABLED = _Disabled()


class Adapter(nn.Module):
    """Base class of all adapters: a switch, and :meth:`adapt` for adapters beside the base.

    ``input_layers`` are the layers of the base that an adapter beside it takes as input; an adapter inside the base has
    none.
    """

    input_layers: tuple[str, ...] = ()

    @property
    def enabled(self) -> bool:
        """Whether this adapter is on in this thread."""
        return self not in _DISABLED.adapters

    def adapt(self, base_features: Mapping[str, Features], pixels: Tensor) -> dict[str, Features]:
        """Features of the student, from features of the base.

        Args:
            base_features: {layer: Features}; adapters inside the base have changed them already.
            pixels: (B, 3, h, w) normalised.

        Returns:
            {layer: Features} of the same layers. Adapters inside the base return their input.
        """
        return dict(base_features)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which this adapter and all adapters in it are off, in this thread alone."""
        previous = _DISABLED.adapters
        _DISABLED.adapters = (*previous, *(module for module in self.modules() if isinstance(module, Adapter)))
        try:
            yield
        finally:
            _DISABLED.adapters = previous


class Bottleneck(Adapter):
    """Parallel down-GELU-up beside the MLP of one block, with a learned scale (AdaptFormer, arXiv 2205.13535)."""

    def __init__(self, mlp: nn.Module, base_width: int, width: int):
        super().__init__()
        self.down = nn.Linear(base_width, width)
        self.up = nn.Linear(width, base_width)
        self.scale = nn.Parameter(self.up.weight.new_ones(()))
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="relu")
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)
        # a bound method, not a closure: copy.deepcopy then rebinds it to the copied adapter
        mlp.register_forward_hook(self._add_to_output)

    def _add_to_output(self, mlp: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
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
        linear.register_forward_hook(self._add_to_output)

    def _add_to_output(self, linear: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.enabled:
            return output
        return output + self.factor * self.b(self.a(inputs[0]))


class AdapterSet(Adapter):
    """One adapter for each of several modules of the base.

    Keys of the state dict are the names of these modules, so that adapters of another base are refused when they load.

    Args:
        adapters: {name of the module in the list of blocks, such as ``0.mlp``: its adapter}.
    """

    def __init__(self, adapters: dict[str, Adapter]):
        super().__init__()
        self.parts = nn.ModuleDict({name.replace(".", "-"): adapter for name, adapter in adapters.items()})

"""What is done to the channels of a part before it is stored: made equally loud where int8 needs it, fewer where asked.

A channel that is loud or far from zero everywhere uses up the 255 steps that a token of int8 has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shoulders.errors import DataError
from shoulders.transfer.standardize import Moments


@dataclass(frozen=True)
class ChannelTransform:
    """x (..., C) -> (x - mean) @ directions / spread (..., W), and back.

    Args:
        mean: (C,)
        spread: (W,)
        directions: (C, W), orthonormal; None where all channels are kept.
    """

    mean: Tensor
    spread: Tensor
    directions: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        """ChannelTransform as they are stored."""
        centred = x - self.mean
        return (centred if self.directions is None else centred @ self.directions) / self.spread

    def undo(self, stored: Tensor, out: Tensor) -> None:
        """ChannelTransform as they were (..., C), into ``out``."""
        if self.directions is None:
            torch.addcmul(self.mean, stored, self.spread, out=out)
        else:
            torch.matmul(stored * self.spread, self.directions.T, out=out).add_(self.mean)

    def to(self, device: torch.device) -> ChannelTransform:
        """The same on ``device``."""
        directions = None if self.directions is None else self.directions.to(device)
        return ChannelTransform(self.mean.to(device), self.spread.to(device), directions)


def fit_channels(moments: Moments, width: int | None, equalise: bool) -> ChannelTransform | None:
    """What is to be done to channels with these moments; None where nothing is.

    Args:
        width: principal components kept of channels that are more than that; None: all channels are kept.
        equalise: whether all of them should vary alike.
    """
    covariance = moments.covariance
    directions, variances = None, covariance.diagonal()
    if width is not None and width < len(variances):
        ascending, basis = torch.linalg.eigh(covariance)
        directions, variances = basis[:, -width:].flip(1).float().contiguous(), ascending[-width:].flip(0)
    elif not equalise:
        return None
    spread = torch.ones(len(variances))
    if equalise:
        tiny = 1e-12 * (1 + moments.mean.square().mean())  # a channel that never varies is only centred
        spread = torch.where(variances > tiny, variances, 1.0).sqrt().float()
    return ChannelTransform(moments.mean.float(), spread, directions)


def save_channels(channels: Mapping[str, ChannelTransform]) -> bytes:
    """As a safetensors file, by name of the part."""
    tensors: dict[str, Tensor] = {}
    for name, one in channels.items():
        tensors |= {f"{name}.mean": one.mean, f"{name}.spread": one.spread}
        tensors |= {} if one.directions is None else {f"{name}.directions": one.directions}
    return save(tensors)


def load_channels(path: Path, data: bytes) -> dict[str, ChannelTransform]:
    """What `save_channels` gave.

    Raises:
        DataError: it is something else.
    """
    try:
        tensors = load(data)
        names = [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]
        return {
            name: ChannelTransform(
                tensors[f"{name}.mean"], tensors[f"{name}.spread"], tensors.get(f"{name}.directions")
            )
            for name in names
        }
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error}); remove {path.parent} and make it anew") from error

"""Transforms of channels before features are encoded: rescaled for int8, fewer with PCA.

int8 has 255 steps for each token. Without rescaling, a channel with large values everywhere uses up most of them.
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
    """x (..., C) -> (x - mean) @ basis / scale (..., W), and its inverse.

    Args:
        mean: (C,)
        scale: (W,)
        basis: (C, W), orthonormal; None: the identity.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        """Transform x (..., C) to (..., W)."""
        centred = x - self.mean
        return (centred if self.basis is None else centred @ self.basis) / self.scale

    def invert(self, transformed: Tensor, out: Tensor) -> None:
        """Write the inverse (..., C) of ``transformed`` (..., W) into ``out``."""
        if self.basis is None:
            torch.addcmul(self.mean, transformed, self.scale, out=out)
        else:
            torch.matmul(transformed * self.scale, self.basis.T, out=out).add_(self.mean)

    def to(self, device: torch.device) -> ChannelTransform:
        """The same transform on ``device``."""
        basis = None if self.basis is None else self.basis.to(device)
        return ChannelTransform(self.mean.to(device), self.scale.to(device), basis)


def fit_channels(moments: Moments, width: int | None, rescale: bool) -> ChannelTransform | None:
    """Fit the transform of channels with these moments; None if they stay as they are.

    Args:
        moments: of the channels.
        width: number of principal components to keep, if there are more channels; None: all channels.
        rescale: whether to bring all channels to unit variance.
    """
    covariance = moments.covariance
    basis, variances = None, covariance.diagonal()
    if width is not None and width < len(variances):
        ascending, eigenvectors = torch.linalg.eigh(covariance)
        basis, variances = eigenvectors[:, -width:].flip(1).float().contiguous(), ascending[-width:].flip(0)
    elif not rescale:
        return None
    scale = torch.ones(len(variances))
    if rescale:
        smallest = 1e-12 * (1 + moments.mean.square().mean())  # a constant channel is centred, but not rescaled
        scale = torch.where(variances > smallest, variances, 1.0).sqrt().float()
    return ChannelTransform(moments.mean.float(), scale, basis)


def save_channels(transforms: Mapping[str, ChannelTransform]) -> bytes:
    """Transforms by "tap/component" as a safetensors file."""
    tensors: dict[str, Tensor] = {}
    for name, transform in transforms.items():
        tensors |= {f"{name}.mean": transform.mean, f"{name}.scale": transform.scale}
        tensors |= {} if transform.basis is None else {f"{name}.basis": transform.basis}
    return save(tensors)


def load_channels(path: Path, data: bytes) -> dict[str, ChannelTransform]:
    """The transforms in a file of `save_channels`.

    Args:
        path: of the file, for the error message.
        data: its contents.

    Raises:
        DataError: it is damaged.
    """
    try:
        tensors = load(data)
        names = [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]
        return {
            name: ChannelTransform(tensors[f"{name}.mean"], tensors[f"{name}.scale"], tensors.get(f"{name}.basis"))
            for name in names
        }
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error}); remove {path.parent} and build it again") from error

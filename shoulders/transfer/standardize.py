"""Bring every teacher's features to mean 0 and variance 1, so that no magnitude decides how much a teacher counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shoulders.features import Features

KINDS = ("none", "channel", "phi_s")


class Moments:
    """Running mean and covariance of vectors (..., C), in float64."""

    def __init__(self, width: int):
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def update(self, vectors: Tensor) -> None:
        """Add vectors (..., C)."""
        x = vectors.detach().flatten(0, -2).double().cpu()  # (n, C)
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    @property
    def mean(self) -> Tensor:
        """(C,)"""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(C, C)"""
        return self.outer / self.count - torch.outer(self.mean, self.mean)


class Standardizer(nn.Module):
    """x -> R ((x - mean) / std) for vectors (..., C); frozen once fitted, invertible.

    - ``none``: the features as they are.
    - ``channel``: each channel by its own standard deviation.
    - ``phi_s``: rotated so that every channel has the same variance, then divided by one scalar (PHI-S,
      arXiv 2410.01680): relative magnitudes within the teacher's space survive.
    """

    mean: Tensor
    std: Tensor
    rotation: Tensor | None

    def __init__(self, kind: str, width: int):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"standardize kind {kind!r} is not one of {', '.join(KINDS)}")
        self.kind = kind
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("rotation", torch.eye(width) if kind == "phi_s" else None)

    def fit(self, moments: Moments) -> None:
        """Take the statistics of the calibration images; a channel that never varies is only centred."""
        if self.kind == "none":
            return
        covariance = moments.covariance
        variance = covariance.diagonal().clamp_min(0)
        tiny = 1e-12 * (1 + moments.mean.square())  # what rounding leaves of the variance of a constant
        if self.kind == "phi_s":  # one scalar for all channels
            variance, tiny = variance.mean().expand_as(variance), tiny.mean()
        self.mean.copy_(moments.mean)
        self.std.copy_(torch.where(variance > tiny, variance, 1.0).sqrt())
        if self.rotation is not None:
            self.rotation.copy_(equal_variance_rotation(covariance))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (..., C) of a teacher -> standardized vectors."""
        with torch.autocast(x.device.type, enabled=False):  # statistics want fp32
            standardized = (x.float() - self.mean.float()) / self.std.float()
            return standardized if self.rotation is None else standardized @ self.rotation.float().T

    def inverse(self, y: Tensor) -> Tensor:
        """Back to the teacher's own space, for its heads."""
        with torch.autocast(y.device.type, enabled=False):
            unrotated = y.float() if self.rotation is None else y.float() @ self.rotation.float()
            return unrotated * self.std.float() + self.mean.float()


class TapStandardizer(nn.Module):
    """The standardizers of one tap: summary and spatial have their own statistics."""

    def __init__(self, kind: str, summary: int | None, spatial: int | None):
        super().__init__()
        widths = {"summary": summary, "spatial": spatial}
        self.parts = nn.ModuleDict({name: Standardizer(kind, width) for name, width in widths.items() if width})

    def fit(self, moments: dict[str, Moments]) -> None:
        """Fit both components on ``{"summary" or "spatial": Moments}``."""
        for name, standardizer in self.parts.items():
            standardizer.fit(moments[name])  # type: ignore[operator]

    def forward(self, features: Features) -> Features:
        """Teacher features -> standardized features."""
        return self._map(features, Standardizer.forward)

    def inverse(self, features: Features) -> Features:
        """Standardized features -> the teacher's own space."""
        return self._map(features, Standardizer.inverse)

    def _map(self, features: Features, change: Callable[[Standardizer, Tensor], Tensor]) -> Features:
        outputs = {name: change(self.parts[name], x) for name, x in features.components().items()}  # type: ignore[arg-type]
        return Features(outputs.get("summary"), outputs.get("spatial"), features.grid, features.rows)


def equal_variance_rotation(covariance: Tensor) -> Tensor:
    """An orthogonal R (C, C) with diag(R cov R^T) constant: H U^T of PHI-S.

    U is the PCA basis and H a normalised Hadamard matrix. Where none is known for C (it must be a power of two
    here), H is a product of at most C - 1 Givens rotations that equalises the diagonal, which exists for any C.
    """
    variances, basis = torch.linalg.eigh(covariance.double())
    width = len(variances)
    mix = _hadamard(width) if width & (width - 1) == 0 else _givens_equalizer(variances.clamp_min(0))
    return (mix @ basis.T).to(torch.float32)


def _hadamard(width: int) -> Tensor:
    """Sylvester's construction, orthonormal; ``width`` is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < width:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / width**0.5


def _givens_equalizer(variances: Tensor) -> Tensor:
    """Orthogonal Q (C, C) with diag(Q diag(v) Q^T) = mean(v): each rotation brings one channel to the mean.

    The channels not yet done stay mutually uncorrelated except for the pair partner that is carried on, so the
    rotation angle follows from the 2 x 2 block [[a, c], [c, b]] of the working covariance alone.
    """
    width, target = len(variances), variances.mean()
    q, covariance = torch.eye(width, dtype=torch.float64), variances.diag()
    todo = list(range(width))
    while len(todo) > 1:
        diagonal = covariance.diagonal()[todo]
        low, high = todo[int(diagonal.argmin())], todo[int(diagonal.argmax())]
        if covariance[high, high] - target <= 1e-12 * target:  # all equal already
            break
        a, b, c = covariance[low, low], covariance[high, high], covariance[low, high]
        # row low becomes cos*low + sin*high: cos^2 a + 2 sin cos c + sin^2 b = target, solved for t = sin / cos
        t = (-c + (c * c - (a - target) * (b - target)).clamp_min(0).sqrt()) / (b - target)
        cos = 1 / (1 + t * t).sqrt()
        turn = torch.stack([torch.stack([cos, t * cos]), torch.stack([-t * cos, cos])])
        pair = [low, high]
        covariance[pair] = turn @ covariance[pair]
        covariance[:, pair] = covariance[:, pair] @ turn.T
        q[pair] = turn @ q[pair]
        todo.remove(low)
    return q

"""Projectors: from layers of the student to teacher features (s2t), and from teacher features to the latent (t2s)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Features, align


class FeatureDims(NamedTuple):
    """Channels of a tap's summary and spatial features; None where it has none."""

    summary: int | None
    spatial: int | None


def mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Two linear layers with a GELU between, on vectors (..., width_in)."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


class ProjectorMLP(nn.Module):
    """Two linear layers with a GELU between, on the concatenated vectors of several layers: (B, .., d) each.

    With ``upsample`` > 1 each token becomes ``upsample`` x ``upsample`` tokens of a finer grid. The first layer gives
    each of them its own hidden vector (sub-pixel convolution, arXiv 1609.05158), so that detail within a patch need not
    pass through a resized map.
    """

    def __init__(self, d: int, layers: Sequence[str], hidden: int, width: int, upsample: int = 1):
        super().__init__()
        self.upsample = upsample
        # tokens of the finer grid are many: narrower hidden vectors let the cost grow by upsample, not its square
        self.hidden = max(hidden // upsample, 1)
        # a concatenation times one matrix is a sum of products, which needs one bias
        self.first = nn.ModuleDict(
            {layer: nn.Linear(d, self.hidden * upsample**2, bias=layer == layers[0]) for layer in layers}
        )
        self.last = nn.Linear(self.hidden, width)

    def forward(self, inputs: Mapping[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """{layer: (B, H * W, d)} on grid (H, W) -> (B, H * u * W * u, width); summaries (B, d) -> (B, width)."""
        summed = torch.stack([linear(inputs[layer]) for layer, linear in self.first.items()]).sum(0)
        if self.upsample > 1:
            (h, w), u = grid, self.upsample
            summed = summed.view(-1, h, w, u, u, self.hidden).transpose(2, 3)  # (B, H, u, W, u, hidden)
            summed = summed.reshape(-1, h * u * w * u, self.hidden)
        return self.last(F.gelu(summed))


class Projector(nn.Module):
    """s2t of one tap: independent :class:`ProjectorMLP` for summary and spatial.

    For a coarser tap the student's tokens are averaged before the projection, which costs a fraction of averaging its
    outputs.

    Args:
        d: channels of the latent.
        dims: of the tap.
        layers: of the student that are read; the latent, or several blocks (a ladder, as in UNIC).
        hidden: width between the two linear layers.
        upsample: how many times finer than the student's grid the spatial output is.
        downsample: how many times coarser it is.
    """

    def __init__(
        self, d: int, dims: FeatureDims, layers: Sequence[str], hidden: int, upsample: int = 1, downsample: int = 1
    ):
        super().__init__()
        self.upsample, self.downsample = upsample, downsample
        factors = {"summary": 1, "spatial": upsample}
        self.parts = nn.ModuleDict(
            {
                component: ProjectorMLP(d, layers, hidden, width, factors[component])
                for component, width in dims._asdict().items()
                if width
            }
        )

    def forward(self, student_features: Mapping[str, Features]) -> Features:
        """{layer: Features} -> prediction of the tap's standardized features, on a finer, equal or coarser grid."""
        inputs = {layer: avg_pool_grid(features, self.downsample) for layer, features in student_features.items()}
        first = next(iter(inputs.values()))
        h, w = first.grid
        outputs = {
            component: project({layer: features.components()[component] for layer, features in inputs.items()}, (h, w))
            for component, project in self.parts.items()
        }
        grid = (h * self.upsample, w * self.upsample)
        return Features(outputs.get("summary"), outputs.get("spatial"), grid, first.rows)


class TeacherToStudent(nn.Module):
    """t2s ``each``: one MLP per tap and component, from the teacher's standardized features to the latent."""

    def __init__(self, d: int, taps: Mapping[str, FeatureDims], hidden: int):
        super().__init__()
        self.taps = nn.ModuleDict({module_name(tap): _mlps(dims, d, hidden) for tap, dims in taps.items()})

    def forward(self, targets: Mapping[str, Features], grid: tuple[int, int]) -> dict[str, Features]:
        """{tap: standardized Features} -> {tap: latent predicted from them, on ``grid``}."""
        latents = {}
        for tap, features in targets.items():
            mlps: nn.ModuleDict = self.taps[module_name(tap)]  # type: ignore[assignment]
            outputs = {component: mlps[component](x) for component, x in align(features, grid).components().items()}
            latents[tap] = Features(outputs.get("summary"), outputs.get("spatial"), grid, features.rows)
        return latents


class JointToStudent(nn.Module):
    """t2s ``joint``: one latent predicted from all teachers of an image, MLP(LN(mean over teachers of A_t x_t)).

    A teacher without a summary or spatial component, or with weight 0 for an image, is left out of that mean.
    """

    def __init__(self, d: int, taps: Mapping[str, FeatureDims], hidden: int):
        super().__init__()
        self.taps = nn.ModuleDict({module_name(tap): _linears(dims, d) for tap, dims in taps.items()})
        present = [name for name in ("summary", "spatial") if any(getattr(dims, name) for dims in taps.values())]
        self.norms = nn.ModuleDict({component: nn.LayerNorm(d) for component in present})
        self.mlps = nn.ModuleDict({component: mlp(d, hidden, d) for component in present})

    def forward(
        self, targets: Mapping[str, Features], grid: tuple[int, int], teacher_mask: Mapping[str, Tensor]
    ) -> Features:
        """The latent (of all B images, on ``grid``) predicted from the teachers that take part.

        Args:
            targets: {tap: standardized Features}, each of the images in its ``rows``.
            grid: of the latent.
            teacher_mask: {tap: (B,) 1 where its teacher takes part, else 0}.
        """
        aligned = {tap: align(features, grid) for tap, features in targets.items()}
        outputs = {component: self._latent(component, aligned, teacher_mask) for component in self.norms}
        return Features(outputs.get("summary"), outputs.get("spatial"), grid)

    def _latent(self, component: str, aligned: Mapping[str, Features], teacher_mask: Mapping[str, Tensor]) -> Tensor:
        """(B, [N,] D): the mean over the taps of a teacher, then over the teachers of an image."""
        projected: dict[str, list[Tensor]] = {}
        for tap, features in aligned.items():
            x = features.components().get(component)
            if x is not None:
                linear = self.taps[module_name(tap)][component]  # type: ignore[index]
                projected.setdefault(teacher_name(tap), []).append(linear(x))
        total, count = torch.zeros(()), torch.zeros(())
        for teacher, tap in {teacher_name(tap): tap for tap in aligned}.items():
            if teacher in projected:
                mean = torch.stack(projected[teacher]).mean(0)  # (b, [N,] D)
                mean = scatter_rows(mean, len(teacher_mask[tap]), aligned[tap].rows)  # (B, [N,] D)
                mask = teacher_mask[tap].view(-1, *[1] * (mean.ndim - 1)).to(mean.dtype)
                total, count = total.to(mean.device) + mask * mean, count.to(mean.device) + mask
        return self.mlps[component](self.norms[component](total / count.clamp_min(1)))


def avg_pool_grid(features: Features, factor: int) -> Features:
    """The same with ``factor`` x ``factor`` tokens averaged to one.

    Where ``factor`` does not divide the grid, windows overlap: narrower windows at the edges would shift the tokens.
    """
    if factor == 1 or features.spatial is None:
        return features
    h, w = features.grid
    maps, grid = features.to_map(), (math.ceil(h / factor), math.ceil(w / factor))
    divides = h % factor == w % factor == 0
    pooled = F.avg_pool2d(maps, factor) if divides else F.adaptive_avg_pool2d(maps, grid)
    return Features.from_map(pooled, features.summary, features.rows)


def upsample_factors(grid: tuple[int, int], tap_grids: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """{tap: how many times finer than the student's ``grid`` its grid is, rounded up}, where it is finer."""
    factors = {tap: max(math.ceil(h / grid[0]), math.ceil(w / grid[1])) for tap, (h, w) in tap_grids.items()}
    return {tap: factor for tap, factor in factors.items() if factor > 1}


def downsample_factors(grid: tuple[int, int], tap_grids: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """{tap: how many times coarser than the student's ``grid`` its grid is, rounded down}, where it is coarser."""
    factors = {tap: min(grid[0] // h, grid[1] // w) for tap, (h, w) in tap_grids.items()}
    return {tap: factor for tap, factor in factors.items() if factor > 1}


def scatter_rows(x: Tensor, batch_size: int, rows: Tensor | None) -> Tensor:
    """(b, ..) of the images ``rows`` (b,) -> (B, ..) of all images, zeros elsewhere; None: ``x`` is of all images."""
    return x if rows is None else x.new_zeros(batch_size, *x.shape[1:]).index_copy(0, rows, x)


def teacher_name(tap: str) -> str:
    """``segmenter/stage3`` -> ``segmenter``."""
    return tap.split("/")[0]


def module_name(tap: str) -> str:
    """A tap's name as the name of a submodule: ``segmenter/stage3`` -> ``segmenter-stage3``."""
    return tap.replace("/", "-").replace(".", "_")


def _mlps(dims: FeatureDims, d: int, hidden: int) -> nn.ModuleDict:
    return nn.ModuleDict({component: mlp(width, hidden, d) for component, width in dims._asdict().items() if width})


def _linears(dims: FeatureDims, d: int) -> nn.ModuleDict:
    return nn.ModuleDict({component: nn.Linear(width, d) for component, width in dims._asdict().items() if width})

"""Projectors: from the student's places to a teacher's space (s2t), and from teachers to the latent (t2s)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import EVERYBODY, Asked, Features, align


class FeatureDims(NamedTuple):
    """ChannelTransform of a tap's summary and spatial features; None where it has none."""

    summary: int | None
    spatial: int | None


def mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Two linear layers with a GELU between, on vectors (..., width_in)."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


class ProjectorMLP(nn.Module):
    """Two linear layers with a GELU between, on the vectors of several places side by side: (B, .., d) each.

    With ``fine`` > 1 each vector speaks for ``fine`` x ``fine`` places of a finer grid. The first layer gives every
    finer place its own hidden vector (sub-pixel convolution, arXiv 1609.05158): what a token knows of where in its
    patch something is need not pass through a resized map.
    """

    def __init__(self, d: int, layers: Sequence[str], hidden: int, width: int, fine: int = 1):
        super().__init__()
        self.fine = fine
        self.hidden = max(hidden // fine, 1)  # the finer places are many: the cost grows by fine, not its square
        # one bias is enough for their sum
        self.first = nn.ModuleDict(
            {place: nn.Linear(d, self.hidden * fine**2, bias=place == layers[0]) for place in layers}
        )
        self.last = nn.Linear(self.hidden, width)

    def forward(self, parts: Mapping[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """{place: (B, H * W, d)} on grid (H, W) -> (B, H * f * W * f, width); summaries (B, d) -> (B, width)."""
        summed = torch.stack([layer(parts[place]) for place, layer in self.first.items()]).sum(0)
        if self.fine > 1:
            (h, w), f = grid, self.fine
            summed = summed.view(-1, h, w, f, f, self.hidden).transpose(2, 3)  # (B, H, f, W, f, hidden)
            summed = summed.reshape(-1, h * f * w * f, self.hidden)
        return self.last(F.gelu(summed))


class Projector(nn.Module):
    """s2t of one tap: independent :class:`ProjectorMLP` for summary and spatial.

    A coarse tap is told on a coarse grid: the student's places are averaged before, not its answers after, which costs
    a fraction.

    Args:
        d: latent width D.
        widths: of the tap.
        layers: places of the student; the latent, or several blocks (a ladder, as in UNIC).
        hidden: width between the two layers.
        fine: how many times finer than the student's grid the spatial answer is.
        coarse: how many times coarser it is.
    """

    def __init__(self, d: int, widths: FeatureDims, layers: Sequence[str], hidden: int, fine: int = 1, coarse: int = 1):
        super().__init__()
        self.fine, self.coarse = fine, coarse
        factors = {"summary": 1, "spatial": fine}
        self.parts = nn.ModuleDict(
            {
                part: ProjectorMLP(d, layers, hidden, width, factors[part])
                for part, width in widths._asdict().items()
                if width
            }
        )

    def forward(self, seen: Mapping[str, Features]) -> Features:
        """{place: Features} -> the tap's features in standardized space, on the student's grid, a finer or coarser."""
        near = {place: shrink(features, self.coarse) for place, features in seen.items()}
        h, w = next(iter(near.values())).grid
        told = {
            part: rungs({place: features.parts()[part] for place, features in near.items()}, (h, w))
            for part, rungs in self.parts.items()
        }
        return Features(told.get("summary"), told.get("spatial"), (h * self.fine, w * self.fine))


class TeacherToStudent(nn.Module):
    """t2s ``each``: one MLP per tap and part, from the teacher's standardized features to the latent."""

    def __init__(self, d: int, taps: Mapping[str, FeatureDims], hidden: int):
        super().__init__()
        self.taps = nn.ModuleDict({key(tap): _per_part(widths, d, hidden) for tap, widths in taps.items()})

    def forward(self, taught: Mapping[str, Features], grid: tuple[int, int]) -> dict[str, Features]:
        """{tap: standardized Features} -> {tap: guess of the latent on the student's grid}."""
        guesses = {}
        for tap, features in taught.items():
            rungs: nn.ModuleDict = self.taps[key(tap)]  # type: ignore[assignment]
            parts = {part: rungs[part](x) for part, x in align(features, grid).parts().items()}
            guesses[tap] = Features(parts.get("summary"), parts.get("spatial"), grid)
        return guesses


class JointToStudent(nn.Module):
    """t2s ``joint``: one guess of the latent from all teachers present, MLP(LN(mean over teachers of A_t x_t)).

    A teacher without a summary or spatial part, or with weight 0 for an image, is absent from that mean.
    """

    def __init__(self, d: int, taps: Mapping[str, FeatureDims], hidden: int):
        super().__init__()
        self.d = d
        self.taps = nn.ModuleDict({key(tap): _linear_per_part(widths, d) for tap, widths in taps.items()})
        present = [part for part in ("summary", "spatial") if any(getattr(w, part) for w in taps.values())]
        self.norms = nn.ModuleDict({part: nn.LayerNorm(d) for part in present})
        self.mlps = nn.ModuleDict({part: mlp(d, hidden, d) for part in present})

    def forward(
        self,
        taught: Mapping[str, Features],
        grid: tuple[int, int],
        present: Mapping[str, Tensor],
        asked: Asked = EVERYBODY,
    ) -> Features:
        """{tap: standardized Features} and {tap: (B,) 1 where it takes part, else 0} -> one guess on ``grid``.

        Args:
            asked: {teacher: (b,) the images that its Features are of}; one not named speaks of all.
        """
        aligned = {tap: align(features, grid) for tap, features in taught.items()}
        parts = {part: self._unify(part, aligned, present, asked) for part in self.norms}
        return Features(parts.get("summary"), parts.get("spatial"), grid)

    def _unify(self, part: str, aligned: Mapping[str, Features], present: Mapping[str, Tensor], asked: Asked) -> Tensor:
        """A teacher's taps speak with one voice, their mean; then the mean over the teachers present."""
        voices: dict[str, list[Tensor]] = {}
        for tap, features in aligned.items():
            x = features.parts().get(part)
            if x is not None:
                voices.setdefault(teacher_name(tap), []).append(self.taps[key(tap)][part](x))  # type: ignore[index]
        total, count = torch.zeros(()), torch.zeros(())
        for tap in {teacher_name(tap): tap for tap in aligned}.values():
            if teacher_name(tap) in voices:
                voice = torch.stack(voices[teacher_name(tap)]).mean(0)  # (b, [N,] D)
                voice = spread(voice, len(present[tap]), asked.get(teacher_name(tap)))  # (B, [N,] D)
                here = present[tap].view(-1, *[1] * (voice.ndim - 1)).to(voice.dtype)
                total, count = total.to(voice.device) + here * voice, count.to(voice.device) + here
        return self.mlps[part](self.norms[part](total / count.clamp_min(1)))


def shrink(features: Features, factor: int) -> Features:
    """The same with ``factor`` x ``factor`` places averaged to one.

    Where ``factor`` does not divide the grid, windows overlap: narrower ones at the edges would be told out of place.
    """
    if factor == 1 or features.spatial is None:
        return features
    h, w = features.grid
    maps, grid = features.to_map(), (math.ceil(h / factor), math.ceil(w / factor))
    fits = h % factor == w % factor == 0
    few = F.avg_pool2d(maps, factor) if fits else F.adaptive_avg_pool2d(maps, grid)
    return Features.from_map(few, features.summary)


def finer(own: tuple[int, int], grids: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """{tap: how many times finer than the student's ``own`` grid its is, rounded up}, of those where it is finer."""
    factors = {tap: max(math.ceil(h / own[0]), math.ceil(w / own[1])) for tap, (h, w) in grids.items()}
    return {tap: factor for tap, factor in factors.items() if factor > 1}


def coarser(own: tuple[int, int], grids: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """{tap: how many times coarser than the student's ``own`` grid its is, rounded down}, of those where it is."""
    factors = {tap: min(own[0] // h, own[1] // w) for tap, (h, w) in grids.items()}
    return {tap: factor for tap, factor in factors.items() if factor > 1}


def spread(x: Tensor, images: int, rows: Tensor | None) -> Tensor:
    """(b, ..) of the images ``rows`` (b,) -> (B, ..) of all ``images``, zeros elsewhere; None: it is of all."""
    return x if rows is None else x.new_zeros(images, *x.shape[1:]).index_copy(0, rows, x)


def teacher_name(tap: str) -> str:
    """``segmenter/stage3`` -> ``segmenter``."""
    return tap.split("/")[0]


def key(tap: str) -> str:
    """A tap's name as a module name: ``segmenter/stage3`` -> ``segmenter-stage3``."""
    return tap.replace("/", "-").replace(".", "_")


def _per_part(widths: FeatureDims, d: int, hidden: int) -> nn.ModuleDict:
    return nn.ModuleDict({part: mlp(w, hidden, d) for part, w in widths._asdict().items() if w})


def _linear_per_part(widths: FeatureDims, d: int) -> nn.ModuleDict:
    return nn.ModuleDict({part: nn.Linear(w, d) for part, w in widths._asdict().items() if w})

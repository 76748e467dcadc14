"""Models as functions: from images to Features, for a student, its base and a teacher; heads with their input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from shoulders.config.section import as_size
from shoulders.errors import RecipeError
from shoulders.features import Batch, Features, FeaturesOf
from shoulders.images import WHOLE_IMAGE, render
from shoulders.model import ShouldersModel
from shoulders.student.config import ShouldersConfig
from shoulders.student.encoder import Encoder
from shoulders.student.families import BASES
from shoulders.teachers import Teacher
from shoulders.teachers.heads import Head
from shoulders.transfer.projectors import module_name, teacher_name

if TYPE_CHECKING:
    from shoulders.tasks.frame import ModelInput
    from shoulders.tasks.task import HeadWithInput

MIN_STRIDE_PX = 8  # of a teacher's input between the tokens that a spatial probe uses


def features_of_student(student: ShouldersModel, size: tuple[int, int], base: bool = False) -> FeaturesOf:
    """The latent of a student, or of its base alone, for batches rendered at ``size`` = (h, w) px."""
    return features_of_encoder(student.encoder, size, base)


def features_of_encoder(encoder: Encoder, size: tuple[int, int], base: bool = False) -> FeaturesOf:
    """The latent of an encoder, or of its base alone, for batches rendered at ``size`` = (h, w) px."""

    def features_of(batch: Batch) -> Features:
        pixels = batch.to(encoder.mean.device).pixels(size)
        with encoder.adapters_disabled() if base else nullcontext():
            return encoder(pixels)["latent"]

    return features_of


def features_of_teacher(teacher: Teacher, spatial: bool) -> FeaturesOf:
    """The features of a teacher that a probe uses, with a spatial component where ``spatial``."""
    return all_taps(teacher) if spatial else last_tap(teacher)


def last_tap(teacher: Teacher) -> FeaturesOf:
    """A teacher's last tap: the summary where it has one, else its spatial features."""
    device, last = teacher.mean.device, list(teacher.taps)[-1]
    return lambda batch: teacher(batch.to(device).pixels(teacher.size))[last]


def all_taps(teacher: Teacher) -> FeaturesOf:
    """The spatial features of all taps, concatenated on the finest of their grids whose stride is at least 8 px."""
    device = teacher.mean.device
    grids = sorted(tap.grid for tap in teacher.taps.values() if tap.spatial is not None)  # the coarsest first
    grid = max((grid for grid in grids if grid[0] * MIN_STRIDE_PX <= teacher.size[0]), default=grids[0])

    def features_of(batch: Batch) -> Features:
        by_tap = teacher(batch.to(device).pixels(teacher.size)).values()
        maps = [_resize(features.to_map(), grid) for features in by_tap if features.spatial is not None]
        return Features.from_map(torch.cat(maps, 1))

    return features_of


def concatenated_teachers(teachers: Sequence[Teacher], spatial: bool) -> FeaturesOf:
    """The features of several teachers side by side, each with its own input: what a probe uses of each.

    Spatial features are resized to the finest of the teachers' grids, so that none of them is averaged. Numbers are as
    the teachers compute them: probes standardize each channel, or compare vectors of unit length.

    Args:
        spatial: spatial features, of teachers that all have them; else `image_vectors`.
    """
    from shoulders.tasks.vector_probes import image_vectors

    each = [features_of_teacher(teacher, spatial) for teacher in teachers]

    def features_of(batch: Batch) -> Features:
        outputs = [one(batch) for one in each]
        if not spatial:
            return Features(torch.cat([image_vectors(features) for features in outputs], 1), None)
        grid = max((features.grid for features in outputs), key=math.prod)
        return Features.from_map(torch.cat([_resize(features.to_map(), grid) for features in outputs], 1))

    return features_of


def _resize(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W): averaged where that is coarser, else bilinear."""
    if maps.shape[2] > grid[0]:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False) if maps.shape[2:] != grid else maps


def input_size(student: ShouldersModel, size: tuple[int, int] | None) -> tuple[int, int]:
    """The input size (h, w) in px of a student: ``size``, or the size of its training.

    Raises:
        RecipeError: a side is not a multiple of the patch size.
    """
    if size is None:
        return as_size(tuple(student.config.image_size))
    try:
        student.encoder.grid(size)
    except ValueError as error:
        raise RecipeError(f"--size: {error}") from None
    return size


def random_encoder(config: ShouldersConfig) -> Encoder:
    """The encoder of a student with random weights, its adapter in its initial state."""
    base_config = config.base_config()
    base = AutoModel.from_config(base_config, **BASES[base_config.model_type].build)
    return Encoder(base, dict(config.adapter or {}), config.mean, config.std)


def adapted_encoder(student: ShouldersModel, model: str, weights: Mapping[str, Tensor] | None = None) -> Encoder:
    """A copy of a student's encoder, of which only the adapter is trainable.

    Args:
        model: ``student``: with the student's adapter; ``base``: with one in its initial state, which changes nothing.
        weights: of the adapter, in place of those.
    """
    encoder = copy.deepcopy(student.encoder)
    if model == "base":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder.adapter.load_state_dict(random_encoder(student.config).adapter.state_dict())
    if weights is not None:
        encoder.adapter.load_state_dict(dict(weights))
    encoder.adapter.requires_grad_(True)
    return encoder


@dataclass(frozen=True)
class HeadInput:
    """A teacher's head together with the model that computes its input.

    Args:
        head: the head.
        size: (h, w) in px of the images that ``compute_features`` takes.
        compute_features: pixels (B, 3, h, w) in [0, 1] -> features of the head's taps, a teacher's or a student's.
        names: the class names that a zero-shot head chooses from; default: all that it keeps.
        class_map: the head's class for some classes of the data.
    """

    head: Head
    size: tuple[int, int]
    compute_features: Callable[[Tensor], dict[str, Features]]
    names: Sequence[str] | None = None
    class_map: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index."""
        return self.head.classes if self.names is None else list(self.names)

    @property
    def processor(self) -> Any:
        """The image processor of the head's teacher."""
        return self.head.processor

    @property
    def input_description(self) -> str:
        """What `draw` does with an image."""
        return f"whole image resized to {self.size[0]} x {self.size[1]} px (h x w), bicubic"

    @property
    def min_side(self) -> int:
        """Both sides of a decoded image need this many px."""
        return max(self.size)

    def draw(self, pixels: Tensor, size: tuple[int, int]) -> ModelInput:
        """The whole image at the size of the model; ``size`` is that of the original."""
        from shoulders.tasks.frame import ModelInput, whole_frame  # `predict` needs no task

        return ModelInput({"pixels": render(pixels, WHOLE_IMAGE, self.size).float() / 255}, whole_frame(size))

    def compute_output(self, pixels: Tensor) -> Any:
        """The head's own output."""
        return self.head(self.compute_features(pixels), **({} if self.names is None else {"classes": self.names}))


def has_classes(head: HeadWithInput, names: Sequence[str] | None) -> bool:
    """Whether a head keeps all these class names; False where there are none."""
    return bool(names) and set(names or ()) <= set(head.classes)


def head_on_student(student: ShouldersModel, name: str, size: tuple[int, int]) -> HeadInput:
    """A kept head on student features, for images of ``size`` = (h, w) px."""

    def compute_features(pixels: Tensor) -> dict[str, Features]:
        return head_features(student, name, student.forward_features(pixels.to(student.device)))

    return HeadInput(student.head(name), size, compute_features)


def head_on_teacher(head: Head, teacher: Teacher) -> HeadInput:
    """A teacher's head on the teacher's own features."""
    device = teacher.mean.device
    return HeadInput(head, teacher.size, lambda pixels: teacher(pixels.to(device)))


def head_features(student: ShouldersModel, name: str, layers: Mapping[str, Features]) -> dict[str, Features]:
    """{tap: features} of one teacher, predicted from {layer: features} of a student; only its projectors run."""
    return {
        tap.split("/", 1)[1]: student.standardizer(tap).inverse(student.projectors[module_name(tap)](layers))
        for tap in student.taps
        if teacher_name(tap) == name
    }


@torch.no_grad()
def run_heads(student: ShouldersModel, names: Sequence[str], pixels: Tensor) -> tuple[Features, dict[str, Any]]:
    """The latent of pixels (B, 3, h, w) in [0, 1], and each kept head's own output: the encoder runs once for all."""
    layers = student.forward_features(pixels)
    return layers["latent"], {name: student.head(name)(head_features(student, name, layers)) for name in names}

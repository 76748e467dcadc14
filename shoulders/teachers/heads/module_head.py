"""The head of a teacher that is given as ``module:`` or from Python, with the interface of the other heads.

A student's folder holds the import path of its class, its arguments and its weights, and never its code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.config.user_code import code_name, import_code
from shoulders.errors import RecipeError
from shoulders.features import Features, align
from shoulders.teachers import Tap, TaskHead, Teacher
from shoulders.teachers.checkpoint import teacher_error
from shoulders.teachers.families import TapFeatures
from shoulders.teachers.heads.head import ClassScores
from shoulders.teachers.task_head import CLASSIFICATION

IMAGES, ORIGINAL_SIZE = 2, (48, 64)  # that a head is run on before it is kept; (h, w) of the originals in px


class ModuleHead(nn.Module):
    """A head of your own: features by tap to its outputs.

    Args:
        head: the head itself.
        taps: {tap: widths and grid} of the features that it takes.
        size: (h, w) in px of its teacher's input.
    """

    def __init__(self, head: TaskHead, taps: Mapping[str, Tap], size: tuple[int, int]) -> None:
        super().__init__()
        self.head, self.taps, self.size = head, dict(taps), size
        self.processor = ModuleProcessor(head)
        self.requires_grad_(False).eval()

    @property
    def task(self) -> str:
        """The name of its task."""
        return self.head.task

    @property
    def class_name(self) -> str:
        """The name of the class of the head itself."""
        return type(self.head).__name__

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index."""
        return list(self.head.classes)

    def label(self, index: int) -> str:
        """The name of a class."""
        return self.head.classes[index]

    def forward(self, taps: TapFeatures) -> Any:
        """The outputs of the head by name; of a classifier, the scores of its classes.

        Args:
            taps: features of at least this head's taps; spatial features are resized to the head's own grid.

        Raises:
            RecipeError: the outputs are not tensors of all images, by name.
        """
        inputs = {name: align(taps[name], tap.grid) if tap.spatial else taps[name] for name, tap in self.taps.items()}
        count = len(next(part for features in inputs.values() for part in features.components().values()))
        outputs = self.head(inputs)
        if not isinstance(outputs, dict) or not all(_has_rows(value, count) for value in outputs.values()):
            raise RecipeError(f"{self.class_name}: must return {{name: tensor}} with B = {count} first in every tensor")
        if self.task != CLASSIFICATION:
            return outputs
        scores = self.head.predict(outputs, [self.size] * count, 0.0)  # (B, K)
        logits = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        return ClassScores(logits, scores, tuple(self.classes))


class ModuleProcessor:
    """The post-processing of a head of your own, under the names that image processors of transformers give it.

    Args:
        head: the head.
    """

    def __init__(self, head: TaskHead) -> None:
        self.head = head

    def post_process_object_detection(self, output: Any, threshold: float, target_sizes: list[tuple[int, int]]) -> Any:
        """``{scores, labels, boxes}`` for each image."""
        return self.head.predict(output, target_sizes, threshold)

    def post_process_semantic_segmentation(self, output: Any, target_sizes: list[tuple[int, int]]) -> Any:
        """A map (h, w) of class indices for each image."""
        return self.head.predict(output, target_sizes, 0.0)

    def post_process_instance_segmentation(
        self, output: Any, threshold: float, target_sizes: list[tuple[int, int]], return_binary_maps: bool = True
    ) -> Any:
        """Masks (n, h, w) that may overlap, and ``{label_id, score}`` of each, for each image."""
        outputs = vars(output) if isinstance(output, SimpleNamespace) else output  # of one image of a batch
        return [
            {
                "segmentation": image["masks"],
                "segments_info": [
                    {"label_id": label, "score": score}
                    for label, score in zip(image["labels"].tolist(), image["scores"].tolist(), strict=True)
                ],
            }
            for image in self.head.predict(outputs, target_sizes, threshold)
        ]


def load_module_head(name: str, teacher: Teacher) -> ModuleHead:
    """The head that a teacher of your own carries.

    Args:
        name: the teacher's name.
        teacher: the teacher.

    Raises:
        RecipeError: it carries none, or one that cannot be built again from its class, arguments and weights.
    """
    head = teacher.head
    if head is None:
        raise RecipeError(f"teachers.{name}: carries no head that can be kept; give Teacher(.., head=HEAD)")
    missing = [tap for tap in head.taps or () if tap not in teacher.taps]
    if missing:
        raise teacher_error(name, "taps", f"the head also takes {', '.join(missing)}; the teacher has no such tap")
    kept = ModuleHead(head, {tap: teacher.taps[tap] for tap in head.taps or teacher.taps}, teacher.size)
    try:
        _check_rebuilt(kept, _sample_features(teacher))
    except (ValueError, RecipeError) as error:
        raise RecipeError(f"teachers.{name}: its head cannot be kept: {error}") from error
    return kept


def describe_code(head: TaskHead) -> dict[str, Any]:
    """What builds a head again: the import path of its class, and its arguments.

    Raises:
        ValueError: the class cannot be imported by its name, or the arguments are not plain data.
    """
    try:
        is_plain = json.loads(json.dumps(head.args)) == head.args
    except TypeError:
        is_plain = False
    if not is_plain:
        raise ValueError(
            f"args of {type(head).__name__} must be plain JSON data (text, numbers, lists), got {head.args}"
        )
    return {"code": code_name(type(head)), "args": head.args}


def build_head(code: str, args: Mapping[str, Any], refused: tuple[Path, ...] = ()) -> TaskHead:
    """A head with its initial weights.

    Args:
        code: ``package.module:Class``.
        args: keyword arguments of the class.
        refused: folders whose code is never imported.

    Raises:
        ValueError: the class cannot be imported or built, or is no `TaskHead`.
    """
    kind = import_code(code, refused)
    if not (isinstance(kind, type) and issubclass(kind, TaskHead)):
        raise ValueError(f"{code} is no subclass of shoulders.TaskHead")
    try:
        return kind(**args)
    except Exception as error:  # code of the user may raise anything
        raise ValueError(f"{code} fails: {type(error).__name__}: {error}") from error


@torch.no_grad()
def _check_rebuilt(kept: ModuleHead, features: Mapping[str, Features]) -> None:
    """Refuse predictions that depend on more than class, arguments and weights of a head, and an image's features."""
    code = describe_code(kept.head)
    with torch.random.fork_rng(devices=[]):
        rebuilt = build_head(**code)
    try:
        rebuilt.load_state_dict(kept.head.state_dict(), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{code['code']}(**args) has other weights: {' '.join(str(error).split())[:200]}") from error
    again = ModuleHead(rebuilt, kept.taps, kept.size)
    predictions = _run(kept, features)
    settings = {repr((head.task, head.classes, head.head.taps)) for head in (kept, again)}
    if len(settings) > 1 or not _are_close(predictions, _run(again, features)):
        raise ValueError(
            f"{code['code']}(**args) with the same weights gives other predictions; put all that they depend on into "
            "args, parameters and buffers"
        )
    # of the same size, in which the same kernels run
    beside_itself = _run(kept, {tap: one.map(lambda x: x[:1].expand_as(x)) for tap, one in features.items()})
    if not _are_close(predictions[:1], beside_itself[:1]):
        raise ValueError("an image gets other predictions beside other images; use nothing but its own features")


def _run(head: ModuleHead, features: Mapping[str, Features]) -> list[list[Tensor]]:
    """The tensors in the predictions for each of the sample images."""
    try:
        output = head(features)
        scores = isinstance(output, ClassScores)
        predictions = output.scores if scores else head.head.predict(output, [ORIGINAL_SIZE] * IMAGES, 0.0)
    except RecipeError:
        raise
    except Exception as error:  # code of the user may raise anything
        raise ValueError(f"{head.class_name} fails: {type(error).__name__}: {error}") from error
    images = [image if isinstance(image, dict) else {"": image} for image in predictions]
    return [[image[key] for key in sorted(image)] for image in images]


def _are_close(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    pairs = [pair for images in zip(one, other, strict=True) for pair in zip(*images, strict=True)]
    return all(x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5) for x, y in pairs)


@torch.no_grad()
def _sample_features(teacher: Teacher) -> dict[str, Features]:
    """A teacher's features of random images, on the CPU."""
    pixels = torch.rand(IMAGES, 3, *teacher.size, generator=torch.Generator().manual_seed(0))
    features = teacher(pixels.to(teacher.mean.device))
    return {tap: one.map(lambda x: x.float().cpu()) for tap, one in features.items()}


def _has_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count

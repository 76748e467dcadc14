"""The task head of a teacher of your own: from its features to labels, boxes or masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.errors import RecipeError
from shoulders.features import Features

Sizes = Sequence[tuple[int, int]]  # (h, w) of each original image in px
CLASSIFICATION = "classification"  # the task whose predictions are scores of classes


class TaskHead(nn.Module, ABC):
    """A head that a student can keep: ``Teacher(MyNet(), size=(224, 224), head=MyHead(classes))``.

    It is kept by the name of its class, its arguments and its weights. So the class stands at the top level of a module
    that can be imported, and all that its predictions depend on is among ``args``, parameters and buffers.

    Args:
        task: ``classification``, ``semantic``, ``detection`` or ``instance``.
        classes: names of the K classes, by index.
        args: keyword arguments that build this head again: ``MyHead(**args)``; plain JSON data.
        taps: names of the taps that it takes; default: all of its teacher.

    Raises:
        RecipeError: there is no such task, or a class is named twice.
    """

    def __init__(
        self,
        task: str,
        classes: Sequence[str],
        args: Mapping[str, Any] | None = None,
        taps: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if task not in FORMS:
            raise RecipeError(f"TaskHead: task {task!r} is not one of {', '.join(FORMS)}")
        self.task, self.classes, self.args = task, [str(name) for name in classes], dict(args or {})
        self.taps = None if taps is None else tuple(taps)
        if not self.classes:
            raise RecipeError("TaskHead: classes is empty; name the classes in the order of their indices")

    @abstractmethod
    def forward(self, taps: Mapping[str, Features]) -> dict[str, Tensor]:
        """``{name: tensor}``, B first in every tensor, of the features of B images."""

    @abstractmethod
    def post_process(self, outputs: dict[str, Tensor], sizes: Sizes, threshold: float) -> Any:
        """Predictions for each image.

        Args:
            outputs: of :meth:`forward`.
            sizes: (h, w) in px of the B original images; boxes and masks are in their pixels.
            threshold: objects of a lower score are left out; for classes it does not apply.

        Returns:
            Classification: scores (B, K) in [0, 1]. Semantic: B maps (h, w) of class indices. Detection: B times
            ``{scores: (n,), labels: (n,), boxes: (n, 4)}``, boxes as left, top, right, bottom. Instance: B times
            ``{scores: (n,), labels: (n,), masks: (n, h, w)}``, masks of booleans.
        """

    def predict(self, outputs: dict[str, Tensor], sizes: Sizes, threshold: float) -> Any:
        """The result of :meth:`post_process`, refused where it has another form.

        Raises:
            RecipeError: naming the form that is expected.
        """
        predictions = self.post_process(outputs, sizes, threshold)
        is_valid, form = FORMS[self.task]
        if not is_valid(predictions, sizes, len(self.classes)):
            raise RecipeError(f"{type(self).__name__}.post_process: must return {form} for {self.task}")
        return predictions


def _is_tensor(value: Any, *shape: int) -> bool:
    """Whether a value is a tensor of this shape without NaN."""
    return isinstance(value, Tensor) and value.shape == shape and not bool(value.isnan().any())


def _are_indices(value: Any, n_classes: int) -> bool:
    """Whether a value is a tensor of indices of classes."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        return False
    return not value.numel() or bool(0 <= int(value.min()) and int(value.max()) < n_classes)


def _are_scores(predictions: Any, sizes: Sizes, n_classes: int) -> bool:
    if not _is_tensor(predictions, len(sizes), n_classes):
        return False
    return bool((predictions >= 0).all() and (predictions <= 1).all())


def _are_class_maps(predictions: Any, sizes: Sizes, n_classes: int) -> bool:
    if len(predictions) != len(sizes):
        return False
    pairs = zip(predictions, sizes, strict=True)
    return all(_are_indices(image, n_classes) and _is_tensor(image, *size) for image, size in pairs)


def _are_objects(predictions: Any, sizes: Sizes, n_classes: int, key: str) -> bool:
    """Whether predictions are objects of images: their scores, labels, and boxes or masks."""
    if not isinstance(predictions, Sequence) or len(predictions) != len(sizes):
        return False
    for image, size in zip(predictions, sizes, strict=True):
        if not isinstance(image, dict) or not {"scores", "labels", key} <= image.keys():
            return False
        n = len(image["scores"])
        shape = (4,) if key == "boxes" else size
        if not (
            _is_tensor(image["scores"], n) and _is_tensor(image["labels"], n) and _is_tensor(image[key], n, *shape)
        ):
            return False
        if not _are_indices(image["labels"], n_classes) or (key == "masks" and image[key].dtype != torch.bool):
            return False
    return True


def _are_boxes(predictions: Any, sizes: Sizes, n_classes: int) -> bool:
    return _are_objects(predictions, sizes, n_classes, "boxes")


def _are_masks(predictions: Any, sizes: Sizes, n_classes: int) -> bool:
    return _are_objects(predictions, sizes, n_classes, "masks")


# {task: (whether predictions have its form, the form in words)}
FORMS: dict[str, tuple[Callable[[Any, Sizes, int], bool], str]] = {
    CLASSIFICATION: (_are_scores, "a tensor of scores (B, K) in [0, 1]"),
    "semantic": (_are_class_maps, "a list of B tensors (h, w) of class indices"),
    "detection": (_are_boxes, "a list of B {scores: (n,), labels: (n,), boxes: (n, 4)}"),
    "instance": (_are_masks, "a list of B {scores: (n,), labels: (n,), masks: (n, h, w) of booleans}"),
}

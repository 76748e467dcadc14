"""A teacher's own head, run on features instead of on its encoder's output.

The head runs inside the teacher's own forward, on blank pixels, with the encoder's output replaced: masks, position
embeddings and queries are computed exactly as in the teacher. On the teacher's own features the output is the teacher's
output bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shoulders.features import Features, align
from shoulders.teachers import Tap
from shoulders.teachers.families import HeadSpec, TapFeatures


@dataclass(frozen=True)
class ClassScores:
    """How well images match classes: ``logits`` (B, K), ``scores`` (B, K) in [0, 1], the K ``classes``."""

    logits: Tensor
    scores: Tensor
    classes: tuple[str, ...]


class StubEncoder(nn.Module):
    """Takes the place of a submodule and returns the output that `stub_outputs` gives it, whatever its input.

    Args:
        output: the submodule's output for one blank image.
    """

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.blank_output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The given output."""
        return _OUTPUTS.get()[self]

    forward_with_filtered_kwargs = forward  # how some models of transformers call their backbone

    def expand_blank_output(self, count: int, device: torch.device) -> Any:
        """The output for `count` blank images: that for one, expanded without a copy."""

        def expand(value: Any) -> Any:
            return value.to(device).expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value

        return tree_map(expand, self.blank_output)


# not on the module: a head may run in several threads at once, each with features of other images
_OUTPUTS: ContextVar[Mapping[StubEncoder, Any]] = ContextVar("outputs of stub encoders")


@contextmanager
def stub_outputs(outputs: Mapping[StubEncoder, Any]) -> Iterator[None]:
    """A context in which these stubs return these outputs, in this thread alone."""
    token = _OUTPUTS.set(outputs)
    try:
        yield
    finally:
        _OUTPUTS.reset(token)


class TeacherHead(nn.Module):
    """The head of a teacher: features by tap to the model's own output.

    Args:
        model: a transformers model with its head; its encoder is removed.
        spec: where the head begins.
        taps: {tap: widths and grid} of the features that the head takes.
        size: (h, w) in px of the images that the head computes for.
        processor: the model's own image processor, for post-processing; None where it has none.
    """

    def __init__(
        self, model: Any, spec: HeadSpec, taps: Mapping[str, Tap], size: tuple[int, int], processor: Any = None
    ) -> None:
        super().__init__()
        self.model, self.spec, self.taps, self.size, self.processor = model, spec, dict(taps), size, processor
        self.encoder_path = spec.encoder_path(model)
        outputs = _blank_outputs(model, (self.encoder_path, *spec.shape_only), size, spec.forward_options)
        self.stubs = {path: StubEncoder(output) for path, output in outputs.items()}
        for path, stub in self.stubs.items():
            model.set_submodule(path, stub)
        self.requires_grad_(False).eval()

    @property
    def class_name(self) -> str:
        """The name of the model's class, such as ``SegformerForSemanticSegmentation``."""
        return type(self.model).__name__

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index."""
        return class_names(self.model.config)

    def label(self, index: int) -> str:
        """The name of a class."""
        return class_name(self.model.config, index)

    def forward(self, taps: TapFeatures, **prompts: Any) -> Any:
        """The output of the head.

        Args:
            taps: features of at least this head's taps; spatial features are resized to the head's own grid.
            prompts: further inputs of the head, such as points and boxes.
        """
        inputs = {name: align(taps[name], tap.grid) if tap.spatial else taps[name] for name, tap in self.taps.items()}
        first = next(part for features in inputs.values() for part in features.components().values())
        outputs = {stub: stub.expand_blank_output(len(first), first.device) for stub in self.stubs.values()}
        encoder = self.stubs[self.encoder_path]
        outputs[encoder] = self.spec.inject(inputs, outputs[encoder])
        pixels = torch.zeros(1, 1, 1, 1, device=first.device).expand(len(first), 3, *self.size)  # (B, 3, h, w)
        with stub_outputs(outputs):
            return self.model(pixel_values=pixels, **prompts)


def class_names(config: Any) -> list[str]:
    """The names of the classes that a model distinguishes, by index."""
    return [class_name(config, index) for index in range(max(config.id2label, default=-1) + 1)]


def class_name(config: Any, index: int) -> str:
    """The name of a class; transformers' placeholder where the config has none."""
    return str(config.id2label.get(index, f"LABEL_{index}"))


def taps_of_teacher(name: str, taps: TapFeatures) -> dict[str, Features]:
    """The features of one teacher by its own tap names: ``segmenter/stage3`` becomes ``stage3``."""
    return {tap.split("/", 1)[1]: features for tap, features in taps.items() if tap.startswith(f"{name}/")}


@torch.no_grad()
def _blank_outputs(
    model: nn.Module, paths: tuple[str, ...], size: tuple[int, int], options: Mapping[str, Any]
) -> dict[str, Any]:
    """{path: output of the submodule} when the model runs on one blank image."""
    model.eval()
    outputs: dict[str, Any] = {}

    def keep_output(path: str) -> Callable[..., None]:
        # a copy: some models change the output of their encoder in place
        return lambda module, args, output: outputs.update({path: tree_map(_copy, output)})

    handles = [model.get_submodule(path).register_forward_hook(keep_output(path)) for path in paths]
    try:
        model(pixel_values=torch.zeros(1, 3, *size), **options)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

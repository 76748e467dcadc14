"""A teacher's own head, cut off its encoder and fed with the features that the encoder would give.

The head runs inside the teacher's own forward on blank pixels, with the encoder's answer replaced: whatever the
model does around its head (masks, position embeddings, queries) stays exactly its own, and fed with the teacher's
own taps a graft gives the teacher's output bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shoulders.features import Features, align
from shoulders.teachers import Tap
from shoulders.teachers.heads.cuts import HeadSpec, Taps


class StubEncoder(nn.Module):
    """Stands where an encoder was and answers with what it was given."""

    def __init__(self, blank: Any) -> None:
        super().__init__()
        self.blank = self.answer = blank

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The answer that was laid down, whatever is asked."""
        return self.answer

    forward_with_filtered_kwargs = forward

    def blank_of(self, count: int, device: torch.device) -> Any:
        """The answer to one blank image as that to `count` of them, without a copy."""

        def repeat(value: Any) -> Any:
            return value.to(device).expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value

        return tree_map(repeat, self.blank)


class TeacherHead(nn.Module):
    """A head on features: ``graft(taps)`` is the model's own output.

    Args:
        model: a transformers model with its head; its encoder is taken out of it.
        cut: where.
        taps: {tap: widths and grid} that the head reads.
        size: (h, w) in px that the head believes the images to have.
        processor: the model's own image processor, for what comes after the head; None where there is none.
    """

    def __init__(
        self, model: Any, cut: HeadSpec, taps: Mapping[str, Tap], size: tuple[int, int], processor: Any = None
    ) -> None:
        super().__init__()
        self.model, self.cut, self.taps, self.size, self.processor = model, cut, dict(taps), size, processor
        self.encoder = cut.encoder_of(model)
        blanks = _answers(model, (self.encoder, *cut.silent), size, cut.call)
        self.replays = {path: StubEncoder(blank) for path, blank in blanks.items()}
        for path, replay in self.replays.items():
            model.set_submodule(path, replay)
        self.requires_grad_(False).eval()

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index."""
        return [self.label(index) for index in range(max(self.model.config.id2label, default=-1) + 1)]

    def label(self, index: int) -> str:
        """The name of a class; as transformers makes it up where the config has none."""
        return str(self.model.config.id2label.get(index, f"LABEL_{index}"))

    def forward(self, taps: Taps, **prompts: Any) -> Any:
        """The output of the head.

        Args:
            taps: at least the taps of this head; spatial features on any grid are resized to the head's own.
            prompts: what the head takes beside the image, such as points and boxes.
        """
        read = {tap: align(taps[tap], facts.grid) if facts.spatial else taps[tap] for tap, facts in self.taps.items()}
        first = next(part for features in read.values() for part in features.parts().values())
        for replay in self.replays.values():
            replay.answer = replay.blank_of(len(first), first.device)
        encoder = self.replays[self.encoder]
        encoder.answer = self.cut.write(read, encoder.answer)
        pixels = torch.zeros(1, 1, 1, 1, device=first.device).expand(len(first), 3, *self.size)
        return self.model(pixel_values=pixels, **prompts)


def taps_of_teacher(name: str, told: Taps) -> dict[str, Features]:
    """The features of one teacher under its own names: ``segmenter/stage3`` -> ``stage3``."""
    return {tap.split("/", 1)[1]: features for tap, features in told.items() if tap.startswith(f"{name}/")}


@torch.no_grad()
def _answers(
    model: nn.Module, paths: tuple[str, ...], size: tuple[int, int], call: Mapping[str, Any]
) -> dict[str, Any]:
    """What submodules answer when the model sees one blank image."""
    model.eval()
    told: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        # a copy: some models go on to change what their encoder gave them
        return lambda module, args, answer: told.update({path: tree_map(_copy, answer)})

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        model(pixel_values=torch.zeros(1, 3, *size), **call)
    finally:
        for handle in handles:
            handle.remove()
    return told


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

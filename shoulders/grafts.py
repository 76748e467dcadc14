"""Grafts: a teacher's own head, cut off its encoder and fed with the features that the encoder would give.

The head runs inside the teacher's own forward on blank pixels, with the encoder's answer replaced: whatever the
model does around its head (masks, position embeddings, queries) stays exactly its own, and fed with the teacher's
own taps a graft gives the teacher's output bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shoulders.features import Features
from shoulders.hub import load_strict, quiet
from shoulders.recipe import TeacherSpec
from shoulders.teachers import Tap, Teacher
from shoulders.teachers.checkpoint import Checkpoint, fault, read_checkpoint
from shoulders.transfer.align import align

Taps = Mapping[str, Features]
Write = Callable[[list[Features], Any], Any]


@dataclass(frozen=True)
class Cut:
    """Where the head of a family begins.

    Args:
        encoder: path, in the model with its head, of the submodule whose answer is replaced.
        write: (features of the taps, finest first; the submodule's answer to blank pixels) -> its answer.
        silent: submodules before it, of whose answers only the shapes matter.
        every_tap: the head reads all taps of the family, not its default ones.
    """

    encoder: str
    write: Write
    silent: tuple[str, ...] = ()
    every_tap: bool = False


def write_pooled(taps: list[Features], blank: Any) -> Any:
    """A summary alone is read, in whatever shape the family gives it."""
    summary = taps[-1].parts()["summary"]
    return _changed(blank, pooler_output=summary.view(len(summary), *blank.pooler_output.shape[1:]))


def write_tokens(taps: list[Features], blank: Any) -> Any:
    """(B, P + N, C): CLS first, patch tokens last; tokens between them, which no head reads, stay blank."""
    parts, tokens = taps[-1].parts(), blank.last_hidden_state.clone()
    tokens[:, 0] = parts["summary"]
    if "spatial" in parts:
        tokens[:, -parts["spatial"].shape[1] :] = parts["spatial"]
    return _changed(blank, last_hidden_state=tokens)


def write_hidden_maps(taps: list[Features], blank: Any) -> Any:
    """Maps (B, C, H, W) as hidden states."""
    return _changed(blank, hidden_states=_maps(taps, blank.hidden_states))


def write_feature_maps(taps: list[Features], blank: Any) -> Any:
    """Maps (B, C, H, W) as a backbone gives them."""
    return _changed(blank, feature_maps=_maps(taps, blank.feature_maps))


def write_feature_tokens(taps: list[Features], blank: Any) -> Any:
    """(B, 1 + N, C) as a ViT backbone gives them."""
    both = [tap.parts() for tap in taps]
    tokens = tuple(torch.cat([parts["summary"][:, None], parts["spatial"]], 1) for parts in both)
    return _changed(blank, feature_maps=tokens)


def write_sequence(taps: list[Features], blank: Any) -> Any:
    """All places of all levels in one sequence (B, N, C), finest level first."""
    return _changed(blank, last_hidden_state=torch.cat([tap.parts()["spatial"] for tap in taps], 1))


def write_pyramid(taps: list[Features], blank: Any) -> Any:
    """A list of maps (B, C, H, W)."""
    return _changed(blank, last_hidden_state=list(_maps(taps, blank.last_hidden_state)))


def write_map(taps: list[Features], blank: Any) -> Any:
    """One map (B, C, H, W)."""
    return _changed(blank, last_hidden_state=_maps(taps[-1:], [blank.last_hidden_state])[0])


def write_fpn(taps: list[Features], blank: Any) -> Any:
    """The pyramid of SAM 2, whose position encodings depend on the shapes alone."""
    return _changed(blank, fpn_hidden_states=_maps(taps, blank.fpn_hidden_states))


def _changed(blank: Any, **fields: Any) -> Any:
    """The answer to blank images with some of its fields replaced."""
    return type(blank)(**{**blank, **fields})


def _maps(taps: list[Features], blank: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Maps (B, C, H, W) laid out in memory like the encoder's own: another layout rounds differently."""
    maps = []
    for tap, like in zip(taps, blank, strict=True):
        last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        maps.append(tap.to_map().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))
    return tuple(maps)


def _detector(write: Write) -> Cut:
    return Cut("model.encoder", write, silent=("model.backbone",))


_PIXEL_ENCODER = Cut("model.pixel_level_module.encoder", write_feature_maps)

# model type -> where to cut. YOLOS, EoMT: queries are tokens of the encoder itself, there is no place to cut.
CUTS: dict[str, Cut] = {
    "vit": Cut("vit", write_tokens),
    "deit": Cut("deit", write_tokens),
    "beit": Cut("beit", write_pooled),
    "dinov2": Cut("dinov2", write_tokens),
    "dinov2_with_registers": Cut("dinov2_with_registers", write_tokens),
    "resnet": Cut("resnet", write_pooled),
    "regnet": Cut("regnet", write_pooled),
    "convnext": Cut("convnext", write_pooled),
    "convnextv2": Cut("convnextv2", write_pooled),
    "swin": Cut("swin", write_pooled),
    "swinv2": Cut("swinv2", write_pooled),
    "hiera": Cut("hiera", write_pooled),
    "mobilenet_v2": Cut("mobilenet_v2", write_pooled),
    "segformer": Cut("segformer", write_hidden_maps),
    "upernet": Cut("backbone", write_feature_maps),
    "mask2former": _PIXEL_ENCODER,
    "maskformer": _PIXEL_ENCODER,
    "sam": Cut("vision_encoder", write_map),
    "sam2": Cut("vision_encoder", write_fpn, every_tap=True),
    "detr": _detector(write_sequence),
    "conditional_detr": _detector(write_sequence),
    "deformable_detr": _detector(write_sequence),
    "rt_detr": _detector(write_pyramid),
    "rt_detr_v2": _detector(write_pyramid),
    "d_fine": _detector(write_pyramid),
    "depth_anything": Cut("backbone", write_feature_tokens),
}


class Replay(nn.Module):
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


class Graft(nn.Module):
    """A head on features: ``graft(taps)`` is the model's own output.

    Args:
        model: a transformers model with its head; its encoder is taken out of it.
        cut: where.
        taps: {tap: widths and grid} that the head reads.
        size: (h, w) in px that the head believes the images to have.
        processor: the model's own image processor, for what comes after the head; None where there is none.
    """

    def __init__(
        self, model: Any, cut: Cut, taps: Mapping[str, Tap], size: tuple[int, int], processor: Any = None
    ) -> None:
        super().__init__()
        self.model, self.cut, self.taps, self.size, self.processor = model, cut, dict(taps), size, processor
        blanks = _answers(model, (cut.encoder, *cut.silent), size)
        self.replays = {path: Replay(blank) for path, blank in blanks.items()}
        for path, replay in self.replays.items():
            model.set_submodule(path, replay)
        self.requires_grad_(False).eval()

    def forward(self, taps: Taps, **prompts: Any) -> Any:
        """The output of the head.

        Args:
            taps: at least the taps of this head; spatial features on any grid are resized to the head's own.
            prompts: what the head takes beside the image, such as points and boxes.
        """
        read = [align(taps[tap], facts.grid) if facts.spatial else taps[tap] for tap, facts in self.taps.items()]
        first = next(iter(read[0].parts().values()))
        for replay in self.replays.values():
            replay.answer = replay.blank_of(len(first), first.device)
        encoder = self.replays[self.cut.encoder]
        encoder.answer = self.cut.write(read, encoder.answer)
        pixels = torch.zeros(1, 1, 1, 1, device=first.device).expand(len(first), 3, *self.size)
        return self.model(pixel_values=pixels, **prompts)


def check_graft(name: str, spec: TeacherSpec) -> None:
    """Refuse a teacher without a head that can be cut off, before any weights are read.

    Raises:
        RecipeError: the line begins with ``teachers.<name>.``.
    """
    if spec.module is not None:
        raise fault(name, "module", "a module of your own has no head that could be inherited")
    checkpoint = read_checkpoint(name, spec)
    if checkpoint.config.model_type not in CUTS or head_class(checkpoint.config) is None:
        raise fault(
            name,
            "model",
            f"{spec.model!r} ({checkpoint.config.model_type}) has no head that can be inherited; give a checkpoint of "
            f"one of {', '.join(sorted(CUTS))}, saved with its head",
        )
    missing = [tap for tap in _read_by_head(checkpoint) if tap not in checkpoint.taps]
    if missing:
        raise fault(name, "taps", f"the head also reads {', '.join(missing)}; add them, or leave the key out")


def load_graft(name: str, spec: TeacherSpec, teacher: Teacher) -> Graft:
    """The head of a teacher, from the teacher's own checkpoint.

    Raises:
        RecipeError: as `check_graft`.
        DataError: weights of the head are missing or broken.
    """
    check_graft(name, spec)
    checkpoint = read_checkpoint(name, spec)
    model = load_strict(checkpoint.pretrained, head_class(checkpoint.config), checkpoint.config)
    taps = {tap: teacher.taps[tap] for tap in _read_by_head(checkpoint)}
    processor = read_processor(checkpoint.pretrained.source, checkpoint.pretrained.revision)
    return Graft(model, CUTS[checkpoint.config.model_type], taps, teacher.size, processor)


def read_processor(source: str, revision: str | None = None) -> Any:
    """The image processor of a checkpoint, or None where it has none that loads here."""
    try:
        with quiet():
            return transformers.AutoImageProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError):
        return None


def head_class(config: Any) -> Any:
    """The transformers class that a checkpoint was saved as, where that is a model with a head; else None."""
    architecture = (config.architectures or [""])[0]
    headed = architecture.endswith(("ForImageClassification", "Detection", "Segmentation", "DepthEstimation"))
    return getattr(transformers, architecture, None) if headed or architecture in ("SamModel", "Sam2Model") else None


def taps_of(name: str, told: Taps) -> dict[str, Features]:
    """The features of one teacher under its own names: ``segmenter/stage3`` -> ``stage3``."""
    return {tap.split("/", 1)[1]: features for tap, features in told.items() if tap.startswith(f"{name}/")}


def _read_by_head(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The taps that a head reads."""
    family = checkpoint.family.taps
    every = CUTS[checkpoint.config.model_type].every_tap
    return (family.names if every else family.chosen)(checkpoint.image_config)


@torch.no_grad()
def _answers(model: nn.Module, paths: tuple[str, ...], size: tuple[int, int]) -> dict[str, Any]:
    """What submodules answer when the model sees one blank image."""
    model.eval()
    told: dict[str, Any] = {}

    def keep(path: str) -> Callable[..., None]:
        # a copy: some models go on to change what their encoder gave them
        return lambda module, args, answer: told.update({path: tree_map(_copy, answer)})

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        model(pixel_values=torch.zeros(1, 3, *size))
    finally:
        for handle in handles:
            handle.remove()
    return told


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

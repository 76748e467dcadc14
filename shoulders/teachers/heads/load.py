"""From a recipe's teacher to its head, and all that can be refused before any weights are read."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import transformers

from shoulders.config.recipe import TeacherSpec
from shoulders.hub import Pretrained, load_strict, quiet, read_json
from shoulders.teachers import Teacher
from shoulders.teachers.checkpoint import Checkpoint, fault, read_checkpoint
from shoulders.teachers.heads.cuts import HEADS
from shoulders.teachers.heads.head import TeacherHead
from shoulders.teachers.heads.zero_shot import PADDING, ZeroShot, check_zero_shot, load_zero_shot

Head = TeacherHead | ZeroShot
HEADED = ("ForImageClassification", "Detection", "Segmentation", "DepthEstimation", "SamModel", "Sam2Model")
# an image processor that needs torchvision -> one that does the same after the head without it
STAND_INS = {"RfDetrImageProcessor": "RTDetrImageProcessor", "Sam2ImageProcessor": "SamImageProcessor"}


def check_head(name: str, spec: TeacherSpec) -> None:
    """Refuse a teacher without a head that can be kept, before any weights are read.

    Raises:
        RecipeError: the line begins with ``teachers.<name>.``.
    """
    if spec.module is not None:
        raise fault(name, "module", "a module of your own has no head that could be inherited")
    checkpoint = read_checkpoint(name, spec)
    if checkpoint.row in PADDING:
        check_zero_shot(name, spec.classes, checkpoint)
        return
    if spec.classes or spec.prompts:
        raise fault(name, "classes", f"{spec.model!r} has classes of its own; leave classes and prompts out")
    if not _has_head(checkpoint):
        raise fault(
            name,
            "model",
            f"{spec.model!r} ({checkpoint.config.model_type}) has no head that can be inherited; give a checkpoint of "
            f"one of {', '.join(sorted((*HEADS, *PADDING)))}, saved with its head{_other_kind(checkpoint)}",
        )
    needs = HEADS[checkpoint.row].needs
    if needs and find_spec(needs) is None:
        raise fault(name, "model", f"{spec.model!r}: its head needs {needs}: pip install {needs}")
    refusal = HEADS[checkpoint.row].refusal(checkpoint.config, checkpoint.preprocessing.size)
    if refusal:
        raise fault(name, "model", f"{spec.model!r}: {refusal}")
    missing = [tap for tap in _read_by_head(checkpoint) if tap not in checkpoint.taps]
    if missing:
        needed = ", ".join(_read_by_head(checkpoint))
        raise fault(name, "taps", f"the head also reads {', '.join(missing)}; give at least taps: [{needed}]")


def load_head(name: str, spec: TeacherSpec, teacher: Teacher) -> Head:
    """The head of a teacher, from the teacher's own checkpoint.

    Raises:
        RecipeError: as `check_head`.
        DataError: weights of the head are missing or broken.
    """
    check_head(name, spec)
    checkpoint = read_checkpoint(name, spec)
    taps = {tap: teacher.taps[tap] for tap in _read_by_head(checkpoint)}
    if spec.classes:
        return load_zero_shot(checkpoint, spec.classes, spec.prompts, taps)
    model = load_strict(checkpoint.pretrained, head_class(checkpoint.config), checkpoint.config)
    processor = read_processor(checkpoint.pretrained.source, checkpoint.pretrained.revision)
    return TeacherHead(model, HEADS[checkpoint.row], taps, teacher.size, processor)


def read_processor(source: str, revision: str | None = None) -> Any:
    """The image processor of a checkpoint, or None where it has none that loads here."""
    try:
        with quiet():
            return transformers.AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        told = read_json(Pretrained("", source, revision), "preprocessor_config.json") or {}
        stand_in = STAND_INS.get(str(told.get("image_processor_type")).removesuffix("Fast"))
        return getattr(transformers, stand_in)() if stand_in else None


def _other_kind(checkpoint: Checkpoint) -> str:
    """What is said where there is a head, but of another kind."""
    kind, cut = head_class(checkpoint.config), HEADS.get(checkpoint.row)
    return f" ({cut.heads[0]}, not {kind.__name__})" if kind and cut and cut.heads else ""


def _has_head(checkpoint: Checkpoint) -> bool:
    """Whether it was saved with a head of a kind that can be cut off."""
    kind, cut = head_class(checkpoint.config), HEADS.get(checkpoint.row)
    return kind is not None and cut is not None and kind.__name__.endswith(cut.heads or HEADED)


def head_class(config: Any) -> Any:
    """The transformers class that a checkpoint was saved as, where that is a model with a head; else None."""
    architecture = (config.architectures or [""])[0]
    return getattr(transformers, architecture, None) if architecture.endswith(HEADED) else None


def _read_by_head(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The taps that a head reads."""
    return checkpoint.family.taps.of_head(checkpoint.image_config)

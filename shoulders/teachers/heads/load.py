"""From a teacher's entry in a recipe to its head, and all checks that come before weights are read."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import transformers

from shoulders.config.sections import TeacherSpec
from shoulders.hub import Pretrained, load_strict, quiet, read_json
from shoulders.teachers import Teacher
from shoulders.teachers.checkpoint import Checkpoint, read_checkpoint, teacher_error
from shoulders.teachers.families import FAMILIES, HeadSpec
from shoulders.teachers.heads.head import TeacherHead
from shoulders.teachers.heads.module_head import ModuleHead, load_module_head
from shoulders.teachers.heads.zero_shot import ZeroShot, check_zero_shot, load_zero_shot

Head = TeacherHead | ZeroShot | ModuleHead
# how the class names of models with a task head end
HEAD_CLASS_ENDINGS = (
    "ForImageClassification",
    "ForImageClassificationWithTeacher",
    "Detection",
    "Segmentation",
    "DepthEstimation",
    "SamModel",
    "Sam2Model",
)
# an image processor that needs torchvision -> one with the same post-processing that does not
PROCESSORS_WITHOUT_TORCHVISION = {
    "RfDetrImageProcessor": "RTDetrImageProcessor",
    "Sam2ImageProcessor": "SamImageProcessor",
}


def check_head(name: str, spec: TeacherSpec) -> None:
    """Refuse a teacher without a head that can be kept, before any weights are read.

    Whether a teacher given as ``module:`` carries one is known when it is built: `load_head`.

    Args:
        name: the teacher's name in the recipe.
        spec: its entry there.

    Raises:
        RecipeError: the line begins with ``teachers.<name>.``.
    """
    if spec.module is not None:
        if spec.classes or spec.prompts:
            raise teacher_error(name, "classes", "a head of your own has its classes; leave classes and prompts out")
        return
    checkpoint = read_checkpoint(name, spec)
    if checkpoint.family.zero_shot:
        check_zero_shot(name, spec.classes, checkpoint)
        return
    if spec.classes or spec.prompts:
        message = f"{spec.model!r} has classes of its own; leave classes and prompts out"
        raise teacher_error(name, "classes", message)
    head = _head_spec(name, checkpoint)
    if head.requires and find_spec(head.requires) is None:
        message = f"{spec.model!r}: its head needs {head.requires}: pip install {head.requires}"
        raise teacher_error(name, "model", message)
    if refusal := head.refuse(checkpoint.config, checkpoint.preprocessing.size):
        raise teacher_error(name, "model", f"{spec.model!r}: {refusal}")
    head_taps = _head_taps(checkpoint)
    if missing := [tap for tap in head_taps if tap not in checkpoint.taps]:
        message = f"the head also takes {', '.join(missing)}; give at least taps: [{', '.join(head_taps)}]"
        raise teacher_error(name, "taps", message)


def load_head(name: str, spec: TeacherSpec | None, teacher: Teacher) -> Head:
    """The head of a teacher, from the teacher's own checkpoint, or the one that it carries.

    Args:
        name: the teacher's name in the recipe.
        spec: its entry there; None for a teacher given from Python.
        teacher: the loaded teacher, for the shapes of its taps.

    Raises:
        RecipeError: as `check_head` and `load_module_head`.
        DataError: weights of the head are missing or damaged.
    """
    if spec is None:
        return load_module_head(name, teacher)
    check_head(name, spec)
    if spec.module is not None:
        return load_module_head(name, teacher)
    checkpoint = read_checkpoint(name, spec)
    taps = {tap: teacher.taps[tap] for tap in _head_taps(checkpoint)}
    if spec.classes:
        return load_zero_shot(checkpoint, spec.classes, spec.prompts, taps)
    model = load_strict(checkpoint.pretrained, head_class(checkpoint.config), checkpoint.config)
    processor = read_processor(checkpoint.pretrained.source, checkpoint.pretrained.revision)
    return TeacherHead(model, _head_spec(name, checkpoint), taps, teacher.size, processor)


def read_processor(source: str, revision: str | None = None) -> Any:
    """The image processor of a checkpoint or one with the same post-processing; None where none loads here."""
    if (processor := read_own_processor(source, revision)) is not None:
        return processor
    settings = read_json(Pretrained("", source, revision), "preprocessor_config.json") or {}
    class_name = str(settings.get("image_processor_type")).removesuffix("Fast")
    substitute = PROCESSORS_WITHOUT_TORCHVISION.get(class_name)
    return getattr(transformers, substitute)() if substitute else None


def read_own_processor(source: str, revision: str | None = None) -> Any:
    """The image processor of a checkpoint, or None where it has none that can be loaded on this machine."""
    try:
        with quiet():
            return transformers.AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None


def head_class(config: Any) -> Any:
    """The transformers class that a checkpoint was saved as, where that is a model with a task head; else None."""
    architecture = (config.architectures or [""])[0]
    return getattr(transformers, architecture, None) if architecture.endswith(HEAD_CLASS_ENDINGS) else None


def _head_spec(name: str, checkpoint: Checkpoint) -> HeadSpec:
    """Where the head of a checkpoint begins; refused where it was saved without one, or with one of another kind."""
    model_class, spec = head_class(checkpoint.config), checkpoint.family.head
    if model_class and spec and model_class.__name__.endswith(spec.class_endings or HEAD_CLASS_ENDINGS):
        return spec
    other_kind = f" ({spec.class_endings[0]}, not {model_class.__name__})" if model_class and spec else ""
    families = sorted(row for row, family in FAMILIES.items() if family.head or family.zero_shot)
    raise teacher_error(
        name,
        "model",
        f"{checkpoint.pretrained.source!r} ({checkpoint.config.model_type}) has no head that can be kept; give a "
        f"checkpoint of one of {', '.join(families)}, saved with its head{other_kind}",
    )


def _head_taps(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The taps that a head takes."""
    return checkpoint.family.taps.head_names(checkpoint.image_config)

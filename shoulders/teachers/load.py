"""From a recipe's teacher to a loaded Teacher, and all that can be refused before that."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from shoulders.config.recipe import TeacherSpec
from shoulders.config.user_code import call_function, check_function
from shoulders.errors import DataError, RecipeError
from shoulders.features import Features
from shoulders.hub import load_strict
from shoulders.hub.fast import arranged, int8_available, optimize_for_inference, to_int8
from shoulders.teachers.checkpoint import Checkpoint, fault, read_checkpoint
from shoulders.teachers.families import REMOTE
from shoulders.teachers.teacher import Teacher, check_answer


class Encoder(nn.Module):
    """The encoder of a checkpoint, answering with the taps asked for."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = model
        self.family = checkpoint.family
        self.config = checkpoint.image_config
        self.wanted = checkpoint.taps
        self.deep = any(tap.startswith("block") for tap in checkpoint.taps)

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        """``{tap: Features}`` for normalised pixels (B, 3, h, w)."""
        output = self.family.call(self.model, arranged(pixels), self.deep)
        taps = self.family.read(output, self.config, (pixels.shape[2], pixels.shape[3]))
        return {tap: taps[tap] for tap in self.wanted}


def check_teacher(name: str, spec: TeacherSpec) -> None:
    """Refuse what can be known to fail from config.json alone, before any weights are read.

    Raises:
        RecipeError: in one line that begins with ``teachers.<name>.<key>:``.
    """
    _check_int8(name, spec)
    if spec.module is None:
        read_checkpoint(name, spec)
        return
    if spec.size is not None:
        raise fault(name, "size", "a teacher built by module: sets its own size; leave the key out")
    try:
        check_function(spec.module)
    except ValueError as error:
        raise fault(name, "module", str(error)) from error


def _check_int8(name: str, spec: TeacherSpec) -> None:
    if spec.int8 and not int8_available():
        raise fault(name, "int8", "needs a CPU with VNNI, a torch that uses it, and no GPU; leave the key out")


def load_teacher(name: str, spec: TeacherSpec) -> Teacher:
    """Load a teacher's weights (safetensors only, float32) and freeze it.

    Raises:
        RecipeError: the recipe's teacher cannot work; see ``check_teacher``.
        DataError: the weights are broken, or lack parts of the encoder.
    """
    if spec.module is not None:
        check_teacher(name, spec)
        return _build_own(name, spec)
    _check_int8(name, spec)
    checkpoint = read_checkpoint(name, spec)
    source = checkpoint.pretrained.source
    model = _load_encoder(checkpoint)
    if spec.int8:
        to_int8(model)
    try:
        return Teacher(
            Encoder(model, checkpoint),
            size=checkpoint.preprocessing.size,
            mean=checkpoint.preprocessing.mean,
            std=checkpoint.preprocessing.std,
            license=checkpoint.license,
            source=source,
            revision=checkpoint.pretrained.revision,
        )
    except RecipeError as error:
        raise DataError(f"teachers.{name}.model: {source!r}: {error}") from error
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:  # of a model's own forward
        if any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        h, w = checkpoint.preprocessing.size
        why = " ".join(str(error).split())[:300]
        raise DataError(f"teachers.{name}.model: {source!r} cannot be asked about {h} x {w} px: {why}") from error


def _load_encoder(checkpoint: Checkpoint) -> nn.Module:
    """The part of the checkpoint's model that is asked, strictly loaded."""
    family = checkpoint.family
    architecture = (checkpoint.config.architectures or [""])[0]
    model = load_strict(
        checkpoint.pretrained,
        getattr(transformers, family.model_by_architecture.get(architecture, family.model)),
        checkpoint.image_config if family.part and not family.encoder else checkpoint.config,
        inside=f"{family.encoder}." if family.encoder else "",
        apart_from=tuple(f"{path}." for path in family.unused),
        remote_code=family is REMOTE,
        **family.options,
        **({"add_pooling_layer": False} if family.pooled and architecture not in ("", *family.pooled) else {}),
    )
    for path in family.unused:
        setattr(model, path, nn.Identity())
    optimize_for_inference(model)
    return model.get_submodule(family.encoder)


def _build_own(name: str, spec: TeacherSpec) -> Teacher:
    """Call ``package.module:function`` and hold what it returns against the contract."""
    try:
        teacher = call_function(str(spec.module))
    except ValueError as error:
        raise fault(name, "module", str(error)) from error
    if not isinstance(teacher, Teacher):
        raise fault(name, "module", f"{spec.module} must return a shoulders Teacher, got {type(teacher).__name__}")
    try:
        check_answer(teacher(torch.rand(2, 3, *teacher.size, generator=torch.Generator().manual_seed(0))), 2)
        if spec.taps is None:
            return teacher
        unknown = [tap for tap in spec.taps if tap not in teacher.taps]
    except RecipeError as error:
        raise fault(name, "module", f"{spec.module}: {error}") from error
    if unknown:
        allowed = ", ".join(teacher.taps)
        raise fault(name, "taps", f"no tap {', '.join(unknown)}; {spec.module} has {allowed}")
    return teacher.with_taps(spec.taps)

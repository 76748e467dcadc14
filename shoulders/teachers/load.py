"""From a teacher's entry in a recipe to a loaded `Teacher`, and all checks that come before."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from shoulders.config.sections import TeacherSpec
from shoulders.config.user_code import call_function, check_function
from shoulders.errors import DataError, RecipeError
from shoulders.features import Features
from shoulders.hub import load_strict
from shoulders.hub.fast import int8_available, optimize_for_inference, to_fast_layout, to_int8
from shoulders.teachers.checkpoint import Checkpoint, read_checkpoint, teacher_error
from shoulders.teachers.families import REMOTE
from shoulders.teachers.pure import check_pure
from shoulders.teachers.teacher import Teacher, check_output


class Encoder(nn.Module):
    """The encoder of a checkpoint: normalized pixels (B, 3, h, w) to ``{tap: Features}``.

    Args:
        model: the loaded encoder.
        checkpoint: what is known of it; gives the family, the config and the taps.
        fast_layout: bring pixels into the memory layout in which convolutions run faster.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, fast_layout: bool = True) -> None:
        super().__init__()
        self.model = model
        self.family = checkpoint.family
        self.config = checkpoint.image_config
        self.taps = checkpoint.taps
        self.fast_layout = fast_layout
        self.needs_hidden_states = any(tap.startswith("block") for tap in checkpoint.taps)

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        """``{tap: Features}`` for normalized pixels (B, 3, h, w)."""
        size = (pixels.shape[2], pixels.shape[3])
        pixels = to_fast_layout(pixels) if self.fast_layout else pixels
        output = self.family.forward(self.model, pixels, self.needs_hidden_states)
        features = self.family.extract(output, self.config, size)
        return {tap: features[tap] for tap in self.taps}


def check_teacher(name: str, spec: TeacherSpec, has_int8: bool | None = None) -> None:
    """Refuse a teacher that cannot work, before any weights are read.

    Args:
        name: the teacher's name in the recipe.
        spec: its entry there.
        has_int8: whether the machine computes faster in int8; None: as `int8_available` finds.

    Raises:
        RecipeError: in one line that begins with ``teachers.<name>.<key>:``.
    """
    _check_int8(name, spec, int8_available() if has_int8 is None else has_int8)
    if spec.module is None:
        read_checkpoint(name, spec)
        return
    if spec.size is not None:
        raise teacher_error(name, "size", "a teacher built by module: sets its own size; leave the key out")
    try:
        check_function(spec.module)
    except ValueError as error:
        raise teacher_error(name, "module", str(error)) from error


def _check_int8(name: str, spec: TeacherSpec, has_int8: bool) -> None:
    if spec.int8 and not has_int8:
        raise teacher_error(name, "int8", "needs a CPU with VNNI, a torch that uses it, and no GPU; leave the key out")


def load_teacher(name: str, spec: TeacherSpec, optimize: bool = True) -> Teacher:
    """Load a teacher's weights (safetensors only, float32) and freeze it.

    Args:
        name: the teacher's name in the recipe.
        spec: its entry there.
        optimize: run it faster on CPUs, in bf16 with the rounding of other operators.

    Raises:
        RecipeError: as `check_teacher`.
        DataError: the weights are damaged, or lack parts of the encoder.
    """
    if spec.module is not None:
        check_teacher(name, spec)
        return _build_from_module(name, spec)
    _check_int8(name, spec, int8_available())
    checkpoint = read_checkpoint(name, spec)
    model = _load_encoder(checkpoint, optimize)
    if spec.int8:
        to_int8(model)
    model_name = f"teachers.{name}.model: {checkpoint.pretrained.source!r}"
    try:
        teacher = _to_teacher(Encoder(model, checkpoint, optimize), checkpoint)
        if checkpoint.family is REMOTE:
            check_pure(name, teacher)
        return teacher
    except RecipeError as error:
        raise DataError(f"{model_name}: {error}") from error
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:  # of a model's own forward
        if any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        h, w = checkpoint.preprocessing.size
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{model_name} cannot be run on {h} x {w} px: {reason}") from error


def _to_teacher(encoder: Encoder, checkpoint: Checkpoint) -> Teacher:
    return Teacher(
        encoder,
        size=checkpoint.preprocessing.size,
        mean=checkpoint.preprocessing.mean,
        std=checkpoint.preprocessing.std,
        license=checkpoint.license,
        source=checkpoint.pretrained.source,
        revision=checkpoint.pretrained.revision,
    )


def _load_encoder(checkpoint: Checkpoint, optimize: bool) -> nn.Module:
    """The encoder in the checkpoint's model, strictly loaded."""
    family = checkpoint.family
    architecture = (checkpoint.config.architectures or [""])[0]
    class_name = family.model_class_by_architecture.get(architecture, family.model_class)
    model = load_strict(
        checkpoint.pretrained,
        getattr(transformers, class_name),
        checkpoint.image_config if family.image_config and not family.encoder else checkpoint.config,
        required_prefix=f"{family.encoder}." if family.encoder else "",
        optional_prefixes=tuple(f"{path}." for path in family.unused),
        remote_code=family is REMOTE,
        **_model_options(checkpoint, architecture),
    )
    for path in family.unused:
        setattr(model, path, nn.Identity())
    if optimize:
        optimize_for_inference(model)
    return model.get_submodule(family.encoder)


def _model_options(checkpoint: Checkpoint, architecture: str) -> dict[str, Any]:
    """Further arguments of the model's constructor."""
    family = checkpoint.family
    lacks_pooling = family.pooled_architectures and architecture not in ("", *family.pooled_architectures)
    return {**family.model_options, **({"add_pooling_layer": False} if lacks_pooling else {})}


def _build_from_module(name: str, spec: TeacherSpec) -> Teacher:
    """Call ``package.module:function`` and check that it returns a teacher that works."""
    try:
        teacher = call_function(str(spec.module), **spec.args)
    except ValueError as error:
        raise teacher_error(name, "module", str(error)) from error
    if not isinstance(teacher, Teacher):
        message = f"{spec.module} must return a shoulders Teacher, got {type(teacher).__name__}"
        raise teacher_error(name, "module", message)
    pixels = torch.rand(2, 3, *teacher.size, generator=torch.Generator().manual_seed(0))
    try:
        check_output(teacher(pixels), 2)
    except RecipeError as error:
        raise teacher_error(name, "module", f"{spec.module}: {error}") from error
    check_pure(name, teacher)
    if spec.taps is None:
        return teacher
    unknown = [tap for tap in spec.taps if tap not in teacher.taps]
    if unknown:
        allowed = ", ".join(teacher.taps)
        raise teacher_error(name, "taps", f"no tap {', '.join(unknown)}; {spec.module} has {allowed}")
    return teacher.with_taps(spec.taps)

"""The parts of a row in the table of teacher families: taps, head and the row itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shoulders.hub import IMAGENET_STATS, PixelStats
from shoulders.teachers.families.extract import Extract, patch_size
from shoulders.teachers.families.forward import Forward, forward_model
from shoulders.teachers.families.inject import Inject


def _accept(config: Any, size: tuple[int, int]) -> str:
    """No reason to refuse a head; a function with a name, so that heads can be pickled."""
    return ""


@dataclass(frozen=True)
class Taps:
    """The tap names of a family, computed from a model's config; the last name is the deepest tap.

    Args:
        description: the names in general, for tables.
        names: config -> all tap names.
        default: the taps of a recipe without ``taps:``: the ``last`` one, ``all``, or those that the ``head`` takes.
        head: config -> the taps that a task head takes; default: all where ``default`` is ``all``, else the last one.
    """

    description: str
    names: Callable[[Any], tuple[str, ...]]
    default: Literal["last", "all", "head"] = "last"
    head: Callable[[Any], tuple[str, ...]] | None = None

    def default_names(self, config: Any) -> tuple[str, ...]:
        """The taps that a recipe without ``taps:`` uses."""
        names = {"last": self.names(config)[-1:], "all": self.names(config), "head": self.head_names(config)}
        return names[self.default]

    def head_names(self, config: Any) -> tuple[str, ...]:
        """The taps that a task head takes."""
        if self.head is not None:
            return self.head(config)
        return self.names(config) if self.default == "all" else self.names(config)[-1:]


@dataclass(frozen=True)
class HeadSpec:
    """Where the head of a family begins, and how features replace the output of its encoder.

    Args:
        encoder: path, in the model with its head, of the submodule whose output is replaced.
        inject: (features of the head's taps, finest first; that submodule's output for a blank image) -> its output.
        shape_only: paths of submodules that run before the encoder; only the shapes of their outputs matter.
        encoder_by_class: class name of the model -> path of the encoder, where it differs from ``encoder``.
        class_endings: how the class names of models with such a head end; empty: every head of the family.
        forward_options: arguments with which the whole model takes images of any size.
        requires: a package without which the head cannot be built.
        refuse: (config, (h, w) in px) -> why the head of such a checkpoint cannot be separated, or "".
    """

    encoder: str
    inject: Inject
    shape_only: tuple[str, ...] = ()
    encoder_by_class: Mapping[str, str] = field(default_factory=dict)
    class_endings: tuple[str, ...] = ()
    forward_options: Mapping[str, Any] = field(default_factory=dict)
    requires: str = ""
    refuse: Callable[[Any, tuple[int, int]], str] = _accept

    def encoder_path(self, model: Any) -> str:
        """The path of the encoder in a model."""
        return self.encoder_by_class.get(type(model).__name__, self.encoder)


@dataclass(frozen=True)
class ZeroShotSpec:
    """The text side of an image-text family.

    Args:
        model_class: the transformers class that holds both towers.
        padding: how texts were padded in training, as tokenizers take it.
    """

    model_class: str
    padding: bool | str


@dataclass(frozen=True)
class Family:
    """One model type of transformers: how it is loaded, how it is run, and how its output becomes Features.

    Args:
        kind: what sort of model it is, for tables.
        model_class: the transformers class that holds the encoder.
        taps: its tap names.
        extract: (output, config, (h, w) in px) -> ``{tap: Features}``.
        forward: how the model is called.
        head: where its task head begins; None: its checkpoints have none, or none that can be separated.
        zero_shot: its text side, where its images are compared with texts.
        model_class_by_architecture: architecture that a checkpoint names -> the class to load instead.
        image_config: attribute of the config that describes the image encoder, where the config holds more.
        encoder: path in ``model_class`` of the submodule that takes the pixels; "": the model itself.
        unused: submodules that are never run and are dropped.
        size_multiple: sides must be divisible by this many px; ``patch``: by the config's patch size; ``window``: by
            the patch size times the windows per side.
        fixed_size: the model takes the config's image size alone.
        default_size: side in px where the checkpoint names none; None: the config's.
        pixel_stats: default mean and std.
        pooled_architectures: checkpoints saved as one of these have a pooling layer, all others are built without it;
            empty: the family always has it.
        model_options: further arguments of the model's constructor.
    """

    kind: str
    model_class: str
    taps: Taps
    extract: Extract
    forward: Forward = forward_model
    head: HeadSpec | None = None
    zero_shot: ZeroShotSpec | None = None
    model_class_by_architecture: Mapping[str, str] = field(default_factory=dict)
    image_config: str = ""
    encoder: str = ""
    unused: tuple[str, ...] = ()
    size_multiple: int | Literal["patch", "window"] = "patch"
    fixed_size: bool = False
    default_size: int | None = None
    pixel_stats: PixelStats = IMAGENET_STATS
    pooled_architectures: tuple[str, ...] = ()
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def size_step(self, config: Any) -> int:
        """Sides must be divisible by this many px."""
        if isinstance(self.size_multiple, int):
            return self.size_multiple
        return patch_size(config) * (config.num_windows if self.size_multiple == "window" else 1)

    @property
    def size_rule(self) -> str:
        """The allowed sizes, in words."""
        if self.fixed_size:
            return "the config's image size"
        words = {"patch": "multiples of the patch size", "window": "multiples of patch size x windows", 1: "any"}
        return words.get(self.size_multiple, f"multiples of {self.size_multiple}")

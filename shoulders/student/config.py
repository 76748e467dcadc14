"""The config of a student, as a config of transformers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from shoulders.errors import DataError
from shoulders.hub import why_refused


class ShouldersConfig(BackboneConfigMixin, PreTrainedConfig):
    """Everything that rebuilds a student's modules, as plain data beside its weights.

    Args:
        base: the base's own transformers config.
        adapter: its kind and settings, as in the recipe: ``{"kind": "bottleneck", "width": 64}``.
        mean, std: pixel normalisation of the base, per channel; the model takes pixels in [0, 1].
        image_size: (h, w) that the student was trained at; other multiples of the patch size work too.
        taps: {tap: {"summary": width or None, "spatial": width or None}} of the teachers.
        upsample: {tap: how many times finer than the student's grid the output of its projector is}; default 1.
        downsample: {tap: how many times coarser}; default 1.
        layers: layers of the student that the projectors take as input.
        projector_width: width between the two layers of a projector.
        standardize: kind of the standardizers.
        teachers: {name: {"source", "revision", "license"}} of the teachers and the base, whose licenses bind the
            student.
    """

    model_type = "shoulders_student"

    base: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    image_size: list[int] | tuple[int, ...] = (224, 224)
    taps: dict[str, Any] | None = None
    upsample: dict[str, int] | None = None
    downsample: dict[str, int] | None = None
    layers: list[str] | tuple[str, ...] = ("latent",)
    projector_width: int = 0
    standardize: str = "none"
    teachers: dict[str, Any] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        depth = self.base_config().num_hidden_layers if self.base else 0
        self.stage_names = ["stem", *(f"block{i}" for i in range(depth)), "latent"]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def base_config(self) -> PreTrainedConfig:
        """The base's config as its own transformers class.

        Raises:
            DataError: it describes too large a model.
        """
        if reason := why_refused(self.base or {}):
            raise DataError(f"the config of the student's base: {reason}")
        return AutoConfig.for_model(**(self.base or {}))

"""What users load: the student as a transformers model = encoder + projectors + standardizers.

``import shoulders`` registers it, so that ``AutoConfig``, ``AutoModel`` and the backbone classes of transformers
know the type ``shoulders_student``.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import ModelOutput

import shoulders.student.encoder as encoder
from shoulders.config.section import as_size
from shoulders.errors import DataError, RecipeError
from shoulders.features import Features
from shoulders.hub import check_finite, quiet, write_unit_range
from shoulders.hub.card import write_card
from shoulders.storage.json_text import parse_json
from shoulders.student.config import ShouldersConfig
from shoulders.student.families import BASES
from shoulders.student.files import check_files, finish_folder
from shoulders.student.pixels import check_pixels
from shoulders.teachers.heads import Head, taps_of_teacher
from shoulders.teachers.heads.post_process import post_process
from shoulders.teachers.heads.saved import open_head, save_head
from shoulders.transfer.losses import BASE
from shoulders.transfer.projectors import FeatureDims, Projector, module_name, teacher_name
from shoulders.transfer.standardize import TapStandardizer

_LOADING_HEAD = threading.Lock()


@dataclass
class StudentOutput(ModelOutput):
    """``latent``: Features; the other two are the same tensors under transformers' names."""

    latent: Features | None = None
    last_hidden_state: Tensor | None = None  # (B, N, D)
    pooler_output: Tensor | None = None  # (B, D)


class ShouldersPreTrainedModel(PreTrainedModel):
    """Loading that refuses what is missing, left over or of another shape."""

    config_class = ShouldersConfig
    base_model_prefix = "student"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every part initialises itself, and the output of a fresh adapter must stay zero."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but strict.

        Args:
            args: of transformers.
            kwargs: of transformers, and ``verify`` as for `load`.

        Raises:
            DataError: a file is damaged, or a key is missing, left over, or of another shape.
        """
        return_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True  # else transformers reads a pickle where there is nothing else
        check_files(*args[:1], **kwargs)
        kwargs.pop("verify", None)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        faults = {
            name: sorted(map(str, info.get(name) or ()))
            for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        }
        wrong = "; ".join(f"{len(keys)} {name} such as {keys[0]}" for name, keys in faults.items() if keys)
        if wrong:
            raise DataError(f"{args[0] if args else cls.__name__}: the weights do not fit this model: {wrong}")
        check_finite(model)
        for part in model.modules():
            if isinstance(part, encoder.Encoder):
                part.base.requires_grad_(False)  # transformers makes every loaded weight trainable
            if isinstance(part, ShouldersModel) and args:
                part.heads = {path.parent.name: path.parent for path in sorted(Path(args[0]).glob("heads/*/head.json"))}
        return (model, info) if return_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As in transformers, with a manifest of the student's files."""
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            finish_folder(Path(save_directory))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies hold config and weights: what transformers hooks into a forward cannot be pickled."""
        trainable = [name for name, weight in self.named_parameters() if weight.requires_grad]
        heads = getattr(self, "heads", {})
        return _rebuild, (type(self), self.config, self.state_dict(), trainable, self.training, heads)


class ShouldersModel(ShouldersPreTrainedModel):
    """The student: ``model(pixels).latent`` are its Features, ``model.predict_teacher_features(pixels)`` its teachers'.

    Pixels are (B, 3, h, w) in [0, 1]; h and w any multiples of the patch size.
    """

    def __init__(self, config: ShouldersConfig):
        super().__init__(config)
        base_config = config.base_config()
        # in torch's default precision, not in the one that the base was stored in
        build = BASES[base_config.model_type].build
        base = AutoModel.from_config(base_config, dtype=torch.get_default_dtype(), **build)
        self.encoder = encoder.Encoder(base, dict(config.adapter or {}), config.mean, config.std)
        taps = {tap: FeatureDims(spec["summary"], spec["spatial"]) for tap, spec in (config.taps or {}).items()}
        projector = partial(Projector, self.encoder.width, layers=config.layers, hidden=config.projector_width)
        up, down = config.upsample or {}, config.downsample or {}
        self.projectors = nn.ModuleDict(
            {
                module_name(tap): projector(dims, upsample=up.get(tap, 1), downsample=down.get(tap, 1))
                for tap, dims in taps.items()
            }
        )
        self.standardizers = nn.ModuleDict(
            {module_name(tap): TapStandardizer(config.standardize, *dims) for tap, dims in taps.items()}
        )
        self.taps = list(taps)
        self.heads: dict[str, Path] = {}  # folders of the kept heads beside the weights that it was loaded from
        self.loaded_heads: dict[str, list[Head]] = {}  # in lists, so that their weights are not part of the student's
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> StudentOutput:
        """The latent of pixels (B, 3, h, w) in [0, 1].

        Raises:
            ValueError: if h or w is not a multiple of the patch size, or the pixels are no floats in [0, 1].
        """
        check_pixels(pixel_values)
        latent = self.encoder(pixel_values)["latent"]
        return StudentOutput(latent=latent, last_hidden_state=latent.spatial, pooler_output=latent.summary)

    @property
    def layers(self) -> tuple[str, ...]:
        """The latent and every other layer that the projectors read."""
        return tuple(dict.fromkeys(("latent", *self.config.layers)))

    @property
    def base_layers(self) -> tuple[str, ...]:
        """Layers of the base itself that training needs: the latent to preserve, all inputs of a side adapter."""
        adapter_inputs = self.encoder.adapter.input_layers
        preserved = ["latent"] if f"{BASE}/latent" in self.taps else []
        return tuple(dict.fromkeys((*preserved, *adapter_inputs, *(self.layers if adapter_inputs else ()))))

    def forward_features(
        self, pixels: Tensor, base_features: Mapping[str, Features] | None = None
    ) -> dict[str, Features]:
        """{layer: Features} of the latent and of every other layer that the projectors read.

        Args:
            pixels: (B, 3, h, w) in [0, 1].
            base_features: {layer: Features} of the base itself at :attr:`base_layers`, where they exist already: an
                adapter beside the base then does not compute them again.
        """
        return self.encoder(pixels, self.layers, base_features)

    def project(
        self, student_features: Mapping[str, Features], targets: Mapping[str, Features] | None = None
    ) -> dict[str, Features]:
        """{layer: Features} -> {tap: prediction of the teacher's standardized features}.

        Args:
            student_features: of :meth:`forward_features`, for all images of a batch.
            targets: {tap: Features}; predictions are made for their ``rows``. Default: for all images.
        """
        predictions: dict[str, Features] = {}
        for teacher in dict.fromkeys(map(teacher_name, self.taps)):
            first = next(tap for tap in self.taps if teacher_name(tap) == teacher)
            rows = None if targets is None else targets[first].rows
            inputs = {layer: features.take(rows) for layer, features in student_features.items()}
            predictions |= self.project_teacher(teacher, inputs)
        return predictions

    def project_teacher(self, teacher: str, student_features: Mapping[str, Features]) -> dict[str, Features]:
        """As :meth:`project`, for the taps of one teacher and the images of ``student_features``."""
        taps = [tap for tap in self.taps if teacher_name(tap) == teacher]
        return {tap: self.projectors[module_name(tap)](student_features) for tap in taps}

    def standardize(self, teacher_features: Mapping[str, Features]) -> dict[str, Features]:
        """{tap: Features} in each teacher's own space -> in the space of :meth:`project`."""
        return {tap: self.standardizer(tap)(features) for tap, features in teacher_features.items()}

    def predict_teacher_features(self, pixels: Tensor) -> dict[str, Features]:
        """{tap: Features} in each teacher's own space, without the teachers: the input of their heads.

        Raises:
            ValueError: as :meth:`forward`.
        """
        check_pixels(pixels)
        predictions = self.project(self.forward_features(pixels))
        return {tap: self.standardizer(tap).inverse(features) for tap, features in predictions.items()}

    def standardizer(self, tap: str) -> TapStandardizer:
        """The standardizer of a tap."""
        return self.standardizers[module_name(tap)]  # type: ignore[return-value]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As in transformers, with the kept heads and a manifest."""
        for name, folder in self.heads.items():
            copy = Path(save_directory) / "heads" / name
            if copy.resolve() != folder.resolve():
                shutil.copytree(folder, copy, dirs_exist_ok=True)
        super().save_pretrained(save_directory, **kwargs)

    def head(self, name: str) -> Head:
        """A kept head, loaded when it is first used.

        Raises:
            RecipeError: the student keeps no head of this name.
        """
        if name not in self.heads:
            kept = ", ".join(self.heads) or "none; name some in keep_heads: of the recipe"
            raise RecipeError(f"head {name!r}: not kept by this student; it has {kept}")
        with _LOADING_HEAD:  # threads that use a head at once share one copy of it
            if name not in self.loaded_heads:
                self.loaded_heads[name] = [open_head(self.heads[name])]
            return self.loaded_heads[name][0].to(self.device)  # the student may have moved since

    @torch.no_grad()
    def predict(
        self,
        name: str,
        pixels: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        threshold: float = 0.5,
        **prompts: Any,
    ) -> list[Any]:
        """Outputs of a kept head for pixels (B, 3, h, w) in [0, 1], with its teacher's own post-processing.

        Args:
            name: of the teacher whose head it is.
            sizes: (h, w) of the original images, for boxes and masks in their pixels; default: that of the pixels.
            threshold: objects of a lower score are left out.
            prompts: further inputs of the head: points and boxes, or ``classes`` of an image-text teacher.

        Returns:
            For each image what the transformers pipeline of the head's task gives.
        """
        head = self.head(name)
        output = head(taps_of_teacher(name, self.predict_teacher_features(pixels)), **prompts)
        return post_process(head, output, sizes or [(pixels.shape[2], pixels.shape[3])] * len(pixels), threshold)


class ShouldersBackbone(BackboneMixin, ShouldersPreTrainedModel):
    """The student as a backbone for transformers' heads: one map (B, D, H, W) per layer in ``out_features``."""

    has_attentions = False

    def __init__(self, config: ShouldersConfig):
        super().__init__(config)
        self.student = ShouldersModel(config)
        self.num_features = [self.student.encoder.width] * len(config.stage_names)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        """Maps of pixels (B, 3, h, w) in [0, 1]; others are refused as by `ShouldersModel`."""
        check_pixels(pixel_values)
        features = self.student.encoder(pixel_values, self.out_features)
        return BackboneOutput(feature_maps=tuple(features[layer].to_map() for layer in self.out_features))


def _rebuild(
    kind: type[ShouldersPreTrainedModel],
    config: ShouldersConfig,
    weights: Mapping[str, Tensor],
    trainable: Sequence[str],
    training: bool,
    heads: Mapping[str, Path],
) -> ShouldersPreTrainedModel:
    """A model from what its pickle holds, without a draw from the global generators."""
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    model.load_state_dict(weights, assign=True)  # of the same type, on the same device
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trainable)
    if isinstance(model, ShouldersModel):
        model.heads = dict(heads)
    return model.train(training)


def build_student(base: PreTrainedModel, config: ShouldersConfig) -> ShouldersModel:
    """A student before training: the weights of ``base``, a fresh adapter and fresh projectors."""
    student = ShouldersModel(config)
    student.encoder.base.load_state_dict(base.state_dict(), strict=True)
    return student


def save_student(
    student: ShouldersModel, folder: Path, heads: Mapping[str, Head], weights: dict[str, Tensor] | None = None
) -> None:
    """Write a student in transformers format, with a card that names its teachers and their licenses.

    The heads that it keeps go into ``folder/heads/NAME``.

    Args:
        weights: all of its weights and buffers by name, where the student itself holds shards of them.
    """
    size = as_size(tuple(student.config.image_size))
    write_unit_range(folder, size)
    write_card(folder, size, student.encoder.patch_size, student.config.teachers)
    with quiet():
        for name, head in heads.items():
            save_head(head, folder / "heads" / name)
        student.save_pretrained(folder, state_dict=weights)  # with a manifest of all files, and so the last


def load(path: Path | str, verify: bool = True) -> ShouldersModel:
    """Load a student from its folder or from the run folder that holds it as ``student/``, in evaluation mode.

    Args:
        path: of the folder.
        verify: compare the files of the student and of its heads with its manifest, at about 1 GB/s.

    Raises:
        DataError: there is no student, a file of it is damaged, or its weights do not fit.
    """
    path = Path(path)
    folder = path / "student" if (path / "student").is_dir() else path
    if not (folder / "config.json").is_file():
        raise DataError(f"{path}: no student in this folder; give a run folder or its student/ folder")
    try:
        config = parse_json((folder / "config.json").read_text())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a valid student: its config.json has no model_type") from error
    if kind != ShouldersConfig.model_type:
        raise DataError(f"{folder}: holds a model of type {kind}, not a student; give a run folder or its student/")
    try:
        with quiet():
            student: ShouldersModel = ShouldersModel.from_pretrained(folder, verify=verify).eval()
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise DataError(f"{folder}: not a valid student: {' '.join(str(error).split())[:300]}") from error
    return student


def register() -> None:
    """Make ``shoulders_student`` known to transformers' Auto classes; safe to call again."""
    AutoConfig.register("shoulders_student", ShouldersConfig, exist_ok=True)
    AutoModel.register(ShouldersConfig, ShouldersModel, exist_ok=True)
    AutoBackbone.register(ShouldersConfig, ShouldersBackbone, exist_ok=True)


register()

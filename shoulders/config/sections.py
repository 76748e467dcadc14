"""The sections of a recipe: teachers, images, transfer, training and cache."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from shoulders.config.section import Section, Size, UserPath

PROMPT = re.compile(r"[^{}]*\{\}[^{}]*")  # text with one {}


class TeacherSpec(Section):
    """One teacher: a transformers model (``model``), or a function that builds your own (``module``)."""

    model: str | None = Field(None, description="hub id or local folder")
    module: str | None = Field(None, description="package.module:function that returns a shoulders.Teacher")
    args: dict[str, Any] = Field({}, description="module only: keyword arguments of the function")
    revision: str | None = Field(None, description="commit of the hub repository (40 hex digits)")
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model; for a hub model only with revision"
    )
    size: Size | None = Field(None, description="input size in px, or [h, w]; default: the model's own")
    taps: list[str] | None = Field(None, description="names of the features to distil; default: per model family")
    match_grid: list[str] = Field(
        [], description="taps that are predicted on their own grids even if no kept head reads them; see docs/own.md"
    )
    sources: list[str] | None = Field(
        None, min_length=1, description="names of the image sources that it is run on; default: all"
    )
    weight: float = Field(1.0, ge=0, description="its weight in the loss; needs transfer.balance: fixed")
    int8: bool = Field(False, description="linear layers in int8: faster on a CPU with VNNI, features differ slightly")
    classes: list[str] | None = Field(None, min_length=1, description="class names for a kept image-text head")
    prompts: list[str] | None = Field(
        None, min_length=1, description="texts for classes, {} is the name; default: a photo of a {}."
    )

    @model_validator(mode="after")
    def _check(self) -> TeacherSpec:
        if (self.model is None) == (self.module is None):
            raise ValueError("give either model (hub id or folder) or module (package.module:function)")
        if self.args and self.module is None:
            raise ValueError("args needs module: a model takes none")
        if self.int8 and self.module is not None:
            raise ValueError("int8 needs model: a teacher built by module: is run as it is")
        if self.classes and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: each name once")
        wrong = [prompt for prompt in self.prompts or () if not PROMPT.fullmatch(prompt)]
        if wrong:
            raise ValueError(f"prompts: {wrong[0]!r} needs one {{}} where the name of the class goes")
        return self


class Source(Section):
    """One source of images: a folder, a parquet file, a tar file, or a function of your own."""

    path: UserPath | None = Field(None, description="folder, .parquet or .tar file")
    module: str | None = Field(None, description="package.module:function that returns an ImageSource")
    args: dict[str, Any] = Field({}, description="module only: keyword arguments of the function")
    share: float | None = Field(
        None, gt=0, description="share of each epoch; default: proportional to sqrt(number of images)"
    )
    column: str = Field("image", description="parquet only: the image column")

    @model_validator(mode="after")
    def _check(self) -> Source:
        if (self.path is None) == (self.module is None):
            raise ValueError("give either path (folder or file) or module (package.module:function)")
        if self.args and self.module is None:
            raise ValueError("args needs module: a folder or file takes none")
        return self


class Images(Section):
    """Unlabelled images, and the views of them that student and teachers get."""

    path: UserPath | None = Field(None, description="folder, .parquet or .tar file, if there is one source")
    sources: dict[str, Source] = Field({}, description="several sources by name")
    size: Size = Field(224, description="input size of the student in px, or [h, w]")
    views: Literal["fresh"] | Annotated[int, Field(ge=1)] = Field(
        "fresh",
        description="fresh: another view of an image in each epoch; a number: that many in turn, as a cache needs",
    )
    scale: tuple[float, float] = Field(
        (0.4, 1.0), description="smallest and largest area of a view, as fractions of the image"
    )
    flip: bool = Field(True, description="half of the views are mirrored")
    holdout: int = Field(512, ge=8, description="images kept out of training, for evaluation; at most a tenth of all")
    max_unreadable: float = Field(0.01, ge=0, le=1, description="maximum fraction of unreadable images")
    max_pixels: int = Field(50_000_000, ge=1, description="images with more pixels are skipped")
    workers: int = Field(1, ge=0, description="processes that decode images; 0: the training process does")

    @model_validator(mode="after")
    def _check(self) -> Images:
        if self.path is not None and self.sources:
            raise ValueError("give either path (one source) or sources (several by name), not both")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: fractions of the image, 0 < least <= most <= 1, got {self.scale}")
        return self

    def all_sources(self) -> dict[str, Source]:
        """The sources by name; one that is given as ``path`` is named ``images``."""
        return self.sources or ({"images": Source(path=self.path)} if self.path else {})


class Transfer(Section):
    """The objective: how the student is compared with its teachers."""

    standardize: Literal["none", "channel", "phi_s"] = Field(
        "phi_s", description="how teacher features are standardized; phi_s: arXiv 2410.01680"
    )
    calibration_images: int = Field(
        1024, ge=16, description="images for the statistics of teacher features, rounded up to whole batches"
    )
    max_not_finite: float = Field(
        0.05, ge=0, le=1, description="maximum fraction of a teacher's images of which its features are not finite"
    )
    distance: Literal["cosine_smooth_l1", "cosine", "smooth_l1", "mse"] = Field(
        "cosine_smooth_l1", description="between prediction and target"
    )
    cosine_weight: float = Field(
        0.9, ge=0, le=1, description="cosine_smooth_l1: a in a (1 - cosine) + (1 - a) smooth-L1"
    )
    t2s: Literal["none", "each", "joint"] = Field(
        "joint", description="the latent is predicted from each teacher, or from all of them together"
    )
    t2s_weight: float = Field(0.3, ge=0, description="weight of the t2s loss")
    t2s_grad_to: Literal["both", "student", "projector"] = Field(
        "both", description="which side receives the gradient of the t2s loss"
    )
    preserve: float = Field(1.0, ge=0, description="weight of the base as a teacher")
    balance: Literal["uniform", "fixed", "dropping"] = Field(
        "uniform",
        description="weights of teachers: equal; teachers.NAME.weight; or random dropping per image, except of the "
        "teacher with the largest loss (UNIC, arXiv 2408.05088)",
    )
    layers: list[str] = Field(
        ["latent"], min_length=1, description="layers of the student that projectors read: latent, block0, .."
    )
    match_teacher_grid: bool = Field(
        True, description="taps that a kept head reads are predicted on the teacher's grid, even if it is finer"
    )
    projector_width: int | None = Field(None, ge=1, description="hidden width; default: twice the latent's")

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: list[str]) -> list[str]:
        if len(set(layers)) < len(layers):
            raise ValueError(f"each layer once, got {', '.join(layers)}")
        return layers


Beta = Annotated[float, Field(ge=0, lt=1)]


class Train(Section):
    """Optimization, checkpoints and logging."""

    steps: int = Field(20_000, ge=1, description="optimizer steps")
    batch: int = Field(256, ge=1, description="images per step, over all ranks")
    accumulate: int = Field(1, ge=1, description="micro-batches per step on each rank")
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="for weight matrices; AdamW trains all other parameters"
    )
    lr: float = Field(3.0e-4, gt=0, description="peak learning rate: linear warm-up, then cosine decay to zero")
    weight_decay: float = Field(0.03, ge=0, description="weight decay of weight matrices")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="betas of AdamW")
    warmup: float = Field(0.05, ge=0, le=1, description="length of the warm-up, as a fraction of the steps")
    clip: float = Field(1.0, gt=0, description="maximum norm of the gradient, over all parameters")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the moving average of the weights, which is saved; default: none"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the hardware has it")
    compile: bool = Field(False, description="compile the step; only the student where teachers.NAME.sources is used")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="of several ranks, each holds all weights (ddp) or a shard of them (fsdp)"
    )
    seed: int = Field(0, ge=0, le=2**40, description="seed of weights, order, views and dropping")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")
    evaluate_every: int = Field(500, ge=1, description="steps between two measurements of fvu on held-out images")
    save_every: int = Field(500, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="number of checkpoints that are kept")
    tensorboard: bool = Field(
        False, description="also write TensorBoard events; needs the optional dependency of that name"
    )


class Cache(Section):
    """Teacher features on disk: computed once, for all runs on the same views of the same images."""

    path: UserPath | None = Field(None, description="folder of the cache; default: none, the teachers are run")
    mode: Literal["auto", "require", "off"] = Field(
        "auto", description="auto: used if complete and for the same recipe, else the teachers are run"
    )
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = Field("float16", description="int8: one scale per token")
    pool: int = Field(1, ge=1, description="grids are averaged over squares of this many tokens per side")
    pca: int | None = Field(None, ge=1, description="taps that are wider are stored as this many principal components")

    @field_validator("mode", mode="before")
    @classmethod
    def _mode_off(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # YAML reads off as False

"""What a recipe may say. A recipe is one YAML file plus dotted overrides; it is refused with the fix."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from shoulders.config.messages import explain
from shoulders.config.student import Conv, Part, Student
from shoulders.errors import RecipeError

PROMPT = re.compile(r"[^{}]*\{\}[^{}]*")


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: nobody of this name has a home here; write the whole path") from error


Home = Annotated[Path, AfterValidator(_at_home)]  # ~ is one's own folder
TAKEN = ("base", "joint", "scratch", "student", "teachers")  # names that mean something else


def check_name(teacher: str) -> None:
    """A teacher's name must be usable in keys of recipes, logs and weights.

    Raises:
        RecipeError: where it is not.
    """
    if teacher in TAKEN or not teacher.isidentifier():
        raise RecipeError(f"teacher name {teacher!r}: use letters, digits and _, and none of {', '.join(TAKEN)}")


class TeacherSpec(Part):
    """One teacher: a transformers model (``model``), or a function that builds your own (``module``)."""

    model: str | None = Field(None, description="hub id or local folder")
    module: str | None = Field(None, description="package.module:function that returns shoulders.Teacher")
    revision: str | None = Field(None, description="commit of the hub repository (40 hex digits)")
    trust_remote_code: bool = Field(False, description="run the model's own code; of a hub model only at a revision")
    size: int | tuple[int, int] | None = Field(None, description="of its input in px, or [h, w]; default: its own")
    taps: list[str] | None = Field(None, description="which features; default: the family's own choice")
    sources: list[str] | None = Field(None, min_length=1, description="the images it is asked about; default: all")
    weight: float = Field(1.0, ge=0, description="its share, with transfer.balance: fixed")
    int8: bool = Field(False, description="linear layers in int8: faster on a CPU with VNNI, and not quite the same")
    classes: list[str] | None = Field(None, min_length=1, description="names that a kept image-text head tells apart")
    prompts: list[str] | None = Field(None, min_length=1, description="texts for them; default: a photo of a {}.")

    @model_validator(mode="after")
    def _one_source(self) -> TeacherSpec:
        if (self.model is None) == (self.module is None):
            raise ValueError("give either model (hub id or folder) or module (package.module:function)")
        if self.int8 and self.module is not None:
            raise ValueError("int8 is for a model; a teacher built by module: is run as it is")
        if self.classes and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: each name once")
        wrong = [prompt for prompt in self.prompts or () if not PROMPT.fullmatch(prompt)]
        if wrong:
            raise ValueError(f"prompts: {wrong[0]!r} needs one {{}} where the name of the class goes")
        return self


class Source(Part):
    """One place that images come from: a folder, a parquet file, tar shards, or a function of your own."""

    path: Home | None = Field(None, description="folder, .parquet or .tar file")
    module: str | None = Field(None, description="package.module:function that returns an ImageSource")
    args: dict[str, Any] = Field({}, description="module only: keyword arguments of the function")
    share: float | None = Field(None, gt=0, description="share of each epoch; default proportional to sqrt(count)")
    column: str = Field("image", description="parquet only: the image column")

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.module is None):
            raise ValueError("give either path (folder or file) or module (package.module:function)")
        if self.args and self.module is None:
            raise ValueError("args are for module: a folder or file takes none")
        return self


class Images(Part):
    """Unlabelled images and the views taken of them."""

    path: Home | None = Field(None, description="one source")
    sources: dict[str, Source] = Field({}, description="several sources by name")
    size: int | tuple[int, int] = Field(224, description="of the student's input in px, or [h, w]")
    views: Literal["fresh"] | Annotated[int, Field(ge=1)] = Field("fresh", description="an image's; cached: a number")
    scale: tuple[float, float] = Field((0.4, 1.0), description="area of a view, as a fraction of the image")
    flip: bool = Field(True, description="half of the views are mirrored")
    holdout: int = Field(512, ge=8, description="images kept out of training, for evaluation; at most a tenth")
    max_unreadable: float = Field(0.01, ge=0, le=1, description="fraction of unreadable images that is put up with")
    max_pixels: int = Field(50_000_000, ge=1, description="images larger than this are skipped")
    workers: int = Field(1, ge=0, description="processes that decode; 0: none beside the run's own")

    @model_validator(mode="after")
    def _some_images(self) -> Images:
        if self.path is not None and self.sources:
            raise ValueError("give either path (one source) or sources (several by name), not both")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: fractions of the image, 0 < least <= most <= 1, got {self.scale}")
        return self

    def all_sources(self) -> dict[str, Source]:
        """The sources by name; one given as ``path`` is called ``images``."""
        return self.sources or ({"images": Source(path=self.path)} if self.path else {})


class Transfer(Part):
    """How knowledge crosses from the teachers to the student."""

    standardize: Literal["none", "channel", "phi_s"] = Field("phi_s", description="phi_s: arXiv 2410.01680")
    calibration_images: int = Field(
        1024, ge=16, description="images that statistics are estimated on, up to a whole batch"
    )
    distance: Literal["cosine_smooth_l1", "cosine", "smooth_l1", "mse"] = Field(
        "cosine_smooth_l1", description="of what is told from what is taught"
    )
    cosine_weight: float = Field(
        0.9, ge=0, le=1, description="cosine_smooth_l1: a in a (1 - cosine) + (1 - a) smooth-L1"
    )
    t2s: Literal["none", "each", "joint"] = Field("joint", description="who guesses the latent: each, or all")
    t2s_weight: float = Field(0.3, ge=0, description="of these guesses in the loss")
    t2s_grad_to: Literal["both", "student", "projector"] = Field("both", description="whom these guesses move")
    preserve: float = Field(1.0, ge=0, description="weight of the base as a teacher")
    balance: Literal["uniform", "fixed", "dropping"] = Field(
        "uniform", description="of teachers; dropping keeps each image's worst (UNIC, arXiv 2408.05088)"
    )
    layers: list[str] = Field(["latent"], min_length=1, description="places that projectors read: latent, block0, ..")
    match_teacher_grid: bool = Field(
        True, description="taps that a kept head reads are inherited on their own finer grids"
    )
    projector_width: int | None = Field(None, ge=1, description="hidden width; default: twice the latent's")

    @field_validator("layers")
    @classmethod
    def _once(cls, layers: list[str]) -> list[str]:
        if len(set(layers)) < len(layers):
            raise ValueError(f"each layer once, got {', '.join(layers)}")
        return layers


Beta = Annotated[float, Field(ge=0, lt=1)]


class Train(Part):
    """Optimisation and bookkeeping."""

    steps: int = Field(20_000, ge=1, description="updates")
    batch: int = Field(256, ge=1, description="images per step over all ranks")
    accumulate: int = Field(1, ge=1, description="parts that a rank's share of the batch is run in")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="of matrices; all else is AdamW's")
    lr: float = Field(3.0e-4, gt=0, description="the highest; warm-up, then a cosine to zero")
    weight_decay: float = Field(0.03, ge=0, description="of matrices")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="of AdamW")
    warmup: float = Field(0.05, ge=0, le=1, description="fraction of the steps")
    clip: float = Field(1.0, gt=0, description="global gradient norm")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged student; default: none")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the hardware has it")
    compile: bool = Field(False, description="the step; the student alone where teachers have sources of their own")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="each of several ranks holds all, or its part")
    seed: int = Field(0, ge=0, le=2**40, description="of weights, order, views and coins")
    log_every: int = Field(10, ge=1, description="steps")
    evaluate_every: int = Field(500, ge=1, description="steps; fvu on the held-out images")
    save_every: int = Field(500, ge=1, description="steps")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")
    tensorboard: bool = Field(False, description="write events beside metrics.jsonl; needs the extra of that name")


class Cache(Part):
    """Teachers' features on disk: asked once, for all runs that see the same views of the same images."""

    path: Home | None = Field(None, description="folder of the cache; default: none, the teachers are asked live")
    mode: Literal["auto", "require", "off"] = Field("auto", description="auto: where it is whole and fits, else live")
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = Field("float16", description="int8: a scale per token")
    pool: int = Field(1, ge=1, description="grids are averaged over squares of so many places a side")
    pca: int | None = Field(None, ge=1, description="taps wider than this are kept as so many principal components")

    @field_validator("mode", mode="before")
    @classmethod
    def _off(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # YAML reads off as False


class Recipe(Part):
    """One run, complete: what ``recipe.yaml`` in a run folder holds."""

    student: Student
    teachers: dict[str, TeacherSpec] = {}
    method: Literal["kpu"] = Field("kpu", description="arXiv 2508.14707")
    images: Images
    transfer: Transfer = Transfer()
    train: Train = Train()
    cache: Cache = Cache()
    keep_heads: list[str] = Field([], description="teachers whose heads the student keeps and runs")
    out: Home = Field(description="folder of the run")

    @property
    def teacher_sources(self) -> dict[str, list[str]]:
        """{teacher: names of its image sources}, for the teachers that are limited to some sources."""
        return {name: spec.sources for name, spec in self.teachers.items() if spec.sources is not None}

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        for name, spec in self.teachers.items():
            check_name(name)
            if spec.weight != 1 and self.transfer.balance != "fixed":
                raise ValueError(f"teachers.{name}.weight only counts with transfer.balance: fixed")
            if (spec.classes or spec.prompts) and name not in self.keep_heads:
                raise ValueError(f"teachers.{name}.classes and prompts only count with keep_heads: [{name}]")
        sources = self.images.all_sources()
        for name, spec in self.teachers.items():
            strange = [source for source in spec.sources or () if source not in sources]
            if strange:
                known = ", ".join(sources)
                raise ValueError(f"teachers.{name}.sources: {', '.join(strange)} not in images.sources: {known}")
        unknown = [name for name in self.keep_heads if name not in self.teachers]
        if unknown:
            raise ValueError(f"keep_heads: {', '.join(unknown)} not among teachers: {', '.join(self.teachers)}")
        return self

    @model_validator(mode="after")
    def _blocks(self) -> Recipe:
        adapter = self.student.adapter
        if isinstance(adapter, Conv):
            numbers = [place.removeprefix("block") for place in self.transfer.layers]
            read = sorted(int(number) for number in numbers if number.isdecimal())
            adapter.blocks = read if adapter.blocks is None else sorted(adapter.blocks)
            unread = ", ".join(f"block{block}" for block in adapter.blocks if block not in read)
            if unread:
                raise ValueError(f"transfer.layers: the adapter speaks at {unread}, which nothing reads; add it")
        return self


class _Once(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice, the second time before {node.end_mark}")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply overrides such as ``train.steps=2000``.

    Raises:
        RecipeError: file missing or not YAML, unknown key, wrong type; the message names the key and the fix.
    """
    path = Path(path)
    try:
        tree = _Once(path.read_text()).get_single_data()
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return check_recipe(tree, where=str(path))


def as_recipe(recipe: Recipe | Path | str) -> Recipe:
    """A recipe as it is, or read from its file."""
    return recipe if isinstance(recipe, Recipe) else read_recipe(recipe)


def check_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Turn plain data into a Recipe.

    Raises:
        RecipeError: with one line per fault, naming key, fault and what is allowed.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        explained = {
            line.split(":")[0]: line for line in reversed([explain(fault, Recipe) for fault in error.errors()])
        }
        raise RecipeError("\n".join(f"{where}: {line}" for line in reversed(explained.values()))) from error


def dump_recipe(recipe: Recipe) -> str:
    """The complete, resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else size


# what may change when a run goes on: it does not touch a single weight
FREE_ON_RESUME = (
    "out",
    "images.workers",
    "images.max_unreadable",
    "train.log_every",
    "train.save_every",
    "train.evaluate_every",
    "train.keep_checkpoints",
    "train.tensorboard",
    "train.parallel",
    "cache.path",
    "cache.mode",
)


def check_resumed(recipe: Recipe, written: Path) -> None:
    """Hold the recipe of a resumed run against the one that it started with.

    Raises:
        RecipeError: naming every key that differs and would change the result.
    """
    started = read_recipe(written)
    before, now = _flat(started.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new and key not in FREE_ON_RESUME:
            raise RecipeError(
                f"{key}: the run started with {old!r}, not {new!r}; resume with the same, or choose another out"
            )
    for key, was, is_now in (
        ("images.sources", list(started.images.sources), list(recipe.images.sources)),
        ("teachers", list(started.teachers), list(recipe.teachers)),
    ):
        if was != is_now:
            raise RecipeError(f"{key}: the run started with {', '.join(was)} in this order; resume with the same")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r}: an override is written key.subkey=value, e.g. train.steps=2000")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{override!r}: the value is not YAML") from error
    if isinstance(parsed, date) or (isinstance(parsed, str) and "#" in value and value[:1] not in ("'", '"')):
        parsed = value.strip()  # YAML takes a folder called 2024-11-20 for a day, and cuts "set #2" short
    *parents, last = key.split(".")
    here = tree
    for parent in parents:
        here = here.setdefault(parent, {})
        if not isinstance(here, dict):
            raise RecipeError(f"{override!r}: {parent!r} holds a value, not a section")
    here[last] = parsed

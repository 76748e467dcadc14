"""The recipe of a run: one YAML file plus dotted overrides, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from shoulders.config.messages import explain
from shoulders.config.overrides import apply_override
from shoulders.config.section import Section, UserPath
from shoulders.config.sections import Cache, Images, TeacherSpec, Train, Transfer
from shoulders.config.student import Conv, Student
from shoulders.errors import RecipeError

RESERVED_NAMES = ("base", "concatenated", "joint", "scratch", "student", "teachers")  # they have a meaning of their own


def check_name(teacher: str) -> None:
    """Refuse a teacher's name that cannot be used in keys of recipes, logs and weights.

    Raises:
        RecipeError: for such a name.
    """
    if teacher in RESERVED_NAMES or not teacher.isidentifier():
        reserved = ", ".join(RESERVED_NAMES)
        raise RecipeError(f"teacher name {teacher!r}: use letters, digits and _; reserved names are {reserved}")


class Recipe(Section):
    """A complete run: what ``recipe.yaml`` in a run folder holds."""

    student: Student
    teachers: dict[str, TeacherSpec] = {}
    method: Literal["kpu"] = Field("kpu", description="training objective; kpu: arXiv 2508.14707")
    images: Images
    transfer: Transfer = Transfer()
    train: Train = Train()
    cache: Cache = Cache()
    keep_heads: list[str] = Field([], description="teachers whose heads are kept in the student")
    out: UserPath = Field(description="the run folder")

    @property
    def teacher_sources(self) -> dict[str, list[str]]:
        """{teacher: names of its image sources}, for the teachers that are limited to some sources."""
        return {name: spec.sources for name, spec in self.teachers.items() if spec.sources is not None}

    @model_validator(mode="after")
    def _check_teachers(self) -> Recipe:
        for name, spec in self.teachers.items():
            check_name(name)
            if spec.weight != 1 and self.transfer.balance != "fixed":
                raise ValueError(f"teachers.{name}.weight only counts with transfer.balance: fixed")
            if (spec.classes or spec.prompts) and name not in self.keep_heads:
                raise ValueError(f"teachers.{name}.classes and prompts only count with keep_heads: [{name}]")
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> Recipe:
        known = self.images.all_sources()
        for name, sources in self.teacher_sources.items():
            unknown = [source for source in sources if source not in known]
            if unknown:
                raise ValueError(
                    f"teachers.{name}.sources: {', '.join(unknown)} not in images.sources: {', '.join(known)}"
                )
        return self

    @model_validator(mode="after")
    def _fill_blocks(self) -> Recipe:
        """The blocks of a conv adapter are those of transfer.layers, or some of them."""
        adapter = self.student.adapter
        if isinstance(adapter, Conv):
            numbers = [layer.removeprefix("block") for layer in self.transfer.layers]
            projected = sorted(int(number) for number in numbers if number.isdecimal())
            adapter.blocks = projected if adapter.blocks is None else sorted(adapter.blocks)
            missing = ", ".join(f"block{block}" for block in adapter.blocks if block not in projected)
            if missing:
                raise ValueError(f"transfer.layers: {missing} missing, which student.adapter.blocks names; add it")
        return self


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML would silently use the last one."""

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
        tree = _UniqueKeyLoader(path.read_text()).get_single_data()
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return check_recipe(tree, origin=str(path))


def as_recipe(recipe: Recipe | Path | str) -> Recipe:
    """A recipe as it is, or read from its file."""
    return recipe if isinstance(recipe, Recipe) else read_recipe(recipe)


def check_recipe(tree: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Turn plain data into a Recipe.

    Args:
        tree: the recipe as nested mappings.
        origin: the file that messages name.

    Raises:
        RecipeError: with one line per fault: the key, what is wrong, and what is allowed.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [explain(fault, Recipe) for fault in error.errors()]
        first_of_key = {line.split(":")[0]: line for line in reversed(lines)}
        raise RecipeError("\n".join(f"{origin}: {line}" for line in reversed(first_of_key.values()))) from error


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)

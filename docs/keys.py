"""The tables of docs/recipe.md, out of the models that check recipes: ``python docs/keys.py`` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shoulders.config import recipe
from shoulders.config import student as recipe_student

PAGE = Path(__file__).with_name("recipe.md")
# (what stands before its keys, which kind it is of, its model)
SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("", "", recipe.Recipe),
    ("student.", "", recipe_student.Student),
    ("student.adapter.", "bottleneck", recipe_student.Bottleneck),
    ("student.adapter.", "lora", recipe_student.Lora),
    ("student.adapter.", "side", recipe_student.Side),
    ("student.adapter.", "conv", recipe_student.Conv),
    ("teachers.NAME.", "", recipe.TeacherSpec),
    ("images.", "", recipe.Images),
    ("images.sources.NAME.", "", recipe.Source),
    ("transfer.", "", recipe.Transfer),
    ("train.", "", recipe.Train),
    ("cache.", "", recipe.Cache),
)
PLAIN = {int: "whole number", float: "number", str: "text", bool: "true, false", Path: "path", dict: "section"}


def _of(prefix: str, kind: str, model: type[BaseModel]) -> Iterator[dict[str, str]]:
    sections = {section for section, _, _ in SECTIONS}
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if {f"{key}.", f"{key}.NAME."} & sections:
            continue  # a section of its own
        chooses = name == "kind"
        yield {
            "key": f"{key} ({kind})" if kind and not chooses else key,
            "values": _values(field.annotation),
            "default": _default(field),
            "meaning": str(model.__doc__).rstrip(".") if chooses else field.description or "",
        }


def _values(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _values(inner[0])
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(_values(one) for one in inner if one is not type(None))
    if origin is list:
        return f"list: {_values(inner[0])}"
    if origin is tuple:
        return "[" + ", ".join(map(_values, inner)) + "]"
    return PLAIN[origin or kind]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(needed)"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "-" if value is None or value in ([], {}) else str(value).lower() if isinstance(value, bool) else str(value)


def page() -> str:
    """docs/recipe.md with its tables as they are now."""
    text = PAGE.read_text()
    for prefix in dict.fromkeys(prefix for prefix, _, _ in SECTIONS):
        begin, end = f"<!-- keys of {prefix or 'the recipe'} -->\n", "<!-- end of keys -->"
        before, rest = text.split(begin)
        rows = [row for section, kind, model in SECTIONS if section == prefix for row in _of(section, kind, model)]
        lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{row['key']}` | {row['values']} | {row['default']} | {row['meaning']} |" for row in rows]
        text = before + begin + "\n" + "\n".join(lines) + "\n\n" + end + rest.split(end, 1)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page())

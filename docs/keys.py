"""Writes the tables of docs/recipe.md from the models that check recipes: ``python docs/keys.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shoulders.config import sections, student
from shoulders.config.recipe import Recipe

PAGE = Path(__file__).with_name("recipe.md")
# (prefix of its keys, kind of adapter, its model)
SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("", "", Recipe),
    ("student.", "", student.Student),
    ("student.adapter.", "bottleneck", student.Bottleneck),
    ("student.adapter.", "lora", student.Lora),
    ("student.adapter.", "side", student.Side),
    ("student.adapter.", "conv", student.Conv),
    ("teachers.NAME.", "", sections.TeacherSpec),
    ("images.", "", sections.Images),
    ("images.sources.NAME.", "", sections.Source),
    ("transfer.", "", sections.Transfer),
    ("train.", "", sections.Train),
    ("cache.", "", sections.Cache),
)
TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true, false", Path: "path", dict: "section"}


def _rows(prefix: str, kind: str, model: type[BaseModel]) -> Iterator[dict[str, str]]:
    """A row per key of a section; nested sections have tables of their own."""
    nested = {section for section, _, _ in SECTIONS}
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if {f"{key}.", f"{key}.NAME."} & nested:
            continue
        is_kind = name == "kind"
        yield {
            "key": f"{key} ({kind})" if kind and not is_kind else key,
            "values": _values(field.annotation),
            "default": _default(field),
            "meaning": str(model.__doc__).rstrip(".") if is_kind else field.description or "",
        }


def _values(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(inner[0])
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(_values(member) for member in inner if member is not type(None))
    if origin is list:
        return f"list: {_values(inner[0])}"
    if origin is tuple:
        return "[" + ", ".join(map(_values, inner)) + "]"
    return TYPE_NAMES[origin or annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if value is None or value in ([], {}):
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def page() -> str:
    """docs/recipe.md with its tables as the models have them now."""
    text = PAGE.read_text()
    for prefix in dict.fromkeys(prefix for prefix, _, _ in SECTIONS):
        begin, end = f"<!-- keys of {prefix or 'the recipe'} -->\n", "<!-- end of keys -->"
        before, after = text.split(begin)
        rows = [row for section, kind, model in SECTIONS if section == prefix for row in _rows(section, kind, model)]
        lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{row['key']}` | {row['values']} | {row['default']} | {row['meaning']} |" for row in rows]
        text = before + begin + "\n" + "\n".join(lines) + "\n\n" + end + after.split(end, 1)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page())

"""One line for what pydantic finds wrong in a recipe: the key, the fault, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

Models = list[type[BaseModel]]


def explain(fault: Any, root: type[BaseModel]) -> str:
    """Dotted key, what is wrong, and for unknown keys the nearest known one.

    Args:
        fault: one of ``ValidationError.errors()``.
        root: the model that was validated.
    """
    # unions add their branches to the location ("student.adapter.lora.rank", "images.size.int"): not part of the key
    key, inside, below = _follow([str(piece) for piece in fault["loc"]], root)
    if fault["type"] == "extra_forbidden":
        known = [name for model in inside for name in model.model_fields]
        last = str(fault["loc"][-1])
        near = difflib.get_close_matches(last, known, n=1)
        return f"{key}: unknown key; " + (f"did you mean {near[0]}?" if near else f"allowed: {', '.join(known)}")
    if fault["type"] == "missing":
        return f"{key}: missing; give it in the recipe or as {key}=... on the command line"
    if fault["type"] == "union_tag_not_found":
        return f"{key}: give its kind, one of {', '.join(map(_kind, below))}"
    given = fault["input"]
    if fault["type"] == "path_type":
        return f"{key}: a path is text, and YAML reads another thing here ({given!r}); put it into quotes of its own"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + (f" (got {given!r})" if isinstance(given, str | int | float | None) else "")


def _follow(location: list[str], root: type[BaseModel]) -> tuple[str, Models, Models]:
    """The dotted key of a location, the models that its last piece was looked for in, and those that it leads to."""
    key: list[str] = []
    here: Models = [root]
    inside: Models = [root]
    free = False  # the next piece is a name that the user chose
    for piece in location:
        fields = [model.model_fields[piece] for model in here if piece in model.model_fields]
        tagged = [model for model in here if _kind(model) == piece]
        if fields:
            inside, key = here, [*key, piece]
            here = [model for field in fields for model in _models(field.annotation)]
            free = any(_is_mapping(field.annotation) for field in fields)
        elif free:
            inside, key, free = here, [*key, piece], False
        elif tagged:
            here = inside = tagged
        elif here and piece == location[-1]:
            inside, key = here, [*key, piece]
    return ".".join(key) or "recipe", inside, here


def _kind(model: type[BaseModel]) -> str:
    """The value of ``kind`` that chooses this model, or nothing."""
    field = model.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field and get_args(field.annotation) else ""


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict

"""One line for each fault that pydantic finds in a recipe: the key, what is wrong, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel

Models = list[type[BaseModel]]


@dataclass(frozen=True)
class Location:
    """Where a fault is.

    Args:
        key: the dotted key.
        parents: the models that may hold the last piece of the key.
        children: the models of its value.
    """

    key: str
    parents: Models
    children: Models


def explain(fault: Any, root: type[BaseModel]) -> str:
    """Dotted key, what is wrong, and for an unknown key the nearest known one.

    Args:
        fault: one of ``ValidationError.errors()``.
        root: the model that was validated.
    """
    location = _locate([str(piece) for piece in fault["loc"]], root)
    key, given = location.key, fault["input"]
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_suggest_key(str(fault['loc'][-1]), location.parents)}"
    if fault["type"] == "missing":
        return f"{key}: missing; give it in the recipe or as {key}=... on the command line"
    if fault["type"] == "union_tag_not_found":
        return f"{key}: give its kind, one of {', '.join(map(_kind, location.children))}"
    if fault["type"] == "path_type":
        return f"{key}: a path must be text, but YAML reads {given!r}, which is not; quote the value in YAML"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + (f" (got {given!r})" if isinstance(given, str | int | float | None) else "")


def _suggest_key(unknown: str, models: Models) -> str:
    known = [name for model in models for name in model.model_fields]
    nearest = difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"allowed: {', '.join(known)}"


def _locate(pieces: list[str], root: type[BaseModel]) -> Location:
    """Follow the pieces of a pydantic location.

    Unions add their branches to it ("student.adapter.lora.rank", "images.size.int"), which are not part of the key.
    """
    key: list[str] = []
    models: Models = [root]
    parents: Models = [root]
    is_user_name = False  # the next piece is a name that the user chose, such as that of a teacher
    for piece in pieces:
        fields = [model.model_fields[piece] for model in models if piece in model.model_fields]
        branches = [model for model in models if _kind(model) == piece]
        if fields:
            parents, key = models, [*key, piece]
            models = [model for field in fields for model in _models(field.annotation)]
            is_user_name = any(get_origin(field.annotation) is dict for field in fields)
        elif is_user_name:
            parents, key, is_user_name = models, [*key, piece], False
        elif branches:
            models = parents = branches
        elif models and piece == pieces[-1]:
            parents, key = models, [*key, piece]
    return Location(".".join(key) or "recipe", parents, models)


def _kind(model: type[BaseModel]) -> str:
    """The value of ``kind`` that selects this model; empty for a model without one."""
    field = model.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field and get_args(field.annotation) else ""


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models anywhere in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)

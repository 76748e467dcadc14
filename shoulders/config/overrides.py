"""Overrides of a recipe from the command line: ``key.subkey=value``."""

from __future__ import annotations

from datetime import date
from typing import Any

import yaml

from shoulders.errors import RecipeError


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of a recipe that is still plain data.

    Raises:
        RecipeError: the override is not ``key.subkey=value``, or its value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r}: an override is written key.subkey=value, e.g. train.steps=2000")
    *sections, last = key.split(".")
    for name in sections:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"{override!r}: {name!r} holds a value, not a section")
    tree[last] = _parse(text, override)


def _parse(text: str, override: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{override!r}: the value is not YAML") from error
    if isinstance(value, date):  # a folder named 2024-11-20
        return text.strip()
    if isinstance(value, str) and "#" in text and not text.startswith(("'", '"')):  # a folder named "set #2"
        return text.strip()
    return value

"""What a run folder says of itself, read without loading a model."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoulders.config.recipe import Recipe, read_recipe
from shoulders.errors import DataError, RecipeError

BASE = "base"  # under this name the base is a teacher, so that what it knows is kept
Points = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Told:
    """All that the files of a run say.

    Args:
        folder: of the run.
        text: its recipe as it stands there.
        recipe: the same, checked; None where this version no longer takes it.
        kept: rows of ``results.json``.
        rows: those that are to be shown: the same, unless others were given.
        log: of ``metrics.jsonl``.
        config: of the student; {} where there is none yet.
    """

    folder: Path
    text: str
    recipe: Recipe | None
    kept: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    log: list[dict[str, Any]]
    config: dict[str, Any]

    @property
    def tree(self) -> dict[str, Any]:
        """The recipe as plain data."""
        tree = yaml.safe_load(self.text)
        return tree if isinstance(tree, dict) else {}

    @property
    def teachers(self) -> list[str]:
        """The names of the teachers; the base is not one of them."""
        named = [*(self.tree.get("teachers") or {}), *(self.config.get("teachers") or {})]
        return [name for name in dict.fromkeys(named) if name != BASE]

    def curves(self, kind: str) -> dict[str, Points]:
        """{name: its values over the steps} of all finite numbers in rows of one kind."""
        found: dict[str, Points] = {}
        for row in self.log:
            if row.get("kind") == kind:
                for name, value in row.items():
                    if name not in ("step", "kind") and isinstance(value, int | float) and math.isfinite(value):
                        found.setdefault(name, []).append((row["step"], value))
        return found

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware of the newest process that worked on the run; {} where that was not noted."""
        noted = [row for row in self.log if row.get("kind") == "run"]
        return {key: value for key, value in noted[-1].items() if key not in ("step", "kind")} if noted else {}

    @property
    def seconds(self) -> float | None:
        """How long distilling took."""
        return next((row.get("seconds") for row in self.kept if row.get("task") == "inheritance"), None)

    @property
    def steps(self) -> int:
        """Steps that the run has done, as far as is known."""
        if self.config:
            return int((self.tree.get("train") or {}).get("steps", 0))
        return max((row["step"] for row in self.log), default=0)

    def of_training(self, name: str) -> list[float]:
        """A number of the training rows."""
        return [value for _, value in self.curves("train").get(name, [])]

    @property
    def images_per_s(self) -> float | None:
        """The median speed of training."""
        speeds = self.of_training("images_per_s")
        return statistics.median(speeds) if speeds else None


def read_run(folder: Path, rows: Sequence[dict[str, Any]] | None = None) -> Told:
    """Read a run folder.

    Args:
        rows: to be shown instead of those in its ``results.json``.

    Raises:
        RecipeError: it is no run folder.
        DataError: a file in it is damaged.
    """
    try:
        text = (folder / "recipe.yaml").read_text()
    except OSError as error:
        raise RecipeError(f"{folder}: no recipe.yaml here; give the folder of a run") from error
    try:
        recipe = read_recipe(folder / "recipe.yaml")
    except RecipeError:  # of an older version, or not YAML, which is found next
        recipe = None
    log = _lines(folder / "metrics.jsonl")
    kept = _json(folder / "results.json", [])
    config = _json(folder / "student" / "config.json", {})
    told = Told(folder, text, recipe, kept, kept if rows is None else list(rows), log, config)
    try:
        told.teachers  # noqa: B018  (a recipe that cannot be read is found here)
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / 'recipe.yaml'}: not a recipe ({' '.join(str(error).split())})") from error
    return told


def _json(path: Path, otherwise: Any) -> Any:
    if not path.is_file():
        return otherwise
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove it, or run what wrote it again") from error
    if type(found) is not type(otherwise):
        raise DataError(f"{path}: holds a {type(found).__name__}, not a {type(otherwise).__name__}; remove it")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, without the half line that a killed run may leave."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows

"""The files of a run folder, read without loading a model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoulders.config.recipe import Recipe, read_recipe
from shoulders.errors import DataError, RecipeError
from shoulders.storage.json_lines import read_lines
from shoulders.storage.json_text import parse_json

BASE = "base"  # the name of the base where it is also a teacher
SECTIONS = ("student", "teachers", "images", "transfer", "train")
Points = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class RunRecord:
    """Everything that the files of a run folder contain.

    Args:
        folder: the run folder.
        recipe_text: the text of its ``recipe.yaml``.
        tree: the same as plain data.
        recipe: the same, checked; None if this version of shoulders does not accept it.
        results: rows of ``results.json``.
        rows: rows for the results table: those of ``results.json``, or others that were given.
        metrics: rows of ``metrics.jsonl``.
        student_config: ``config.json`` of the student; {} if the run has no student yet.
        not_finite: rows of ``not_finite.jsonl``: the ``teacher`` and the ``name`` of an image that it is left out for.
    """

    folder: Path
    recipe_text: str
    tree: dict[str, Any]
    recipe: Recipe | None
    results: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    student_config: dict[str, Any]
    not_finite: list[dict[str, str]]

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe as plain data; {} if it is absent."""
        return self.tree.get(name) or {}

    @property
    def teachers(self) -> list[str]:
        """The names of the teachers, without the base."""
        names = [*self.section("teachers"), *(self.student_config.get("teachers") or {})]
        return [name for name in dict.fromkeys(names) if name != BASE]

    def curves(self, kind: str) -> dict[str, Points]:
        """{name: (step, value) of all finite numbers} in the metric rows of one kind."""
        curves: dict[str, Points] = {}
        for row in self.metrics:
            if row.get("kind") == kind:
                for name, value in row.items():
                    if name not in ("step", "kind") and isinstance(value, int | float) and math.isfinite(value):
                        curves.setdefault(name, []).append((row["step"], value))
        return curves

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware of the latest process of the run; {} if they were not recorded."""
        processes = [row for row in self.metrics if row.get("kind") == "run"]
        return {key: value for key, value in processes[-1].items() if key not in ("step", "kind")} if processes else {}

    @property
    def training_seconds(self) -> float | None:
        """The time of the distillation; None if it is not finished."""
        return next((row.get("seconds") for row in self.results if row.get("task") == "inheritance"), None)

    @property
    def steps(self) -> int:
        """Training steps that are done, as far as the files show."""
        if self.student_config:
            return int(self.section("train").get("steps", 0))
        return max((row["step"] for row in self.metrics), default=0)

    def training_values(self, name: str) -> list[float]:
        """All values of one metric in the training rows."""
        return [value for _, value in self.curves("train").get(name, [])]

    @property
    def images_per_s(self) -> float | None:
        """The median training speed; None if it was not recorded."""
        speeds = self.training_values("images_per_s")
        return statistics.median(speeds) if speeds else None


def read_run(folder: Path, rows: Sequence[dict[str, Any]] | None = None) -> RunRecord:
    """Read a run folder.

    Args:
        folder: the run folder.
        rows: for the results table, instead of those in its ``results.json``.

    Raises:
        RecipeError: it is no run folder.
        DataError: a file in it is damaged.
    """
    path = folder / "recipe.yaml"
    try:
        text = path.read_text()
    except OSError as error:
        raise RecipeError(f"{folder}: has no recipe.yaml; give the folder of a run") from error
    tree = _parse_recipe(path, text)
    try:
        recipe = read_recipe(path)
    except RecipeError:  # of another version
        recipe = None
    metrics = _read_log(folder / "metrics.jsonl")
    results = _read_json(folder / "results.json", [])
    config = _read_json(folder / "student" / "config.json", {})
    not_finite = read_lines(folder / "not_finite.jsonl", ("teacher", "name"), truncate=False)
    shown = results if rows is None else list(rows)
    return RunRecord(folder, text, tree, recipe, results, shown, metrics, config, not_finite)


def _parse_recipe(path: Path, text: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not a recipe ({' '.join(str(error).split())})") from error
    tree = tree if isinstance(tree, dict) else {}
    wrong = [name for name in SECTIONS if not isinstance(tree.get(name) or {}, dict)]
    if wrong:
        raise DataError(f"{path}: not a recipe ({wrong[0]} is a {type(tree[wrong[0]]).__name__}, not a section)")
    return tree


def _read_json(path: Path, default: Any) -> Any:
    """The content of a file, or the default if it does not exist; both must be of one type."""
    if not path.is_file():
        return default
    try:
        content = parse_json(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove it, and run the command that wrote it again") from error
    if type(content) is not type(default):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a {type(default).__name__}; remove it")
    return content


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; an incomplete last line, which a killed run may leave, is skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows

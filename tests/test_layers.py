"""The arrows of the package point down only, and its front door opens without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "shoulders"

# From top to bottom: a part imports from its own layer and from those below it.
LAYERS = (
    ("__init__", "__main__", "cli"),
    ("demo",),
    ("distillation", "planning"),
    ("feature_cache",),
    ("training",),
    ("prediction", "report"),
    ("evaluation",),
    ("inference",),
    ("model", "tasks", "world"),
    ("images", "teachers", "student", "transfer"),
    ("optimizers",),
    ("distributed", "storage", "hub"),
    ("features", "config", "errors"),
)
# These stand side by side and never import each other.
APART = {"images", "teachers", "student", "transfer"}
HEIGHT = {part: height for height, parts in enumerate(reversed(LAYERS)) for part in parts}


def package_part(file: Path, package: Path = PACKAGE) -> str:
    """``shoulders/tasks/classification.py`` belongs to ``tasks``, ``shoulders/model.py`` to ``model``."""
    return file.relative_to(package).parts[0].removesuffix(".py")


def imported_parts(file: Path, package: Path = PACKAGE) -> set[str]:
    """The parts of the package that a file imports, anywhere in it; ``__init__`` is the package itself."""
    here = (package.name, *file.relative_to(package).parent.parts)
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = here[: len(here) - node.level + 1] if node.level else ()
            origin = ".".join((*parents, *(node.module or "").split("."))).strip(".")
            modules |= {f"{origin}.{alias.name}" for alias in node.names}
    names = [module.split(".") for module in modules]
    inside = {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == package.name}
    known = {package_part(file, package) for file in package.rglob("*.py")}
    return {part if part in known else "__init__" for part in inside}


def faults(package: Path) -> list[str]:
    found = []
    for file in sorted(package.rglob("*.py")):
        part, where = package_part(file, package), file.relative_to(package.parent)
        if part not in HEIGHT:
            found.append(f"{where}: no layer is given for {part!r}; add it to LAYERS in tests/test_layers.py")
            continue
        for other in sorted(imported_parts(file, package) - {part}):
            if other not in HEIGHT:
                continue  # reported above, for its own file
            if HEIGHT[other] > HEIGHT[part]:
                found.append(f"{where}: imports upwards, {part} -> {other}")
            if {part, other} <= APART:
                found.append(f"{where}: {part} and {other} stand apart; what both need belongs below")
    return found


def test_imports_point_down_only() -> None:
    assert not faults(PACKAGE)


@pytest.mark.parametrize(
    ("file", "code", "fault"),
    [
        ("features.py", "from shoulders.images import views", "imports upwards, features -> images"),
        ("images/views.py", "def f():\n    import shoulders.student.base", "stand apart"),
        ("images/views.py", "from ..student import base", "stand apart"),
        ("student/base.py", "from shoulders import load", "imports upwards, student -> __init__"),
        ("student/base.py", "from .. import images", "stand apart"),
        ("surprise.py", "", "add it to LAYERS"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, code: str, fault: str) -> None:
    package = tmp_path / "shoulders"
    for name in ("__init__.py", "features.py", "images/views.py", "student/base.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("import torch\nfrom shoulders.features import Features\n")
    assert not faults(package)
    (package / file).write_text(code)
    assert len(faults(package)) == 1
    assert fault in faults(package)[0]


@pytest.mark.parametrize("module", ["shoulders", "shoulders.cli", "shoulders.config.recipe"])
def test_the_front_door_opens_without_heavy_imports(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import {module} loads {done.stdout}"

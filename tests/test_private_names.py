"""No module uses a private name of another: neither by import nor as an attribute of its objects."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("shoulders", "benchmarks", "tests", "docs")
NAMED_TUPLE = {"_asdict", "_replace", "_fields"}  # public in spite of their names
# private names of other packages, by file: there is no public way to do the same
THIRD_PARTY = {
    "shoulders/cli/__init__.py": {"_exit"},  # os: documented
    "shoulders/distributed/context.py": {"_exit"},
    "shoulders/distributed/sharding.py": {"_lazy_init"},  # torch: which module is the root of FSDP
    "shoulders/hub/fast.py": {"_linear_pointwise", "_reorder_linear_weight", "_version"},  # torch: packed weights
    "shoulders/hub/files.py": {"_CACHED_NO_EXIST"},  # huggingface_hub: a file known to be absent
    "shoulders/tasks/average_precision.py": {"_evalImgs_cpp"},  # faster-coco-eval: evaluated images
    "shoulders/teachers/heads/head.py": {"_pytree"},  # torch: outputs of any structure
    "tests/crashes.py": {"_exit"},
    "tests/feature_cache/test_build.py": {"_exit"},
    "tests/images/test_loader.py": {"_exit"},
    "tests/hub/test_fast.py": {"_attn_implementation"},  # transformers: the kernel that a model uses
    "tests/mutation/run.py": {"_exit"},
    "tests/storage/test_locks.py": {"_exit"},
    "tests/training/test_teacher_sources.py": {"_dynamo"},  # torch: the number of compiled graphs
}


def private(name: str) -> bool:
    """Whether a name is private by convention."""
    return name.startswith("_") and not name.startswith("__")


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every private name of another module or object that a module uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [*module.split("."), *(part for alias in node.names for part in alias.name.split("."))]
            yield from ((node.lineno, name) for name in names if private(name))
        elif isinstance(node, ast.Attribute) and private(node.attr) and not of_its_own(node.value):
            yield node.lineno, node.attr


def of_its_own(value: ast.expr) -> bool:
    """Whether this is ``self``, ``cls`` or ``super()``."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def faults(root: Path) -> list[str]:
    """One line for each use of a private name in the folders of a checkout."""
    lines = []
    for file in sorted(file for folder in FOLDERS for file in (root / folder).rglob("*.py")):
        path = file.relative_to(root).as_posix()
        allowed = NAMED_TUPLE | THIRD_PARTY.get(path, set())
        for number, name in uses(ast.parse(file.read_text())):
            if name not in allowed:
                lines.append(f"{path}:{number}: {name} is private; make it public, or use another name")
    return lines


def test_no_private_name_crosses_a_module() -> None:
    assert not faults(ROOT)


def test_every_exception_is_needed() -> None:
    for path, names in THIRD_PARTY.items():
        used = {name for _, name in uses(ast.parse((ROOT / path).read_text()))}
        assert names <= used, f"{path} no longer uses {names - used}"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from shoulders.images.decode import _crop", ["_crop"]),
        ("import torch._dynamo", ["_dynamo"]),
        ("from torch._dynamo import utils", ["_dynamo"]),
        ("def f(run): return run._batches()", ["_batches"]),
        ("class A:\n    def f(self): return self.other._state", ["_state"]),
        ("class A:\n    def f(self): return self._state, super()._state, self.__dict__", []),
        ("class A:\n    @classmethod\n    def f(cls): return cls._made", []),
        ("from . import a\n_local = a.public", []),
    ],
)
def test_private_names_are_noticed(code: str, names: list[str]) -> None:
    assert [name for _, name in uses(ast.parse(code))] == names


def test_a_fault_names_file_line_and_name(tmp_path: Path) -> None:
    (tmp_path / "shoulders").mkdir()
    (tmp_path / "shoulders" / "one.py").write_text("import torch\n\nx = torch._C\n")
    (fault,) = faults(tmp_path)
    assert fault.startswith("shoulders/one.py:3: _C is private")

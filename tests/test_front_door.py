"""The front door: every public name, imported lazily, callable whatever else is imported."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import shoulders
from tests.tiny import save_images, save_tiny_world, tiny_tree

PACKAGE = Path(shoulders.__file__).parent
VERBS = {"cache", "distill", "evaluate", "load", "plan", "predict", "read_recipe"}


def printed(code: str) -> list[str]:
    """The words that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_public_name_is_in_all_and_in_the_table() -> None:
    assert shoulders.__all__ == sorted(shoulders.PUBLIC) == list(shoulders.PUBLIC)
    assert set(shoulders.PUBLIC) <= set(dir(shoulders))
    # the names that type checkers see are the same
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imported = [alias.asname or alias.name for node in checked.body for alias in getattr(node, "names", [])]
    assert sorted(imported) == shoulders.__all__


def test_no_submodule_hides_a_public_name() -> None:
    for module in pkgutil.walk_packages([str(PACKAGE)], "shoulders."):
        if module.name != "shoulders.__main__":
            importlib.import_module(module.name)
    for name, origin in shoulders.PUBLIC.items():
        public = getattr(shoulders, name)
        assert callable(public)
        assert public is getattr(sys.modules[origin.partition(":")[0]], origin.partition(":")[2])
    assert all(name.islower() == (name in VERBS) for name in shoulders.PUBLIC)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'shoulders' has no attribute 'nothing'"):
        _ = shoulders.nothing


def test_names_are_imported_when_they_are_first_used() -> None:
    heavy = "print(*sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    assert printed(f"import sys, shoulders; dir(shoulders); {heavy}") == []
    assert printed(f"import sys, shoulders; shoulders.Recipe; {heavy}") == ["pydantic"]


def test_the_whole_way_through_the_front_door(tmp_path: Path) -> None:
    save_tiny_world(tmp_path)
    save_images(tmp_path / "labelled", 24, classes=2)
    tree = tiny_tree(tmp_path, train__steps=2, images__views=1, cache={"path": str(tmp_path / "cache")})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    assert shoulders.plan(recipe)["step_s"] > 0
    assert shoulders.cache(recipe)["teachers"][0]["finished"]
    assert shoulders.distill(recipe)["steps"] == 2
    latent = shoulders.load(run)(torch.rand(1, 3, 32, 32)).latent
    assert isinstance(latent, shoulders.Features)
    rows = shoulders.evaluate(run, "classification", tmp_path / "labelled", ["student"], workers=0)
    assert rows
    predictions = shoulders.predict(run, tmp_path / "images", probes=["student/classification"])
    assert len(predictions) == 60
    assert shoulders.read_recipe(run / "recipe.yaml") == shoulders.read_recipe(recipe)

"""The docs agree with the code: keys of recipes, the tree of the package, and the example of own models."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from shoulders.config.resume import FREE_ON_RESUME
from shoulders.errors import DataError
from shoulders.model import load
from tests.test_layers import HEIGHT

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MAX_PURPOSE_WORDS = 9


def test_every_key_of_a_recipe_is_explained() -> None:
    spec = importlib.util.spec_from_file_location("keys", DOCS / "keys.py")
    assert spec is not None and spec.loader is not None
    keys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(keys)
    page = (DOCS / "recipe.md").read_text()
    assert page == keys.page(), "run: python docs/keys.py"
    assert not [line for line in page.splitlines() if line.endswith("|  |")]  # each has a meaning
    assert all(f"`{key}`" in page for key in FREE_ON_RESUME)


def readme_tree() -> dict[str, str]:
    """{entry of the package: its purpose} in the tree of the README."""
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"```\nrecipes/.*?\nshoulders/\n(.*?)\nbenchmarks/", readme, re.S)
    assert tree is not None
    rows = [re.fullmatch(r"  (\S+)  +(\S.*)", line) for line in tree[1].splitlines()]
    return {row[1].rstrip("/"): row[2] for row in rows if row is not None}


def test_the_tree_of_the_readme_names_every_entry_of_the_package() -> None:
    tree = readme_tree()
    entries = {path.name for path in (ROOT / "shoulders").iterdir() if path.name != "__pycache__"}
    assert set(tree) == entries
    assert all(len(purpose.split()) <= MAX_PURPOSE_WORDS for purpose in tree.values())
    heights = [HEIGHT[entry.removesuffix(".py")] for entry in tree]
    assert heights == sorted(heights, reverse=True), "the README says that no entry imports one that is above it"


def test_every_link_between_pages_leads_to_a_file_and_a_heading() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]:
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                assert heading in headings(file), f"{page.name}: {target}#{heading}"


def headings(page: Path) -> set[str]:
    """The headings of a page as they are linked."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/recipe.md", "docs/four_tasks.md"])
def test_code_in_backticks_that_names_a_file_names_one_that_exists(page: str) -> None:
    names = re.findall(r"`((?:shoulders|tests|benchmarks|recipes|docs)/[\w./-]+)`", (ROOT / page).read_text())
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_example_of_own_models_and_images_works(tmp_path: Path) -> None:
    (code, text) = (
        re.search(rf"```{kind}\n(.*?)```", (DOCS / "own.md").read_text(), re.S) for kind in ("python", "yaml")
    )
    assert code is not None and text is not None
    (tmp_path / "mine.py").write_text(code[1])
    (tmp_path / "mine.yaml").write_text(text[1])
    (tmp_path / "shoulders").symlink_to(ROOT / "shoulders")
    Image.new("RGB", (80, 80)).save(tmp_path / "photo.png")
    outputs = []
    for command in (["distill", "mine.yaml"], ["predict", "runs/mine", "photo.png", "--out", "out"]):
        done = subprocess.run(
            [sys.executable, "-m", "shoulders", *command], cwd=tmp_path, timeout=200, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout)
    assert "mine/last/spatial" in outputs[0]
    (prediction,) = json.loads((tmp_path / "out" / "predictions.json").read_text()).values()
    assert {one["label"] for one in prediction["mine"]} == {"cat", "dog"}
    with pytest.raises(DataError, match="heads/mine: its code 'mine:Head' cannot be used: no Python module 'mine'"):
        load(tmp_path / "runs" / "mine").head("mine")  # elsewhere, without the code


def test_every_test_that_a_page_names_exists() -> None:
    for page in DOCS.glob("*.md"):
        file = Path()
        for name, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", page.read_text()):
            file = ROOT / name if name else file
            if name or test:
                assert file.is_file(), f"{page.name}: {name}"
                assert not test or f"def {test}(" in file.read_text(), f"{page.name}: {file.name}::{test}"

"""Pages that are written out of the code are those of this code."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from shoulders.config.resume import FREE_ON_RESUME

DOCS = Path(__file__).parents[1] / "docs"


def test_every_key_of_a_recipe_is_explained() -> None:
    spec = importlib.util.spec_from_file_location("keys", DOCS / "keys.py")
    assert spec is not None and spec.loader is not None
    keys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(keys)
    page = (DOCS / "recipe.md").read_text()
    assert page == keys.page(), "run: python docs/keys.py"
    assert not [line for line in page.splitlines() if line.endswith("|  |")]  # each has a meaning
    assert all(f"`{key}`" in page for key in FREE_ON_RESUME)


def test_models_and_images_of_your_own_are_as_the_page_says(tmp_path: Path) -> None:
    (code, text) = (
        re.search(rf"```{kind}\n(.*?)```", (DOCS / "own.md").read_text(), re.S) for kind in ("python", "yaml")
    )
    assert code is not None and text is not None
    (tmp_path / "mine.py").write_text(code[1])
    (tmp_path / "mine.yaml").write_text(text[1])
    (tmp_path / "shoulders").symlink_to(DOCS.parent / "shoulders")
    done = subprocess.run(
        [sys.executable, "-m", "shoulders", "distill", "mine.yaml"],
        cwd=tmp_path,
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mine/last/spatial" in done.stdout

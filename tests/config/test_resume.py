"""What may change in the recipe of a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoulders.config.recipe import dump_recipe
from shoulders.config.resume import FREE_ON_RESUME, check_resumed
from shoulders.errors import RecipeError
from tests.tiny import tiny_recipe

TWO_SOURCES = {"a": {"path": "a"}, "b": {"path": "b"}}


@pytest.fixture
def started_with(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(tiny_recipe(Path(), images__path=None, images__sources=TWO_SOURCES)))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__lr": 1.0}, r"train\.lr: the run started with 0\.005, not 1\.0; resume with the same, or choose an"),
        ({"train__ema": 0.9}, r"train\.ema: the run started with None, not 0\.9"),
        ({"student__adapter__width": 4}, r"student\.adapter\.width: the run started with 8, not 4"),
        ({"teachers__third": {"model": "third"}}, r"teachers\.third\..*: the run started with None"),
        ({"images__sources": dict(reversed(TWO_SOURCES.items()))}, r"images\.sources: .* a, b in this order"),
    ],
)
def test_a_key_that_changes_the_result_is_refused(started_with: Path, changes: dict, message: str) -> None:
    changed = tiny_recipe(Path(), **{"images__path": None, "images__sources": TWO_SOURCES} | changes)
    with pytest.raises(RecipeError, match=message):
        check_resumed(changed, started_with)


def test_keys_without_an_effect_on_the_weights_may_change(started_with: Path) -> None:
    changes = {
        "images__workers": 3,
        "images__max_unreadable": 0.5,
        "transfer__max_not_finite": 0.5,
        "train__log_every": 7,
        "train__save_every": 7,
        "train__evaluate_every": 7,
        "train__keep_checkpoints": 7,
        "train__tensorboard": True,
        "train__parallel": "fsdp",
        "cache__path": "x",
        "cache__mode": "require",
    }
    assert {"out", *(key.replace("__", ".") for key in changes)} == set(FREE_ON_RESUME)
    changed = tiny_recipe(Path(), "other", images__path=None, images__sources=TWO_SOURCES, **changes)
    check_resumed(changed, started_with)

"""All files of a hub model come from one commit, and the license comes from its card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoulders.errors import RecipeError
from shoulders.hub import (
    IMAGENET_STATS,
    Preprocessing,
    Pretrained,
    find_file,
    open_pretrained,
    read_json,
    read_license,
    read_preprocessing,
)

OLD, NEW = "0123456789" * 4, "abcdef0123" * 4


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached repository someone/something at two commits; its branch main is at the old one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--something"
    for commit in (OLD, NEW):
        (repository / "snapshots" / commit).mkdir(parents=True)
        for file in ("config.json", "other.json"):
            (repository / "snapshots" / commit / file).write_text(json.dumps({"commit": commit}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(OLD)
    return repository


@pytest.mark.parametrize("revision", [None, "main", OLD])
def test_all_files_come_from_the_commit_of_the_first(hub_cache: Path, revision: str | None) -> None:
    pretrained = open_pretrained("student.base", "someone/something", revision)
    (hub_cache / "refs" / "main").write_text(NEW)  # a new commit is pushed
    assert pretrained == Pretrained("student.base", "someone/something", OLD, {"commit": OLD})
    assert read_json(pretrained, "other.json") == {"commit": OLD}
    assert find_file(pretrained, "nothing.json") is None and read_json(pretrained, "nothing.json") is None


def test_a_missing_file_is_accepted_only_if_the_hub_has_none(hub_cache: Path) -> None:
    """A model whose preprocessing was not downloaded would get wrong pixels."""
    pretrained = open_pretrained("student.base", "someone/something", None)
    default = Preprocessing((224, 224), *IMAGENET_STATS)
    with pytest.raises(RecipeError, match=r"without its preprocessor_config\.json, and the hub cannot be reached"):
        read_preprocessing(pretrained, default)
    absent = hub_cache / ".no_exist" / OLD / "preprocessor_config.json"  # the mark of a file that the hub has not
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert read_preprocessing(pretrained, default) == default
    absent.unlink()
    (hub_cache / "snapshots" / OLD / "preprocessor_config.json").write_text('{"size": 64}')
    assert read_preprocessing(pretrained, default).size == (64, 64)


def test_a_missing_revision_is_refused(hub_cache: Path) -> None:
    with pytest.raises(RecipeError, match="^student.base: 'someone/something' is no local .* at revision 'v2'; check"):
        open_pretrained("student.base", "someone/something", "v2")


def test_a_folder_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    pretrained = open_pretrained("student.base", "~/model", None)
    assert pretrained == Pretrained("student.base", str(tmp_path / "model"), None, {})
    with pytest.raises(RecipeError, match="'~/model' is a local folder, which has no revisions; leave revision out"):
        open_pretrained("student.base", "~/model", "main")


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (None, "unknown"),
        ("# A model", "unknown"),
        ("# A model\n---\nlicense: mit\n---\n", "unknown"),
        ("---\ntags: [a]\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---', "mit"),
        ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: dinov3-license\n---\n", "dinov3-license"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [\n---\n", "unknown"),
    ],
)
def test_license(tmp_path: Path, card: str | None, license: str) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_license(Pretrained("student.base", str(tmp_path), None)) == license

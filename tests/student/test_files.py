"""A student whose files are not those that were saved is refused; what a user adds to its folder is not."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import shoulders
from shoulders.errors import DataError
from shoulders.model import ShouldersBackbone
from shoulders.storage.manifest import MANIFEST
from shoulders.student.files import finish_folder
from tests.test_model import make_student

HEAD = "heads/detector/"
FILES = ("config.json", "preprocessor_config.json", "model.safetensors", f"{HEAD}head.json", f"{HEAD}model.safetensors")


def write_student(folder: Path) -> Path:
    """A student with a head, which is not opened here."""
    (folder / HEAD).mkdir(parents=True)
    (folder / HEAD / "head.json").write_text("{}")
    save_file({"weight": torch.ones(3)}, folder / FILES[4])
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "README.md").write_text("# A student")
    make_student().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student") / "student")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "student"))


def flip_bit(path: Path, at: float = 0.7) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def test_the_manifest_lists_every_file_but_the_card(folder: Path) -> None:
    entries = json.loads((folder / MANIFEST).read_text())
    assert sorted(entries) == sorted(FILES)
    assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in entries.items())
    assert list(shoulders.load(folder).heads) == ["detector"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_student_is_refused(folder: Path, name: str) -> None:
    flip_bit(folder / name)
    for read in (shoulders.load, AutoModel.from_pretrained, ShouldersBackbone.from_pretrained):
        with pytest.raises((DataError, OSError), match=rf"{name}: its bytes are not|not a valid|no model_type"):
            read(folder)


def test_verification_can_be_left_out(folder: Path) -> None:
    flip_bit(folder / FILES[4])
    for student in (shoulders.load(folder, verify=False), AutoModel.from_pretrained(folder, verify=False)):
        assert list(student.heads) == ["detector"]


@pytest.mark.parametrize("name", [*FILES[1:], HEAD])
def test_a_file_that_is_missing_is_named(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name) if name == HEAD else (folder / name).unlink()
    with pytest.raises(DataError, match=r"missing; manifest\.json lists it; copy the whole folder again, or load it"):
        shoulders.load(folder)


@pytest.mark.parametrize("name", ["other.safetensors", "model.safetensors.index.json", f"{HEAD}config.json"])
def test_a_file_that_the_manifest_does_not_list_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(DataError, match=rf"{name}: not listed in manifest\.json"):
        shoulders.load(folder)


@pytest.mark.parametrize("text", ["{}", "[]", "[" * 100_000, "", '{"../outside.json": {"bytes": 2, "sha256": ""}}'])
def test_a_manifest_that_lists_nothing_is_refused(folder: Path, text: str) -> None:
    (folder.parent / "outside.json").write_text("{}")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"lists no files|cannot be read|outside\.json: missing") as refused:
        shoulders.load(folder)
    assert "\n" not in str(refused.value)


def test_what_a_user_adds_or_changes_beside_the_student_is_accepted(folder: Path) -> None:
    for name in ("README.md", "results.json", "photo.jpg", ".DS_Store", "._model.safetensors", "trainer_state.json"):
        (folder / name).write_text("of the user")
    (folder / "probes" / "student" / "semantic").mkdir(parents=True)
    (folder / "probes" / "student" / "semantic" / "model.safetensors").write_text("with a manifest of its own")
    shoulders.load(folder)


def test_a_student_without_a_manifest_is_loaded_with_a_warning(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"has no manifest\.json, so that damage goes unnoticed; save_pretrained"):
        shoulders.load(folder)
    shoulders.load(folder, verify=False)


def test_the_links_of_the_hub_cache_are_followed(folder: Path) -> None:
    """There a snapshot has links to files that are named by their contents."""
    blobs, snapshot = folder.parent / "blobs", folder.parent / "snapshots" / "commit"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(shutil.move(file, blobs / str(number)))
    assert list(shoulders.load(snapshot).heads) == ["detector"]
    flip_bit(snapshot / "model.safetensors")
    with pytest.raises(DataError, match="its bytes are not"):
        shoulders.load(snapshot)


def test_a_student_saved_again_has_a_new_manifest(folder: Path, tmp_path: Path) -> None:
    student = shoulders.load(folder)
    next(student.encoder.adapter.parameters()).data.add_(1)
    student.save_pretrained(folder)
    shoulders.load(folder)
    student.save_pretrained(tmp_path / "copy", max_shard_size="50KB")
    assert not (tmp_path / "copy" / "model.safetensors").exists()
    shoulders.load(tmp_path / "copy")
    (tmp_path / "copy" / HEAD / "head.json").write_text("[]")
    with pytest.raises(DataError, match=r"head\.json: its bytes"):
        shoulders.load(tmp_path / "copy")


def test_a_subfolder_is_checked_as_a_folder_is(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    AutoModel.from_pretrained(folder.parent, subfolder="student")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "weights.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    finish_folder(folder)
    with pytest.raises(DataError, match=r"weight_map names 'weights\.bin'"):
        AutoModel.from_pretrained(folder.parent, subfolder="student")


@pytest.fixture(params=[0o022, 0o002, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    folder = write_student(tmp_path / "student")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.glob("*") if path.is_file()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}

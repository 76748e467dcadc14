"""Checkpoints: what is saved is loaded, every damage is noticed, and a full disk harms nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from pathlib import Path

import pytest
import torch

from shoulders.errors import DataError, SpaceError
from shoulders.training import checkpoint
from shoulders.training.checkpoint import checkpoints, load_checkpoint, load_newest, save_checkpoint

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


def test_a_loaded_checkpoint_is_the_saved_one_and_only_the_latest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, TENSORS, {"world": 1}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000015"]
    loaded = load_newest(tmp_path, print)
    assert loaded is not None
    tensors, state = loaded
    assert state == {"world": 1, "step": 15}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert load_newest(tmp_path / "nothing", print) is None


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_as_many_checkpoints_are_kept_as_the_recipe_has(keep: int, tmp_path: Path) -> None:
    for number in range(1, 8):
        save_checkpoint(tmp_path, number, {"a": torch.ones(1)}, {}, keep=keep)
        assert len(checkpoints(tmp_path)) == min(number, keep)


def test_a_damaged_checkpoint_of_a_later_step_does_not_replace_a_valid_one(tmp_path: Path) -> None:
    for step in (4, 12):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    (tmp_path / "step-00000012" / "state.json").write_text("{}")
    save_checkpoint(tmp_path, 6, TENSORS, {}, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000006"]


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)
    dice = random.Random(0)  # noqa: S311
    files = sorted(path.iterdir())
    for trial in range(100):
        file = files[trial % len(files)]
        valid = file.read_bytes()
        damaged = bytearray(valid)
        if trial < 80:
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        else:
            del damaged[dice.choice([0, 1, len(damaged) // 2, len(damaged) - 1]) :]
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="step-00000001"):
            load_checkpoint(path)
        file.write_bytes(valid)
    load_checkpoint(path)


@pytest.mark.parametrize("text", ["{}", "[]", "[" * 100_000, '{"state.json": ENTRY}', '{"x.json": ENTRY}'])
def test_a_manifest_without_the_files_of_a_checkpoint_is_refused(text: str, tmp_path: Path) -> None:
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    entry = json.loads((path / "manifest.json").read_text())["state.json"]
    (path / "manifest.json").write_text(text.replace("ENTRY", json.dumps(entry)))
    with pytest.raises(DataError, match="step-00000002/"):
        load_checkpoint(path)
    loaded = load_newest(tmp_path, print)
    assert loaded is not None and loaded[1]["step"] == 1


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    path = save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)
    os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_files_are_synced_before_the_folder_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename, fsync, paths = Path.rename, os.fsync, {}
    original_open = os.open

    def opening(path: str, *args: int) -> int:
        descriptor = original_open(path, *args)
        paths[descriptor] = Path(path).name
        return descriptor

    def syncing(descriptor: int) -> None:
        events.append(f"sync {paths[descriptor]}")
        fsync(descriptor)

    def renaming(self: Path, to: Path) -> Path:
        events.append(f"rename {to.name}")
        return rename(self, to)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    save_checkpoint(tmp_path / "c", 1, TENSORS, {}, keep=1)
    renamed = events.index("rename step-00000001")
    before, after = events[:renamed], events[renamed + 1 :]
    assert {"sync manifest.json", "sync state.json", "sync tensors.safetensors", "sync step-00000001.partial"} <= set(
        before
    )
    assert after == ["sync c"]


@pytest.mark.parametrize("where", ["save_file", "write_manifest"])
def test_a_full_disk_is_named_and_leaves_the_earlier_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(SpaceError, match="no space left .* --resume") as stop:
        save_checkpoint(tmp_path, 2, TENSORS, {}, keep=1)
    assert stop.value.exit_code == 5
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    load_checkpoint(tmp_path / "step-00000001")

"""Checkpoints: what is saved is loaded, every damage is noticed, and a full disk harms nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from shoulders.errors import DataError, SpaceError
from shoulders.training import checkpoint
from shoulders.training.checkpoint import checkpoints, load_checkpoint, load_newest, save_checkpoint
from tests.crashes import fork, watch_disk

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


def test_files_are_synced_before_the_folder_is_renamed_and_the_previous_one_removed_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "c", 0, TENSORS, {}, keep=1)
    events: list[str] = []
    rmtree = shutil.rmtree
    rename, fsync, paths = Path.rename, os.fsync, {}
    original_open = os.open

    def opening(path: str, *args: Any, **kwargs: Any) -> int:
        descriptor = original_open(path, *args, **kwargs)
        paths[descriptor] = Path(path).name
        return descriptor

    def syncing(descriptor: int) -> None:
        events.append(f"sync {paths[descriptor]}")
        fsync(descriptor)

    def renaming(self: Path, to: Path) -> Path:
        events.append(f"rename {to.name}")
        return rename(self, to)

    def removing(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            events.append(f"remove {path.name}")
            rmtree(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", removing)
    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    save_checkpoint(tmp_path / "c", 1, TENSORS, {}, keep=1)
    renamed = events.index("rename step-00000001")
    before, after = events[:renamed], events[renamed + 1 :]
    assert {"sync manifest.json", "sync state.json", "sync tensors.safetensors", "sync step-00000001.partial"} <= set(
        before
    )
    assert after == ["sync c", "remove step-00000000"]


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


def test_what_killed_runs_left_unfinished_is_removed_by_the_next_save(tmp_path: Path) -> None:
    for name in ("step-00000003.partial", "step-00000002.replaced"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path, 4, TENSORS, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def save_until_power_is_lost(number: int, folder: Path, syncs: bool) -> None:
    """Save in this (child) process and end it before a call that changes the disk, or after the last of them.

    Files that are not synced lose their second half.
    """
    calls, original = count(1), os.fsync
    synced = {path.stat().st_ino for path in folder.rglob("*")}

    def fsync(descriptor: int) -> None:
        original(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def lose_power(code: int) -> None:
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_ino not in synced:
                os.truncate(path, path.stat().st_size // 2)
        sys.exit(code)

    setattr(os, "fsync", fsync if syncs else lambda descriptor: None)  # noqa: B010
    watch_disk(lambda name: lose_power(1) if next(calls) == number else None)
    save_checkpoint(folder, 2, TENSORS, {}, keep=1)
    lose_power(0)


def steps_after_power_loss(folder: Path, syncs: bool = True) -> list[int]:
    """The step that can be loaded, for each call of the second save before which the power may be lost; 0: none."""
    steps = []
    for number in count(1):
        run = folder / str(number)
        save_checkpoint(run, 1, TENSORS, {}, keep=1)
        code = fork(partial(save_until_power_is_lost, number, run, syncs))
        try:
            checkpoint = load_newest(run, print)
            steps.append(checkpoint[1]["step"] if checkpoint else 0)
        except DataError:
            steps.append(0)
        if code == 0:
            break
    return steps


def test_a_checkpoint_can_be_loaded_after_the_power_is_lost_at_any_time(tmp_path: Path) -> None:
    steps = steps_after_power_loss(tmp_path)
    assert len(steps) > 15 and sorted(steps) == steps and set(steps) == {1, 2}


def test_without_syncs_the_loss_of_power_would_cost_the_last_checkpoint(tmp_path: Path) -> None:
    assert 0 in steps_after_power_loss(tmp_path, syncs=False)

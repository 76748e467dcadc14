"""Files and folders are replaced completely or not at all, and a full disk is named."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoulders.errors import SpaceError
from shoulders.storage.atomic import (
    MAX_FILE_SYNCS,
    free_bytes,
    size_text,
    space_error,
    write_bytes,
    write_folder,
    write_text,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def raise_full(*args: Any) -> None:
    raise FULL


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The syncs and renames of the test, in order."""
    events: list[str] = []
    paths: dict[int, str] = {}
    originals: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in ("open", "fsync", "sync")}
    renames = {name: getattr(Path, name) for name in ("rename", "replace")}

    def record_open(path: Any, *args: Any) -> int:
        descriptor = originals["open"](path, *args)
        paths[descriptor] = Path(path).name
        return int(descriptor)

    def record_fsync(descriptor: int) -> None:
        events.append(f"sync {paths[descriptor]}")
        originals["fsync"](descriptor)

    def record_sync() -> None:
        events.append("sync everything")
        originals["sync"]()

    monkeypatch.setattr(os, "open", record_open)
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "sync", record_sync)
    for name, original in renames.items():

        def record_rename(self: Path, target: Path, original: Callable[..., Any] = original) -> Any:
            events.append(f"rename {target.name}")
            return original(self, target)

        monkeypatch.setattr(Path, name, record_rename)
    return events


def fill(count: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for number in range(count):
            (folder / f"{number}.txt").write_text(str(number))

    return write


def test_a_folder_is_synced_before_it_is_renamed(tmp_path: Path, events: list[str]) -> None:
    write_folder(tmp_path / "final", fill(2))
    assert events == [
        "sync 0.txt",
        "sync 1.txt",
        "sync final.partial",
        "rename final",
        f"sync {tmp_path.name}",
    ]


def test_a_folder_of_many_files_is_synced_at_once(tmp_path: Path, events: list[str]) -> None:
    write_folder(tmp_path / "final", fill(MAX_FILE_SYNCS + 1))
    assert events == ["sync everything", "rename final", f"sync {tmp_path.name}"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "final", fill(3))
    (tmp_path / "final.partial").mkdir()  # left by a killed run
    (tmp_path / "final.partial" / "old.txt").touch()
    write_folder(tmp_path / "final", fill(1))
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["0.txt"]


@pytest.mark.parametrize("error", [FULL, OSError(errno.EDQUOT, "Disk quota exceeded")])
def test_a_folder_stays_as_it_was_if_the_disk_is_full(tmp_path: Path, error: OSError) -> None:
    write_folder(tmp_path / "final", fill(1))

    def fail(folder: Path) -> None:
        (folder / "new.txt").touch()
        raise error

    with pytest.raises(SpaceError, match=r"final: no space left on the disk \(\d+ MiB free\); make room .* --resume"):
        write_folder(tmp_path / "final", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["0.txt"]


def test_a_file_is_synced_before_it_is_renamed(tmp_path: Path, events: list[str]) -> None:
    write_text(tmp_path / "x.json", "one")
    assert events == ["sync x.json.partial", "rename x.json", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("write", [write_text, lambda path, text: write_bytes(path, text.encode())])
def test_a_file_stays_as_it_was_if_the_disk_is_full(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write(path, "one")
    monkeypatch.setattr(os, "fsync", raise_full)
    with pytest.raises(SpaceError):
        write(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_text_with_undecodable_file_names_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / "x.txt", os.fsdecode(b"\xff.jpg"))
    assert (tmp_path / "x.txt").read_text() == "\\udcff.jpg"


def test_a_full_disk_is_named_before_the_folder_exists(tmp_path: Path) -> None:
    error = space_error(FULL, tmp_path / "a" / "b" / "step-1", "delete something")
    assert isinstance(error, SpaceError) and str(error).endswith("delete something")
    other = OSError(errno.EACCES, "Permission denied")
    assert space_error(other, tmp_path) is other


def test_free_bytes_of_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5 MiB"),
        (2**30, "1.00 GiB"),
    ],
)
def test_sizes_as_text(count: int, text: str) -> None:
    assert size_text(count) == text

"""Every flipped bit, truncated file, swapped file and full disk is detected, and named."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from shoulders.config.recipe import Recipe
from shoulders.errors import DataError, SpaceError
from shoulders.feature_cache import verify_cache
from shoulders.feature_cache.metadata import MANIFEST, read_json, write_json
from shoulders.feature_cache.shard_files import write_shard
from shoulders.feature_cache.teacher_store import TeacherStore, open_store
from shoulders.feature_cache.verify import find_faults
from shoulders.teachers.pure import IMAGES
from tests.feature_cache.toy import build, contents, save_toy_world, teachers, toy_recipe, toy_spec

FLIPS = 1000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished cache of several shards, with principal components."""
    root = save_toy_world(tmp_path_factory.mktemp("toy"))
    recipe = toy_recipe(root, root / "cache", cache__pca=3)
    build(recipe)
    return recipe


def path_of(recipe: Recipe) -> Path:
    assert recipe.cache.path is not None
    return recipe.cache.path


class Reader:
    """Opens a cache and reads all records, as runs do."""

    def __init__(self, recipe: Recipe) -> None:
        self.spec = toy_spec(recipe)
        self.numbers = np.arange(len(self.spec.index))

    def open(self) -> list[TeacherStore]:
        spec = self.spec
        return [
            open_store(spec.folders[name], fingerprint, "build it", spec.indices[name])
            for name, fingerprint in spec.fingerprints.items()
        ]

    def read(self) -> None:
        for store in self.open():
            store.records(self.numbers)

    def verify(self) -> None:
        for store in self.open():
            if faults := find_faults(store, lambda records: None):
                raise DataError(faults[0])


def error_of(reader: Reader, action: Literal["open", "read", "verify"], name: str) -> str:
    """The message with which an action fails; ``name`` is part of it."""
    with pytest.raises(DataError) as error:
        {"open": reader.open, "read": reader.read, "verify": reader.verify}[action]()
    assert name in str(error.value), str(error.value)
    return str(error.value)


def test_every_flipped_bit_is_detected_when_read_and_by_verify(built: Recipe) -> None:
    reader, dice = Reader(built), random.Random(0)  # noqa: S311
    files = [path for path in sorted(path_of(built).rglob("*")) if path.is_file()]
    assert {path.name for path in files} >= {"layout.json", "manifest.json", "channels.safetensors", "shard-00002.bin"}
    for trial in range(FLIPS):
        file = files[trial % len(files)]
        with file.open("r+b") as disk:
            offset, bit = dice.randrange(file.stat().st_size), 1 << dice.randrange(8)
            original = os.pread(disk.fileno(), 1, offset)
            os.pwrite(disk.fileno(), bytes([original[0] ^ bit]), offset)
            # the message has to name a damaged shard; of the other files any message will do
            error_of(reader, "read", file.name if file.suffix == ".bin" else "")
            error_of(reader, "verify", file.name if file.suffix == ".bin" else "")
            os.pwrite(disk.fileno(), original, offset)
    reader.read()
    reader.verify()
    assert verify_cache(built, extra_teachers=teachers())["bytes"] > 0


def test_a_damaged_record_is_named(built: Recipe) -> None:
    reader = Reader(built)
    store = reader.open()[0]
    file, start = store.shards.path(1), 5 * store.shards.record_bytes
    original = file.read_bytes()
    file.write_bytes(original[:start] + bytes([original[start] ^ 4]) + original[start + 1 :])
    try:
        assert f"{file}: record 5 is damaged; remove this file" in error_of(reader, "verify", "small")
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize("length", ["0", "1", "half", "all but one", "one more"])
def test_every_truncated_file_is_detected_before_records_are_read(length: str, built: Recipe) -> None:
    reader = Reader(built)
    for file in sorted(path for path in path_of(built).rglob("*") if path.is_file()):
        original = file.read_bytes()
        full = len(original)
        lengths = {"0": 0, "1": 1, "half": full // 2, "all but one": full - 1, "one more": full + 1}
        file.write_bytes((original + b"x")[: lengths[length]])
        error_of(reader, "open", file.name)
        file.write_bytes(original)
    reader.verify()


def test_missing_and_swapped_files_are_detected(built: Recipe) -> None:
    reader, cache = Reader(built), path_of(built)
    for file in sorted(path for path in cache.rglob("*") if path.is_file()):
        aside = file.with_name("aside")
        file.rename(aside)
        error_of(reader, "open", str(file.parent))
        aside.rename(file)
    swaps = [
        ("small/shard-00000.bin", "small/shard-00001.bin"),
        ("small/layout.json", "large/layout.json"),
        ("small/manifest.json", "large/manifest.json"),
        ("small/channels.safetensors", "large/channels.safetensors"),
    ]
    for one, other in swaps:
        swap(cache / one, cache / other)
        error_of(reader, "verify", "")
        if "manifest" not in one:
            error_of(reader, "read", "")
        swap(cache / one, cache / other)
    reader.verify()


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_swapped_shards_of_equal_teachers_are_detected(tmp_path: Path) -> None:
    twins = {"one": teachers()["small"], "two": teachers()["small"]}
    recipe = toy_recipe(save_toy_world(tmp_path), tmp_path / "cache")
    build(recipe, twins)
    swap(tmp_path / "cache/one/shard-00000.bin", tmp_path / "cache/two/shard-00000.bin")
    spec = toy_spec(recipe, twins)
    for name in twins:
        with pytest.raises(DataError, match="record 0 is damaged"):
            spec.store(name).records(np.arange(2))


def test_a_removed_shard_is_built_again_with_the_same_bytes(built: Recipe) -> None:
    cache = path_of(built)
    before = contents(cache)
    (cache / "small" / "shard-00001.bin").unlink()
    build(built)
    assert contents(cache) == before
    # the manifest is written again as well: on another machine the last digits of features may differ
    manifest = cache / "small" / MANIFEST
    write_json(manifest, read_json(manifest) | {"shards": ["of another machine"]})
    (cache / "small" / "shard-00001.bin").unlink()
    build(built)
    assert contents(cache) == before


@pytest.mark.parametrize("after", [0, 1, 2, 4, 6, 8, 10, 12, 14, 16])
def test_a_build_continues_after_a_full_disk(
    after: int, built: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = built.model_copy(update={"cache": built.cache.model_copy(update={"path": tmp_path / "cache"})})
    writes, write, write_bytes = [0], os.write, Path.write_bytes

    def count() -> None:
        writes[0] += 1
        if writes[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    def counted_write(descriptor: int, data: memoryview) -> int:
        count()
        return write(descriptor, data)

    def counted_write_bytes(path: Path, data: bytes) -> int:
        count()
        return write_bytes(path, data)

    monkeypatch.setattr(os, "write", counted_write)
    monkeypatch.setattr(Path, "write_bytes", counted_write_bytes)
    with pytest.raises(SpaceError, match="no space left on the disk .* MiB free") as stop:
        build(recipe)
    assert stop.value.exit_code == 5
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.partial"))
    build(recipe)
    assert contents(tmp_path / "cache") == contents(path_of(built))


def test_a_disk_that_is_too_small_is_refused_before_any_image_is_read(
    built: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = built.model_copy(update={"cache": built.cache.model_copy(update={"path": tmp_path / "cache"})})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    calls: list[Any] = []
    hooked = teachers()
    for teacher in hooked.values():
        teacher.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(SpaceError, match=r"cache: .* KiB needed, 1000 bytes free; make room") as stop:
        build(recipe, hooked)
    assert (stop.value.exit_code, list(tmp_path.iterdir())) == (5, [])
    assert len(calls) == len(hooked) * (3 + IMAGES)  # those of `check_pure` alone


def test_without_checksums_of_records_only_the_manifest_detects_a_flipped_bit(built: Recipe) -> None:
    reader = Reader(built)
    store = reader.open()[0]
    file = store.shards.path(1)
    original = file.read_bytes()
    file.write_bytes(original[:3] + bytes([original[3] ^ 1]) + original[4:])
    unverified = TeacherStore(
        store.index, store.codec, store.shards, store.salt, store.size, store.command, verify=False
    )
    unverified.records(reader.numbers)
    assert find_faults(unverified, lambda records: None) == [f"{file}: not the bytes that were written"]
    error_of(reader, "read", "record 0 is damaged")
    file.write_bytes(original)


def test_a_shard_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    names: dict[int, str] = {}
    original_open, original_fsync, original_rename = os.open, os.fsync, os.rename

    def record_open(path: Any, *args: Any) -> int:
        descriptor = original_open(path, *args)
        names[descriptor] = Path(path).name
        return descriptor

    def record_fsync(descriptor: int) -> None:
        events.append(f"sync {names[descriptor]}")
        original_fsync(descriptor)

    def record_rename(old: Path, new: Path) -> None:
        events.append(f"rename {new.name}")
        original_rename(old, new)

    monkeypatch.setattr(os, "open", record_open)
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    (tmp_path / "folder").mkdir()
    write_shard(tmp_path / "folder" / "shard", [np.zeros((2, 8), np.uint8)], 16)
    assert events == ["sync shard.partial", "rename shard", "sync folder"]

"""Every flipped bit, cut, swap and full disk is noticed, and named."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoulders.config.recipe import Recipe
from shoulders.errors import DataError, SpaceError
from shoulders.feature_cache import store, verify_cache
from shoulders.feature_cache.build import Builder
from shoulders.feature_cache.read import TeacherStore
from shoulders.feature_cache.verify import verify
from tests.feature_cache.toy import build, contents, few_records, save_toy_world, teachers, toy_recipe

FLIPS = 1000


@pytest.fixture(scope="module")
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        few_records(patch)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_shards: None) -> Recipe:
    """A finished cache of several shards, with principal components."""
    root = save_toy_world(tmp_path_factory.mktemp("toy"))
    recipe = toy_recipe(root, root / "cache", cache__pca=3)
    build(recipe)
    return recipe


def path_of(recipe: Recipe) -> Path:
    assert recipe.cache.path is not None
    return recipe.cache.path


class Reader:
    """Opens a cache and reads all of it, as runs do."""

    def __init__(self, recipe: Recipe) -> None:
        self.builder = Builder(recipe, teachers(), print)
        self.everything = np.arange(len(self.builder.index))

    def open(self) -> list[TeacherStore]:
        builder, prints = self.builder, self.builder.prints.items()
        return [
            TeacherStore(builder.folders[name], fields, "make it", builder.indices[name]) for name, fields in prints
        ]

    def read(self) -> None:
        for shelf in self.open():
            shelf.records(self.everything)

    def verify(self) -> None:
        for shelf in self.open():
            if faults := verify(shelf, lambda records: None):
                raise DataError(faults[0])


def refused(reader: Reader, by: str, name: str) -> str:
    with pytest.raises(DataError) as refusal:
        getattr(reader, by)()
    assert name in str(refusal.value), str(refusal.value)
    return str(refusal.value)


def test_every_flipped_bit_is_found_on_reading_and_by_verify(made: Recipe) -> None:
    reader, dice = Reader(made), random.Random(0)  # noqa: S311
    files = [path for path in sorted(path_of(made).rglob("*")) if path.is_file()]
    assert {path.name for path in files} >= {"plan.json", "manifest.json", "channels.safetensors", "shard-00002.bin"}
    for trial in range(FLIPS):
        file = files[trial % len(files)]
        with file.open("r+b") as disk:
            at, bit = dice.randrange(file.stat().st_size), 1 << dice.randrange(8)
            sound = os.pread(disk.fileno(), 1, at)
            os.pwrite(disk.fileno(), bytes([sound[0] ^ bit]), at)
            # what the manifest says of shards is asked by verify alone: the shards themselves are sound
            refused(reader, "read", file.name if file.suffix == ".bin" else "")
            refused(reader, "verify", file.name if file.suffix == ".bin" else "")
            os.pwrite(disk.fileno(), sound, at)
    reader.read()
    reader.verify()
    assert verify_cache(made, extra_teachers=teachers())["bytes"] > 0


def test_a_damaged_record_is_named(made: Recipe) -> None:
    reader = Reader(made)
    shelf = reader.open()[0]
    file, record = shelf.shards.path(1), shelf.shards.record
    sound = file.read_bytes()
    file.write_bytes(sound[: 5 * record] + bytes([sound[5 * record] ^ 4]) + sound[5 * record + 1 :])
    try:
        assert f"{file}: record 5 is damaged; remove this file" in refused(reader, "verify", "small")
    finally:
        file.write_bytes(sound)


@pytest.mark.parametrize("length", ["0", "1", "half", "all but one", "one more"])
def test_every_cut_is_found_before_anything_is_read(length: str, made: Recipe) -> None:
    reader = Reader(made)
    for file in sorted(path for path in path_of(made).rglob("*") if path.is_file()):
        sound = file.read_bytes()
        lengths = {"0": 0, "1": 1, "half": len(sound) // 2, "all but one": len(sound) - 1, "one more": len(sound) + 1}
        file.write_bytes((sound + b"x")[: lengths[length]])
        refused(reader, "open", file.name)
        file.write_bytes(sound)
    reader.verify()


def test_missing_and_swapped_files_are_found(made: Recipe) -> None:
    reader, cache = Reader(made), path_of(made)
    for file in sorted(path for path in cache.rglob("*") if path.is_file()):
        aside = file.with_name("aside")
        file.rename(aside)
        refused(reader, "open", str(file.parent))
        aside.rename(file)
    swaps = [
        ("small/shard-00000.bin", "small/shard-00001.bin"),
        ("small/plan.json", "large/plan.json"),
        ("small/manifest.json", "large/manifest.json"),
        ("small/channels.safetensors", "large/channels.safetensors"),
    ]
    for one, other in swaps:
        swap(cache / one, cache / other)
        refused(reader, "verify", "")
        if "manifest" not in one:
            refused(reader, "read", "")
        swap(cache / one, cache / other)
    reader.verify()


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_shards_of_teachers_that_look_alike_are_not_mistaken(tmp_path: Path, small_shards: None) -> None:
    twins = {"one": teachers()["small"], "two": teachers()["small"]}
    recipe = toy_recipe(save_toy_world(tmp_path), tmp_path / "cache")
    build(recipe, twins)
    swap(tmp_path / "cache/one/shard-00000.bin", tmp_path / "cache/two/shard-00000.bin")
    builder = Builder(recipe, twins, print)
    for name in twins:
        with pytest.raises(DataError, match="record 0 is damaged"):
            builder.shelf(name).records(np.arange(2))


def test_a_removed_shard_is_made_anew_to_the_same_bytes(made: Recipe) -> None:
    cache = path_of(made)
    before = contents(cache)
    (cache / "small" / "shard-00001.bin").unlink()
    build(made)
    assert contents(cache) == before
    # the manifest is made anew as well: elsewhere the last digits of features may be others
    manifest = cache / "small" / store.MANIFEST
    store.write_json(manifest, store.read_json(manifest) | {"shards": ["of another machine"]})
    (cache / "small" / "shard-00001.bin").unlink()
    build(made)
    assert contents(cache) == before


@pytest.mark.parametrize("after", [0, 1, 2, 4, 6, 8, 10, 12, 14, 16])
def test_a_full_disk_is_named_and_what_is_there_is_gone_on_with(
    after: int, made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made.model_copy(update={"cache": made.cache.model_copy(update={"path": tmp_path / "cache"})})
    writes, write, write_bytes = [0], os.write, Path.write_bytes

    def full() -> None:
        writes[0] += 1
        if writes[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    def writing(descriptor: int, data: memoryview) -> int:
        full()
        return write(descriptor, data)

    def writing_bytes(path: Path, data: bytes) -> int:
        full()
        return write_bytes(path, data)

    monkeypatch.setattr(store.os, "write", writing)
    monkeypatch.setattr(Path, "write_bytes", writing_bytes)
    with pytest.raises(SpaceError, match="no space left on the disk .* MiB free") as stop:
        build(recipe)
    assert stop.value.exit_code == 5
    monkeypatch.undo()
    few_records(monkeypatch)
    assert not list(tmp_path.rglob("*.partial"))
    build(recipe)
    assert contents(tmp_path / "cache") == contents(path_of(made))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_asked(
    made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made.model_copy(update={"cache": made.cache.model_copy(update={"path": tmp_path / "cache"})})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    asked: list[Any] = []
    own = teachers()
    for teacher in own.values():
        teacher.register_forward_hook(lambda *args: asked.append(args))
    with pytest.raises(SpaceError, match=r"cache: .* KiB needed, 1000 bytes free; make room") as stop:
        build(recipe, own)
    assert (stop.value.exit_code, asked, list(tmp_path.iterdir())) == (5, [], [])


def test_without_the_checksum_a_flipped_bit_would_pass(made: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(made)
    file = reader.open()[0].shards.path(1)
    sound = file.read_bytes()
    file.write_bytes(sound[:3] + bytes([sound[3] ^ 1]) + sound[4:])
    monkeypatch.setattr(store, "is_sound", lambda *args: True)
    reader.read()
    refused(reader, "verify", "not the bytes that were written")
    file.write_bytes(sound)


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    names: dict[int, str] = {}
    opening, syncing, renaming = os.open, os.fsync, os.rename

    def opened(path: Any, *args: Any) -> int:
        descriptor = opening(path, *args)
        names[descriptor] = Path(path).name
        return descriptor

    def synced(descriptor: int) -> None:
        events.append(f"sync {names[descriptor]}")
        syncing(descriptor)

    def renamed(old: Path, new: Path) -> None:
        events.append(f"rename {new.name}")
        renaming(old, new)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    (tmp_path / "folder").mkdir()
    store.write_shard(tmp_path / "folder" / "shard", [np.zeros((2, 8), np.uint8)], 16)
    assert events == ["sync shard.partial", "rename shard", "sync folder"]

"""A cache has the same bytes after kills at any point and with any number of builders."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoulders.config.recipe import Recipe
from shoulders.errors import DataError, Interrupted, NumericError, RecipeError, SpaceError
from shoulders.feature_cache import build as build_module
from shoulders.feature_cache import commands, estimate_cache, info_cache, verify_cache
from shoulders.feature_cache.spec import build_command
from shoulders.features import Features
from shoulders.teachers import Teacher
from shoulders.teachers.pure import IMAGES
from tests.crashes import before, fork, kill_at, watch_os_calls
from tests.feature_cache.toy import (
    SMALL_SHARDS,
    Colours,
    build,
    contents,
    save_toy_world,
    teachers,
    toy_builder,
    toy_recipe,
    toy_spec,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_world(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, bytes]:
    """The files of an uninterrupted build."""
    build(toy_recipe(root, root / "uninterrupted", cache__pca=3))
    return contents(root / "uninterrupted")


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images for two shards."""
    return save_toy_world(tmp_path_factory.mktemp("tiny"), 12)


@pytest.mark.parametrize("names", [["small"], pytest.param(["small", "large"], marks=pytest.mark.slow)])
def test_a_build_killed_before_any_call_that_changes_the_disk_ends_with_the_same_bytes(
    names: list[str], tiny_root: Path, tmp_path: Path
) -> None:
    selected = {name: teachers()[name] for name in names}
    build(toy_recipe(tiny_root, tmp_path / "expected", cache__pca=3), selected)
    expected = contents(tmp_path / "expected")

    def killed(at: int, recipe: Recipe) -> int:
        def work() -> None:
            watch_os_calls(kill_at(at))
            build(recipe, selected)

        return fork(work)

    points = 0
    for at in range(1, 1000):
        cache = tmp_path / str(at)
        recipe = toy_recipe(tiny_root, cache, cache__pca=3)
        status = killed(at, recipe)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        points += 1
        left = {name: data for name, data in contents(cache).items() if name in expected}
        assert all(expected[name] == data for name, data in left.items()), at  # only complete files have their names
        inodes = {name: (cache / name).stat().st_ino for name in left if name.endswith(".bin")}
        build(recipe, selected)
        assert contents(cache) == expected, at
        assert inodes == {name: (cache / name).stat().st_ino for name in inodes}  # complete shards were not built again
    assert points > 30 * len(names)


def test_the_shards_of_a_killed_builder_are_built_by_another_one(
    root: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    recipe = toy_recipe(root, tmp_path / "cache", cache__pca=3)
    child = os.fork()
    if child == 0:
        locks = toy_builder(recipe).locks
        with locks.claim("shard-00000.bin"), locks.claim("layout-small"):
            (tmp_path / "locked").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    killer = threading.Timer(0.5, lambda: os.kill(child, signal.SIGKILL))
    killer.start()
    build(recipe)
    killed = time.monotonic()
    os.waitpid(child, 0)
    killer.join()
    assert time.monotonic() - killed < 10
    assert contents(tmp_path / "cache") == expected


def log_renames(path: Path) -> None:
    """Append process and shard to a file whenever this process completes a shard; each one takes a little longer."""
    original = os.rename

    def rename(old: Path, new: Path) -> None:
        time.sleep(0.05)  # so that each builder gets some shards
        original(old, new)
        if new.suffix == ".bin":
            with path.open("a") as log:
                log.write(f"{os.getpid()} {new.relative_to(path.parent)}\n")

    setattr(os, "rename", rename)  # noqa: B010


def test_several_builders_share_the_work(root: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    recipe = toy_recipe(root, tmp_path / "cache", cache__pca=3)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                log_renames(tmp_path / "log")
                build(recipe, settings=replace(SMALL_SHARDS, max_block_shards=1))
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert contents(tmp_path / "cache") == expected
    builders, shards = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert len(set(builders)) >= 2
    assert len(shards) == len(set(shards)) == sum(name.endswith(".bin") for name in expected)


class OneOffset(Colours):
    """Channels of the same variance around zero, except one that is around ``offset``."""

    def __init__(self, offset: float) -> None:
        super().__init__(4)
        self.offset = torch.tensor([0.0, offset, 0.0, 0.0])

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        output = super().forward(pixels)
        return {tap: features.map(lambda x: torch.sin(1e4 * x) + self.offset) for tap, features in output.items()}


def test_channels_are_rescaled_if_int8_would_lose_too_much(root: Path, tmp_path: Path) -> None:
    both = {name: Teacher(OneOffset(offset), size=(16, 16)) for name, offset in (("centred", 0.0), ("offset", 500.0))}
    info = build(toy_recipe(root, tmp_path / "cache"), both)
    assert {path.parent.name for path in (tmp_path / "cache").rglob("channels.safetensors")} == {"offset"}
    assert all(tap["reconstruction_fvu"] < 1e-3 for row in info["teachers"] for tap in row["taps"])
    info = build(toy_recipe(root, tmp_path / "floats", cache__dtype="float32"), both)
    assert not list((tmp_path / "floats").rglob("channels.safetensors"))
    assert max(tap["reconstruction_fvu"] for row in info["teachers"] for tap in row["taps"]) == 0


CHECK_CALLS = 3 + IMAGES  # of `check_pure`


class Stopping(Colours):
    """Sends a signal to its own process in its fifth call after those that check that it depends on pixels alone."""

    def __init__(self, number: int) -> None:
        super().__init__(4)
        self.number, self.calls = number, 0

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        self.calls += 1
        if self.calls == CHECK_CALLS + 5:
            os.kill(os.getpid(), self.number)
        return super().forward(pixels)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_build_stopped_by_a_signal_keeps_complete_shards(number: signal.Signals, root: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(root, tmp_path / "cache", cache__dtype="float16")
    stopping = {"one": Teacher(Stopping(number), size=(16, 16))}
    with pytest.raises(Interrupted, match="finished parts are kept: continue with the same command") as stop:
        build(recipe, stopping)
    assert stop.value.exit_code == 128 + number
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "cache/one/manifest.json").exists()
    assert build(recipe, stopping)["teachers"][0]["finished"]


@pytest.mark.parametrize(
    ("owner", "name"), [(build_module, "write_layout"), (build_module, "write_manifest"), (commands, "info_cache")]
)
def test_a_signal_before_the_first_shard_and_after_the_last_one_ends_a_build_with_its_code(
    owner: Any, name: str, root: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    recipe = toy_recipe(root, tmp_path / "cache", cache__pca=3)

    def work() -> None:
        before(owner, name, lambda name: os.kill(os.getpid(), signal.SIGTERM))
        try:
            build(recipe)
        except Interrupted as stop:
            sys.exit(stop.exit_code)

    assert fork(work) == 143
    assert not list(tmp_path.rglob("*.partial"))
    build(recipe)
    assert contents(tmp_path / "cache") == expected


def test_a_waiting_builder_names_the_process_that_holds_the_lock(root: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(root, tmp_path / "cache")
    lines: list[str] = []
    first, second = toy_builder(recipe), toy_builder(recipe, lines.append)
    with first.locks.claim("shard-00000.bin") as is_ours:
        assert is_ours
        thread = threading.Thread(target=second.compute_shards)
        thread.start()
        end = time.monotonic() + 60
        while not any(line.startswith("waiting") for line in lines) and time.monotonic() < end:
            time.sleep(0.01)
    thread.join()
    (line,) = [line for line in lines if line.startswith("waiting")]
    assert line.startswith(f"waiting for process {os.getpid()} on ")


def test_the_complete_shards_of_an_unfinished_cache_can_be_read(root: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(root, tmp_path / "cache")
    build(recipe)
    (tmp_path / "cache/small/manifest.json").unlink()
    (tmp_path / "cache/small/shard-00001.bin").unlink()
    store = toy_spec(recipe).store("small")
    assert len(store.records(np.arange(8))) == 8
    with pytest.raises(DataError, match="shard-00001.bin: cannot be read"):
        store.records(np.arange(9))
    info = {row["teacher"]: row for row in info_cache(recipe)["teachers"]}
    assert (info["small"]["finished"], info["small"]["shards_done"], info["large"]["finished"]) == (False, 2, True)
    with pytest.raises(DataError, match="small: 2 of 3 shards are complete; finish it with: shoulders cache RECIPE"):
        verify_cache(recipe, extra_teachers=teachers())


def test_an_image_that_cannot_be_decoded_is_left_out(root: Path, tmp_path: Path) -> None:
    save_toy_world(tmp_path)
    bad = sorted((tmp_path / "images").iterdir())[3]
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    recipe = toy_recipe(tmp_path, tmp_path / "cache", images__max_unreadable=0.1)
    build(recipe)
    spec = toy_spec(recipe)
    names = [spec.images.collection.name(index) for index, _ in spec.index.views_of(np.arange(24)).tolist()]
    number = names.index(bad.name)
    with pytest.raises(DataError, match=f"'{bad.name}' could not be decoded when .*cache/small was built"):
        spec.store("small").records(np.array([number]))
    assert [row["undecodable"] for row in verify_cache(recipe, extra_teachers=teachers())["teachers"]] == [1, 1]
    bad.write_bytes(good)


def test_more_unreadable_images_than_max_unreadable_stop_a_build(root: Path, tmp_path: Path) -> None:
    save_toy_world(tmp_path)
    for bad in sorted((tmp_path / "images").iterdir())[:3]:
        bad.write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"images cannot be used .* listed in .*cache/skipped.jsonl: .*images.max_unreadable="
    ):
        build(toy_recipe(tmp_path, tmp_path / "cache"))
    build(toy_recipe(tmp_path, tmp_path / "cache", images__max_unreadable=0.2))
    assert len((tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()) == 3


def test_the_command_in_messages_builds_the_same_cache(root: Path, tmp_path: Path) -> None:
    command = build_command(toy_recipe(root, tmp_path / "a cache", images__views=3, cache__pool=2))
    changes = shlex.split(command)[3:]
    assert changes == [f"cache.path={tmp_path}/a cache", "cache.dtype=int8", "cache.pool=2", "images.views=3"]


class Broken(Colours):
    def __init__(self, value: float) -> None:
        super().__init__(4)
        self.value = value

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        output = super().forward(pixels)
        if len(pixels) > IMAGES:  # not in the checks of a new teacher
            output["mean"].components()["summary"][1] = self.value
        return output


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "bfloat16", r"teachers.broken: its features are not finite for \d of 24 images so far"),
        (float("inf"), "int8", r"not finite .* more than transfer.max_not_finite=0.05 allows"),
        (1e5, "float16", "contains 100000, too much for float16; set cache.dtype=bfloat16"),
    ],
)
def test_features_that_cannot_be_stored_stop_a_build(
    value: float, dtype: str, message: str, root: Path, tmp_path: Path
) -> None:
    recipe = toy_recipe(root, tmp_path / "cache", cache__dtype=dtype)
    with pytest.raises(NumericError, match=message):
        build(recipe, {"broken": Teacher(Broken(value), size=(16, 16))})
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.partial"))


def test_the_estimate_is_right(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy_recipe(root, tmp_path / "cache")
    estimate = estimate_cache(recipe, extra_teachers=teachers(), settings=SMALL_SHARDS)
    assert not (tmp_path / "cache").exists()
    assert 0 < estimate["minutes"] < 1 and estimate["memory_bytes"] > 2**20
    total = sum(row["views"] * row["bytes_per_view"] for row in estimate["teachers"])
    assert build(recipe)["bytes"] == estimate["disk_bytes"] == total
    assert estimate_cache(recipe, extra_teachers=teachers(), settings=SMALL_SHARDS)["disk_bytes"] == 0
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    estimate_cache(recipe, extra_teachers=teachers(), settings=SMALL_SHARDS)
    with pytest.raises(SpaceError):
        estimate_cache(toy_recipe(root, tmp_path / "other"), extra_teachers=teachers())


def test_recipes_that_cannot_be_cached_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="images.views: fresh views never repeat, so they cannot be cached; give a number"
    ):
        build(toy_recipe(root, tmp_path / "cache", images__views="fresh"))
    with pytest.raises(RecipeError, match="cache.path: none; give cache.path=FOLDER"):
        build(toy_recipe(root, tmp_path / "cache", cache__path=None))
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="cache.path: cannot write to"):
        build(toy_recipe(root, tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="there is no cache; build it with"):
        info_cache(toy_recipe(root, tmp_path / "cache"))


def test_shards_of_another_size_are_refused(root: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(root, tmp_path / "cache")
    build(recipe)
    with pytest.raises(DataError, match="small: has shards of another size; remove it"):
        build(recipe, settings=replace(SMALL_SHARDS, shard_records=12))
    assert verify_cache(recipe, extra_teachers=teachers())["bytes"] > 0

"""Killed anywhere, shared by several builders, moved anywhere: a cache ends with the same bytes."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoulders.config.recipe import Recipe
from shoulders.errors import DataError, Interrupted, NumericError, RecipeError, SpaceError
from shoulders.feature_cache import estimate_cache, info_cache, verify_cache
from shoulders.feature_cache.build import Builder
from shoulders.feature_cache.read import command
from shoulders.features import Features
from shoulders.teachers import Teacher
from tests.feature_cache.toy import Colours, build, contents, few_records, save_toy_world, teachers, toy_recipe


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        few_records(patch)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_world(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def quiet(root: Path) -> dict[str, bytes]:
    """What an uninterrupted build leaves."""
    build(toy_recipe(root, root / "quiet", cache__pca=3))
    return contents(root / "quiet")


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images for two shards."""
    return save_toy_world(tmp_path_factory.mktemp("tiny"), 12)


CALLS = ("open", "write", "fsync", "rename", "replace", "unlink")  # of `os`: all that changes a disk here


def fork(work: Callable[[], None]) -> int:
    """Run in a copy of this process; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def count_calls(on_call: Callable[[int], None]) -> list[int]:
    """Let every call that changes a disk be counted first; returns the growing count."""
    seen = [0]

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            on_call(seen[0])
            return call(*args, **kwargs)

        return wrapped

    for name in CALLS:
        setattr(os, name, counted(name))
    return seen


@pytest.mark.parametrize("names", [["small"], pytest.param(["small", "large"], marks=pytest.mark.slow)])
def test_killed_before_any_call_that_changes_the_disk_it_ends_with_the_same_bytes(
    names: list[str], tiny_root: Path, tmp_path: Path
) -> None:
    own = {name: teachers()[name] for name in names}
    build(toy_recipe(tiny_root, tmp_path / "quiet", cache__pca=3), own)
    quiet = contents(tmp_path / "quiet")

    def killed(at: int, recipe: Recipe) -> int:
        def die(number: int) -> None:
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            count_calls(die)
            build(recipe, own)

        return fork(work)

    points = 0
    for at in range(1, 1000):
        cache = tmp_path / str(at)
        recipe = toy_recipe(tiny_root, cache, cache__pca=3)
        status = killed(at, recipe)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        points += 1
        left = {name: data for name, data in contents(cache).items() if name in quiet}
        assert all(quiet[name] == data for name, data in left.items()), at  # nothing has its name that is not whole
        kept = {name: (cache / name).stat().st_ino for name in left if name.endswith(".bin")}
        build(recipe, own)
        assert contents(cache) == quiet, at
        assert kept == {name: (cache / name).stat().st_ino for name in kept}  # no finished shard was made again
    assert points > 30 * len(names)


def test_a_killed_builder_is_taken_over_from(root: Path, quiet: dict[str, bytes], tmp_path: Path) -> None:
    recipe = toy_recipe(root, tmp_path / "cache", cache__pca=3)
    child = os.fork()
    if child == 0:
        claims = Builder(recipe, teachers(), print).claims
        with claims.claim("shard-00000.bin"), claims.claim("plan-small"):
            (tmp_path / "claimed").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    killer = threading.Timer(0.5, lambda: os.kill(child, signal.SIGKILL))
    killer.start()
    build(recipe)
    killed = time.monotonic()
    os.waitpid(child, 0)
    killer.join()
    assert time.monotonic() - killed < 10
    assert contents(tmp_path / "cache") == quiet


def test_several_builders_share_the_work(
    root: Path, quiet: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy_recipe(root, tmp_path / "cache", cache__pca=3)
    monkeypatch.setattr("shoulders.feature_cache.build.BLOCK_SHARDS", 1)
    write = "shoulders.feature_cache.store.write_shard"
    from shoulders.feature_cache import store

    original = store.write_shard

    def noted(path: Path, parts: Any, needed: int) -> None:
        time.sleep(0.05)  # so that each of them gets some
        original(path, parts, needed)
        with (tmp_path / "log").open("a") as log:
            log.write(f"{os.getpid()} {path.relative_to(tmp_path)}\n")

    monkeypatch.setattr(write, noted)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                build(recipe)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert contents(tmp_path / "cache") == quiet
    builders, shards = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert len(set(builders)) >= 2
    assert len(shards) == len(set(shards)) == sum(name.endswith(".bin") for name in quiet)


class Even(Colours):
    """ChannelTransform around zero, all as loud as each other, or one of them far away."""

    def __init__(self, far: float) -> None:
        super().__init__(4)
        self.far = torch.tensor([0.0, far, 0.0, 0.0])

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        told = super().forward(pixels)
        return {tap: features.map(lambda x: torch.sin(1e4 * x) + self.far) for tap, features in told.items()}


def test_channels_are_made_equally_loud_where_int8_would_lose_too_much(root: Path, tmp_path: Path) -> None:
    own = {"quiet": Teacher(Even(0.0), size=(16, 16)), "loud": Teacher(Even(500.0), size=(16, 16))}
    told = build(toy_recipe(root, tmp_path / "cache"), own)
    assert {path.parent.name for path in (tmp_path / "cache").rglob("channels.safetensors")} == {"loud"}
    assert all(tap["reconstruction_fvu"] < 1e-3 for row in told["teachers"] for tap in row["taps"])
    told = build(toy_recipe(root, tmp_path / "floats", cache__dtype="float32"), own)
    assert not list((tmp_path / "floats").rglob("channels.safetensors"))
    assert max(tap["reconstruction_fvu"] for row in told["teachers"] for tap in row["taps"]) == 0


class Stopping(Colours):
    """Sends a signal to its own process when it is asked for the fifth time."""

    def __init__(self, number: int) -> None:
        super().__init__(4)
        self.number, self.asked = number, 0

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        self.asked += 1
        if self.asked == 5:
            os.kill(os.getpid(), self.number)
        return super().forward(pixels)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_keeps_what_is_made(number: signal.Signals, root: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(root, tmp_path / "cache", cache__dtype="float16")
    own = {"one": Teacher(Stopping(number), size=(16, 16))}
    with pytest.raises(Interrupted, match="finished parts are kept: continue with the same command") as stop:
        build(recipe, own)
    assert stop.value.exit_code == 128 + number
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "cache/one/manifest.json").exists()
    assert build(recipe, own)["teachers"][0]["finished"]


def test_a_waiting_builder_says_for_whom(root: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(root, tmp_path / "cache")
    said: list[str] = []
    first, second = Builder(recipe, teachers(), print), Builder(recipe, teachers(), said.append)
    with first.claims.claim("shard-00000.bin") as ours:
        assert ours
        thread = threading.Thread(target=second.work)
        thread.start()
        end = time.monotonic() + 60
        while not any(line.startswith("waiting") for line in said) and time.monotonic() < end:
            time.sleep(0.01)
    thread.join()
    (line,) = [line for line in said if line.startswith("waiting")]
    assert line.startswith(f"waiting for process {os.getpid()} on ")


def test_an_unfinished_cache_is_read_as_far_as_it_goes(root: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(root, tmp_path / "cache")
    build(recipe)
    (tmp_path / "cache/small/manifest.json").unlink()
    (tmp_path / "cache/small/shard-00001.bin").unlink()
    builder = Builder(recipe, teachers(), print)
    shelf = builder.shelf("small")
    assert len(shelf.records(np.arange(8))) == 8
    with pytest.raises(DataError, match="shard-00001.bin: cannot be read"):
        shelf.records(np.arange(9))
    told = {row["teacher"]: row for row in info_cache(recipe)["teachers"]}
    assert (told["small"]["finished"], told["small"]["shards_done"], told["large"]["finished"]) == (False, 2, True)
    with pytest.raises(DataError, match="small: 2 of 3 shards are there; finish it with: shoulders cache RECIPE"):
        verify_cache(recipe, extra_teachers=teachers())


def test_an_image_that_cannot_be_decoded_is_left_out(root: Path, tmp_path: Path) -> None:
    save_toy_world(tmp_path)
    bad = sorted((tmp_path / "images").iterdir())[3]
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    recipe = toy_recipe(tmp_path, tmp_path / "cache", images__max_unreadable=0.1)
    build(recipe)
    builder = Builder(recipe, teachers(), print)
    names = [builder.images.collection.name(index) for index, _ in builder.index.wanted(np.arange(24)).tolist()]
    number = names.index(bad.name)
    with pytest.raises(DataError, match=f"'{bad.name}' could not be decoded when .*cache/small was made"):
        builder.shelf("small").records(np.array([number]))
    assert [row["undecodable"] for row in verify_cache(recipe, extra_teachers=teachers())["teachers"]] == [1, 1]
    bad.write_bytes(good)


def test_more_unreadable_images_than_training_puts_up_with_stop_it(root: Path, tmp_path: Path) -> None:
    save_toy_world(tmp_path)
    for bad in sorted((tmp_path / "images").iterdir())[:3]:
        bad.write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"images cannot be used .* listed in .*cache/skipped.jsonl: .*images.max_unreadable="
    ):
        build(toy_recipe(tmp_path, tmp_path / "cache"))
    build(toy_recipe(tmp_path, tmp_path / "cache", images__max_unreadable=0.2))
    assert len((tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()) == 3


def test_the_command_that_is_proposed_makes_this_very_cache(root: Path, tmp_path: Path) -> None:
    told = command(toy_recipe(root, tmp_path / "a cache", images__views=3, cache__pool=2))
    changes = shlex.split(told)[3:]
    assert changes == [f"cache.path={tmp_path}/a cache", "cache.dtype=int8", "cache.pool=2", "images.views=3"]


class Broken(Colours):
    def __init__(self, value: float) -> None:
        super().__init__(4)
        self.value = value

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        told = super().forward(pixels)
        if len(pixels) > 1:  # not yet when it is loaded
            told["mean"].components()["summary"][1] = self.value
        return told


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "bfloat16", "teachers.broken: mean/summary of an image is not finite"),
        (float("inf"), "int8", "is not finite"),
        (1e5, "float16", "holds 100000, too much for float16; take cache.dtype=bfloat16"),
    ],
)
def test_what_cannot_be_stored_stops_the_build(
    value: float, dtype: str, message: str, root: Path, tmp_path: Path
) -> None:
    recipe = toy_recipe(root, tmp_path / "cache", cache__dtype=dtype)
    with pytest.raises(NumericError, match=message):
        build(recipe, {"broken": Teacher(Broken(value), size=(16, 16))})
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.partial"))


def test_the_plan_is_what_it_takes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy_recipe(root, tmp_path / "cache")
    plan = estimate_cache(recipe, extra_teachers=teachers())
    assert not (tmp_path / "cache").exists()
    assert 0 < plan["minutes"] < 1 and plan["memory_bytes"] > 2**20
    assert (
        build(recipe)["bytes"] == plan["disk_bytes"] == sum(r["views"] * r["bytes_per_view"] for r in plan["teachers"])
    )
    assert estimate_cache(recipe, extra_teachers=teachers())["disk_bytes"] == 0
    monkeypatch.setattr("shoulders.feature_cache.estimate.free_bytes", lambda path: 100)
    estimate_cache(recipe, extra_teachers=teachers())
    with pytest.raises(SpaceError):
        estimate_cache(toy_recipe(root, tmp_path / "other"), extra_teachers=teachers())


def test_recipes_that_cannot_be_cached_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="images.views: fresh views never end, so they cannot be cached; give a number"
    ):
        build(toy_recipe(root, tmp_path / "cache", images__views="fresh"))
    with pytest.raises(RecipeError, match="cache.path: none; give cache.path=FOLDER"):
        build(toy_recipe(root, tmp_path / "cache", cache__path=None))
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="cache.path: cannot write to"):
        build(toy_recipe(root, tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="no cache is here; make it with"):
        info_cache(toy_recipe(root, tmp_path / "cache"))

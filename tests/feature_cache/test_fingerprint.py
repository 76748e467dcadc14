"""A cache is read only for the recipe that it was built for, from any folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from shoulders.config.recipe import Recipe
from shoulders.errors import DataError
from shoulders.feature_cache import build_cache, open_cache, verify_cache
from shoulders.feature_cache.metadata import LAYOUT, read_json, write_json
from shoulders.images import open_images
from tests.feature_cache.toy import SINGLE_PROCESS, contents
from tests.tiny import save_base, save_convnext, save_images, save_segformer, tiny_recipe


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two teachers, images, and their cache."""
    root = tmp_path_factory.mktemp("built")
    save_base(root / "base")
    save_convnext(root / "classifier")
    save_segformer(root / "segmenter")
    save_images(root / "images", 90)
    build_cache(recipe(root))
    return root


def recipe(root: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "student__adapter": None,
        "images__views": 2,
        "images__holdout": 512,
        "transfer": {},
        "train": {"precision": "fp32"},
        "cache": {"path": str(root / "cache"), "mode": "require"},
    }
    return tiny_recipe(root, "out", **settings | changes)


def reopen(changed: Recipe) -> Any:
    images = open_images(changed.images, changed.train.seed)
    return open_cache(changed, {}, images, changed.train.precision == "bf16", SINGLE_PROCESS)


def flip_a_weight(root: Path) -> None:
    path = root / "classifier" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def rename_an_image(root: Path) -> None:
    first = sorted((root / "images").iterdir())[0]
    first.rename(first.with_name("renamed.jpg"))


def change_a_tensor(root: Path) -> None:
    path = root / "segmenter" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, {"format": "pt"})


# a change of the recipe or of the files, and the field that the error message has to name
CHANGES: list[tuple[dict[str, Any] | Callable[[Path], None], str]] = [
    (flip_a_weight, "weights was"),
    (change_a_tensor, "weights was"),
    (edit("classifier/config.json", layer_norm_eps=1e-3), "config was"),
    (edit("classifier/preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]), "mean was"),
    (edit("classifier/preprocessor_config.json", image_std=[0.1, 0.2, 0.3]), "std was"),
    (edit("base/config.json", layer_norm_eps=1e-3), "config was"),
    (rename_an_image, "images was"),
    ({"teachers__classifier__size": 16}, "size was"),
    ({"teachers__segmenter__taps": ["stage1"]}, "taps was ['stage0', 'stage1'], is stage1"),
    ({"teachers__classifier__int8": True}, "int8 was None, is True"),
    ({"images__size": 48}, "images.decoded_side was"),
    ({"images__views": 3}, "images.views was 2, is 3"),
    ({"images__scale": [0.5, 1.0]}, "images.scale was [0.4, 1.0], is [0.5, 1.0]"),
    ({"images__flip": False}, "images.flip was True, is False"),
    ({"images__max_pixels": 10_000}, "images.max_pixels was 50000000, is 10000"),
    ({"images__holdout": 8}, "images.heldout was"),
    ({"train__seed": 1}, "train.seed was 0, is 1"),
    ({"train__precision": "bf16"}, "train.precision was fp32, is bf16"),
    ({"cache__dtype": "int8"}, "cache.dtype was float16, is int8"),
    ({"cache__pool": 2}, "cache.pool was 1, is 2"),
    ({"cache__pca": 4}, "cache.pca was None, is 4"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[named for _, named in CHANGES])
def test_each_change_that_affects_features_is_refused_by_name(
    change: dict[str, Any] | Callable[[Path], None], named: str, built: Path, tmp_path: Path
) -> None:
    shutil.copytree(built, tmp_path / "built")
    if callable(change):
        change(tmp_path / "built")
    changed = recipe(tmp_path / "built", **(change if isinstance(change, dict) else {}))
    before = contents(tmp_path / "built/cache")
    started = time.process_time()
    with pytest.raises(DataError) as error:
        reopen(changed)
    assert time.process_time() - started < 2
    message = str(error.value)
    assert error.value.exit_code == 3 and named in message, message
    assert "built for something else" in message and "shoulders cache RECIPE cache.path=OTHER" in message
    with pytest.raises(DataError, match="built for something else"):
        build_cache(changed)
    assert contents(tmp_path / "built/cache") == before


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("format", 1, "format was 1, is 2"),
        ("rendering", "nearest", "rendering was nearest, is bicubic"),
        ("torch", "2.99.1", f"torch was 2.99.1, is {torch.__version__.partition('+')[0]}"),
        ("transformers", "9.0", f"transformers was 9.0, is {transformers.__version__}"),
        ("revision", "f" * 40, "revision was ffffffff.*, is None"),
    ],
)
def test_a_cache_of_another_version_is_refused(field: str, value: Any, named: str, built: Path, tmp_path: Path) -> None:
    """The layout of the cache is changed, as if it was built by other code or from another commit of a model."""
    shutil.copytree(built, tmp_path / "built")
    path = tmp_path / "built/cache/classifier" / LAYOUT
    layout = read_json(path)
    write_json(path, layout | {"fingerprint": layout["fingerprint"] | {field: value}})
    with pytest.raises(DataError, match=named):
        reopen(recipe(tmp_path / "built"))


def test_a_teacher_of_another_name_is_another_teacher(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "built")
    cache = tmp_path / "built/cache"
    teachers = recipe(tmp_path / "built").model_dump(mode="json")["teachers"]
    renamed = recipe(tmp_path / "built", teachers={"other": teachers["classifier"], "segmenter": teachers["segmenter"]})
    with pytest.raises(
        DataError, match="other: there is no cache of this teacher; build it with: shoulders cache RECIPE"
    ):
        reopen(renamed)
    (cache / "classifier").rename(cache / "other")
    with pytest.raises(DataError, match="teacher was classifier, is other"):
        reopen(renamed)


def test_other_pixels_under_the_same_name_are_detected_when_read(built: Path, tmp_path: Path) -> None:
    from shoulders.images import evaluation_batches

    shutil.copytree(built, tmp_path / "built")
    images = sorted((tmp_path / "built/images").iterdir())
    for one, other in zip(images[::2], images[1::2], strict=True):
        shutil.copy(one, other)
    changed = recipe(tmp_path / "built")
    cached = reopen(changed)
    reopened = open_images(changed.images, 0)
    with pytest.raises(DataError, match="has other pixels than when .* was built"):
        for batch in evaluation_batches(
            reopened.collection, [(32, 32)], 8, reopened.heldout, decode_sizes=cached.sizes
        ):
            cached(batch)


def test_paths_and_dates_do_not_matter(built: Path, tmp_path: Path) -> None:
    for name in ("moved", "with spaces and ünïcode 影", "again"):
        shutil.copytree(built, tmp_path / name)
    for path in (tmp_path / "moved").rglob("*"):
        os.utime(path, (1, 1))
    read_only = tmp_path / "again"
    for path in [*read_only.rglob("*"), read_only]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for name in ("moved", "with spaces and ünïcode 影", "again"):
            assert reopen(recipe(tmp_path / name)) is not None
            assert build_cache(recipe(tmp_path / name))["bytes"] > 0
            assert verify_cache(recipe(tmp_path / name))["bytes"] > 0
    finally:
        for path in [read_only, *read_only.rglob("*")]:
            path.chmod(0o755)
    # only the cache is moved, or everything else
    shutil.move(tmp_path / "moved/cache", tmp_path / "other")
    assert reopen(recipe(tmp_path / "moved", cache__path=str(tmp_path / "other"))) is not None
    assert reopen(recipe(built, cache__path=str(tmp_path / "other"))) is not None


def test_changes_that_do_not_affect_features_are_allowed(built: Path) -> None:
    for changes in (
        {"train__steps": 7},
        {"train__lr": 1e-5},
        {"train__batch": 4},
        {"transfer__standardize": "none"},
        {"student__adapter": {"kind": "lora", "rank": 2}},
        {"transfer__preserve": 0.0},
        {"images__workers": 2},
    ):
        assert reopen(recipe(built, **changes)) is not None
    fewer = {"segmenter": recipe(built).model_dump(mode="json")["teachers"]["segmenter"]}
    cached = reopen(recipe(built, teachers=fewer))
    assert sorted(cached.taps) == ["segmenter/stage0", "segmenter/stage1"]


def test_mode_auto_gives_the_reason_for_running_the_teachers(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reopen(recipe(built, cache__mode="auto")) is not None
    assert reopen(recipe(built, cache__mode="auto", train__seed=1)) is None
    assert "running the teachers, not reading the cache: " in capsys.readouterr().err
    assert reopen(recipe(built, cache__mode="auto", images__views="fresh")) is None
    assert "images.views: fresh views never repeat" in capsys.readouterr().err
    assert reopen(recipe(built, cache__mode="auto", cache__path=str(built / "nothing"))) is None
    assert "there is no cache of this teacher" in capsys.readouterr().err
    assert reopen(recipe(built, cache__mode="off")) is None
    assert capsys.readouterr().err == ""
    assert yaml.safe_load("mode: off") == {"mode": False}
    assert recipe(built, cache__mode=False).cache.mode == "off"

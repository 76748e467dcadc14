"""A cache is used for what it was made for and nothing else, wherever it lies."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from shoulders.config.recipe import Recipe
from shoulders.errors import DataError
from shoulders.feature_cache import build_cache, fingerprint, open_cache, verify_cache
from shoulders.images import open_images
from tests.feature_cache.toy import HERE, contents
from tests.tiny import save_base, save_convnext, save_images, save_segformer, tiny_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two teachers, images, and their cache."""
    root = tmp_path_factory.mktemp("made")
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


def open_again(changed: Recipe) -> Any:
    images = open_images(changed.images, changed.train.seed)
    return open_cache(changed, {}, images, changed.train.precision == "bf16", HERE)


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


def rewrite_the_weights(root: Path) -> None:
    path = root / "segmenter" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, {"format": "pt"})


# what is changed in the recipe, or what is done to the files -> the field that must be named
CHANGES: list[tuple[dict[str, Any] | Callable[[Path], None], str]] = [
    (flip_a_weight, "weights was"),
    (rewrite_the_weights, "weights was"),
    (edit("classifier/config.json", layer_norm_eps=1e-3), "config was"),
    (edit("classifier/preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]), "mean was"),
    (edit("classifier/preprocessor_config.json", image_std=[0.1, 0.2, 0.3]), "std was"),
    (edit("base/config.json", layer_norm_eps=1e-3), "config was"),
    (rename_an_image, "images was"),
    ({"teachers__classifier__size": 16}, "size was"),
    ({"teachers__segmenter__taps": ["stage1"]}, "taps was ['stage0', 'stage1'], is stage1"),
    ({"teachers__classifier__int8": True}, "int8 was None, is True"),
    ({"images__size": 48}, "decoded to at least was"),
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
def test_whatever_changes_a_feature_is_refused_by_name(
    change: dict[str, Any] | Callable[[Path], None], named: str, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "made")
    if callable(change):
        change(tmp_path / "made")
    changed = recipe(tmp_path / "made", **(change if isinstance(change, dict) else {}))
    before = contents(tmp_path / "made/cache")
    started = time.process_time()
    with pytest.raises(DataError) as refusal:
        open_again(changed)
    assert time.process_time() - started < 2
    message = str(refusal.value)
    assert refusal.value.exit_code == 3 and named in message, message
    assert "made for something else" in message and "shoulders cache RECIPE cache.path=OTHER" in message
    with pytest.raises(DataError, match="made for something else"):
        build_cache(changed)
    assert contents(tmp_path / "made/cache") == before


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("FORMAT", 2, "format was 1, is 2"),
        ("RENDERING", "nearest", "rendering was bicubic"),
        ("torch.__version__", "2.99.1", "torch was"),
        ("transformers.__version__", "9.0", "transformers was"),
    ],
)
def test_other_code_is_refused_too(
    name: str, value: Any, named: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{fingerprint.__name__}.{name}", value)
    with pytest.raises(DataError, match=named):
        open_again(recipe(made))


def test_another_commit_of_the_hub_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = fingerprint._of_files
    monkeypatch.setattr(fingerprint, "_of_files", lambda pretrained: fields(pretrained) | {"revision": "f" * 40})
    with pytest.raises(DataError, match="revision was None, is ffffffff"):
        open_again(recipe(made))


def test_another_name_is_another_teacher(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    cache = tmp_path / "made/cache"
    teachers = recipe(tmp_path / "made").model_dump(mode="json")["teachers"]
    renamed = recipe(tmp_path / "made", teachers={"other": teachers["classifier"], "segmenter": teachers["segmenter"]})
    with pytest.raises(
        DataError, match="other: no cache of this teacher is here; make it with: shoulders cache RECIPE"
    ):
        open_again(renamed)
    (cache / "classifier").rename(cache / "other")
    with pytest.raises(DataError, match="teacher was classifier, is other"):
        open_again(renamed)


def test_another_image_under_the_same_name_is_noticed_when_it_is_seen(made: Path, tmp_path: Path) -> None:
    from shoulders.images import evaluation_batches

    shutil.copytree(made, tmp_path / "made")
    images = sorted((tmp_path / "made/images").iterdir())
    for one, other in zip(images[::2], images[1::2], strict=True):
        shutil.copy(one, other)
    changed = recipe(tmp_path / "made")
    cached = open_again(changed)
    found = open_images(changed.images, 0)
    with pytest.raises(DataError, match="does not look as it did when .* was made"):
        for batch in evaluation_batches(found.collection, [(32, 32)], 8, found.heldout, decode_sizes=cached.sizes):
            cached(batch)


def test_where_it_lies_and_when_it_was_touched_do_not_matter(made: Path, tmp_path: Path) -> None:
    for name in ("moved", "with spaces and ünïcode 影", "again"):
        shutil.copytree(made, tmp_path / name)
    for path in (tmp_path / "moved").rglob("*"):
        os.utime(path, (1, 1))
    read_only = tmp_path / "again"
    for path in [*read_only.rglob("*"), read_only]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for name in ("moved", "with spaces and ünïcode 影", "again"):
            assert open_again(recipe(tmp_path / name)) is not None
            assert build_cache(recipe(tmp_path / name))["bytes"] > 0
            assert verify_cache(recipe(tmp_path / name))["bytes"] > 0
    finally:
        for path in [read_only, *read_only.rglob("*")]:
            path.chmod(0o755)
    # the cache alone elsewhere, or everything but the cache
    shutil.move(tmp_path / "moved/cache", tmp_path / "elsewhere")
    assert open_again(recipe(tmp_path / "moved", cache__path=str(tmp_path / "elsewhere"))) is not None
    assert open_again(recipe(made, cache__path=str(tmp_path / "elsewhere"))) is not None


def test_what_changes_no_feature_may_change(made: Path) -> None:
    for changes in (
        {"train__steps": 7},
        {"train__lr": 1e-5},
        {"train__batch": 4},
        {"transfer__standardize": "none"},
        {"student__adapter": {"kind": "lora", "rank": 2}},
        {"transfer__preserve": 0.0},
        {"images__workers": 2},
    ):
        assert open_again(recipe(made, **changes)) is not None
    fewer = {"segmenter": recipe(made).model_dump(mode="json")["teachers"]["segmenter"]}
    cached = open_again(recipe(made, teachers=fewer))
    assert sorted(cached.taps) == ["segmenter/stage0", "segmenter/stage1"]


def test_auto_says_why_it_goes_on_live(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert open_again(recipe(made, cache__mode="auto")) is not None
    assert open_again(recipe(made, cache__mode="auto", train__seed=1)) is None
    assert "asking the teachers live, not from the cache: " in capsys.readouterr().err
    assert open_again(recipe(made, cache__mode="auto", images__views="fresh")) is None
    assert "images.views: fresh views never end" in capsys.readouterr().err
    assert open_again(recipe(made, cache__mode="auto", cache__path=str(made / "nothing"))) is None
    assert "no cache of this teacher is here" in capsys.readouterr().err
    assert open_again(recipe(made, cache__mode="off")) is None
    assert capsys.readouterr().err == ""
    assert yaml.safe_load("mode: off") == {"mode": False}  # and yet
    assert recipe(made, cache__mode=False).cache.mode == "off"

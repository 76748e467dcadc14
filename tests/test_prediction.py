"""`shoulders predict`: JSON and pictures, without a teacher."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.errors import DataError, RecipeError
from shoulders.model import load
from shoulders.prediction import _plain, _stems, ask_heads, predict
from shoulders.teachers.heads import taps_of_teacher
from shoulders.world import draw
from tests.teachers.heads.test_saved import run  # noqa: F401


def test_every_image_and_head_gets_an_answer_and_a_picture(run: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(draw("paper", 0, index).image[: 60 + index]).save(folder / f"{index}.png")
    told = predict(run, folder, out=tmp_path / "out", threshold=0.0)
    assert list(told) == ["0.png", "1.png", "2.png"]
    assert set(told["1.png"]) == {"segformer", "rt_detr_v2"}
    mask = told["1.png"]["segformer"][0]["mask"]
    assert mask["size"] == [61, 96] and sum(mask["counts"]) == 61 * 96
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == told
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"{i}-{kind}.png" for i in range(3) for kind in ("latent", "rt_detr_v2", "segformer")]
    with Image.open(tmp_path / "out" / "0-rt_detr_v2.png") as shown:
        assert shown.size == (480, 300)
    alone = predict(run, folder / "1.png", ["segformer"])
    assert alone == {"1.png": {"segformer": told["1.png"]["segformer"]}}


def test_the_encoder_runs_once_for_all_heads(run: Path) -> None:  # noqa: F811
    student = load(run)
    calls: list[int] = []
    student.encoder.register_forward_hook(lambda *_: calls.append(1))
    pixels = torch.rand(2, 3, 32, 32)
    latent, outputs = ask_heads(student, ["segformer", "rt_detr_v2"], pixels)
    assert len(calls) == 1
    torch.testing.assert_close(latent.spatial, student(pixels).latent.spatial)
    told = student.predict_teacher_features(pixels)
    for name, output in outputs.items():
        alone = student.head(name)(taps_of_teacher(name, told))
        assert torch.equal(output.logits, alone.logits)


def test_depth_is_a_file_beside_the_answers(tmp_path: Path) -> None:
    """As text the depth of one photo would be hundreds of megabytes."""
    depth = torch.rand(5, 7)
    assert _plain({"predicted_depth": depth}, tmp_path / "out" / "a-depth.npy") == {"predicted_depth": "a-depth.npy"}
    assert np.array_equal(np.load(tmp_path / "out" / "a-depth.npy"), depth.numpy())
    assert _plain({"predicted_depth": depth}, None) == {"predicted_depth": depth.tolist()}


def test_an_image_that_cannot_be_read_costs_no_other(run: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(draw("paper", 0, 0).image).save(folder / "a.png")
    Image.new("RGB", (200, 200)).save(folder / "large.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"2 of 3 images could not be read .*skipped\.jsonl"):
        told = predict(run, folder, ["segformer"], out=tmp_path / "out", max_pixels=20_000)
    assert list(told) == ["a.png"]
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["broken.jpg", "large.png"]
    with pytest.raises(RecipeError, match="choose another place"):
        predict(run, folder, ["segformer"], out=folder / "out")


def test_what_cannot_be_predicted_is_refused(run: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(RecipeError, match="not kept"):
        predict(run, tmp_path, ["nobody"])
    with pytest.raises(DataError, match="leave it out"):
        predict(run, tmp_path / "broken.png")


def test_pictures_of_images_with_like_names_do_not_overwrite_each_other() -> None:
    names = ["a/1.png", "a/2.JPG", "b.png", "b.jpg", "x.parquet#0", "x.parquet#1"]
    assert list(_stems(names).values()) == ["a-1", "a-2", "b.png", "b.jpg", "x.parquet#0", "x.parquet#1"]
    far = ["/".join(["folder"] * 40) + f"/{name}.jpg" for name in "ab"]
    assert [len(stem) for stem in _stems(far).values()] == [47, 47]
    assert len(set(_stems(far).values())) == 2
    assert len(set(_stems(["a/b.jpg", "a-b.jpg", "a/b.png", "c.png"]).values())) == 4


def test_an_image_whose_name_is_no_text_is_answered(run: Path, tmp_path: Path) -> None:  # noqa: F811
    odd = tmp_path / os.fsdecode(b"\xff.png")
    Image.fromarray(draw("paper", 0, 0).image).save(odd)
    (answers,) = predict(run, odd).values()
    assert answers.keys() == {"segformer", "rt_detr_v2"}

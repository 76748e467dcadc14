"""`shoulders predict`: JSON and pictures, without a teacher, and without anything that trains or evaluates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.errors import DataError, RecipeError
from shoulders.inference import run_heads
from shoulders.model import load
from shoulders.prediction import picture_stems, predict, to_json
from shoulders.student.files import finish_folder
from shoulders.teachers.heads import taps_of_teacher
from shoulders.world import draw
from tests.teachers.heads.test_saved import run  # noqa: F401

ABOVE = ("training", "distillation", "evaluation", "feature_cache", "planning", "report", "demo", "world")
IMPORTS = """
import sys
def modules(): return [name for name in sys.modules if name.startswith("shoulders.")]
import shoulders.prediction
print(*modules())
import shoulders.tasks.saved_probes
print(*modules())
"""


def test_prediction_and_saved_probes_import_nothing_that_trains_or_evaluates() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    prediction, probes = (line.split() for line in done.stdout.splitlines())
    assert "shoulders.prediction" in prediction and "shoulders.tasks.semantic" in probes
    assert {name.split(".")[1] for name in prediction} & {*ABOVE, "tasks"} == set()
    assert {name.split(".")[1] for name in probes} & set(ABOVE) == set()
    assert "shoulders.tasks.finetune" not in probes


def test_every_image_and_head_has_a_prediction_and_a_picture(run: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(draw("paper", 0, index).image[: 60 + index]).save(folder / f"{index}.png")
    predictions = predict(run, folder, out=tmp_path / "out", threshold=0.0)
    assert list(predictions) == ["0.png", "1.png", "2.png"]
    assert set(predictions["1.png"]) == {"segformer", "rt_detr_v2"}
    mask = predictions["1.png"]["segformer"][0]["mask"]
    assert mask["size"] == [61, 96] and sum(mask["counts"]) == 61 * 96
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == predictions
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"{i}-{name}.png" for i in range(3) for name in ("latent", "rt_detr_v2", "segformer")]
    with Image.open(tmp_path / "out" / "0-rt_detr_v2.png") as picture:
        assert picture.size == (480, 300)
    one_image = predict(run, folder / "1.png", ["segformer"])
    assert one_image == {"1.png": {"segformer": predictions["1.png"]["segformer"]}}


def test_pictures_can_be_left_out_and_are_smaller_than_large_images(run: Path, tmp_path: Path) -> None:  # noqa: F811
    image = Image.fromarray(draw("paper", 0, 0).image).resize((2000, 1500))
    image.save(tmp_path / "large.png")
    with_pictures = predict(run, tmp_path / "large.png", ["segformer"], tmp_path / "out")
    for name in ("latent", "segformer"):
        with Image.open(tmp_path / "out" / f"large-{name}.png") as picture:
            assert picture.width == 1600 and picture.height >= 1200  # a legend is below
    assert with_pictures["large.png"]["segformer"][0]["mask"]["size"] == [1500, 2000]
    assert predict(run, tmp_path / "large.png", ["segformer"], tmp_path / "plain", pictures=False) == with_pictures
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["predictions.json", "skipped.jsonl"]


def run_shoulders(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoulders", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_control_characters_in_names_are_escaped(run: Path, tmp_path: Path) -> None:  # noqa: F811
    """Names of files and of classes may come from strangers: escape codes must not reach the terminal."""
    folder, student = tmp_path / "photos", tmp_path / "student"
    folder.mkdir()
    shutil.copytree(run / "student", student)
    config = student / "heads" / "segformer" / "config.json"
    settings = json.loads(config.read_text())
    settings["id2label"] = {index: f"class\x1b[31m\n{index}" for index in ("0", "1")}
    config.write_text(json.dumps(settings | {"label2id": {name: int(i) for i, name in settings["id2label"].items()}}))
    Image.fromarray(draw("paper", 0, 0).image).save(folder / "red\x1b[31m\nlines.png")
    (folder / "bad\x1b[31m\n.png").write_bytes(b"no image")
    done = run_shoulders(
        "predict", student, folder, "--head", "segformer", "--out", tmp_path / "out", "--no-pictures", "--no-verify"
    )
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text and "\\x1b[31m\\n" in text
    assert len(done.stdout.splitlines()) == 5  # titles, a line, one row, an empty line, and where the files are
    finish_folder(student)
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    done = run_shoulders("predict", student, folder, "--out", tmp_path / "out")
    assert done.returncode == 3 and "\x1b" not in done.stderr and "\\x1b[31m" in done.stderr


def test_the_encoder_runs_once_for_all_heads(run: Path) -> None:  # noqa: F811
    student = load(run)
    calls: list[int] = []
    student.encoder.register_forward_hook(lambda *_: calls.append(1))
    pixels = torch.rand(2, 3, 32, 32)
    latent, outputs = run_heads(student, ["segformer", "rt_detr_v2"], pixels)
    assert len(calls) == 1
    torch.testing.assert_close(latent.spatial, student(pixels).latent.spatial)
    teacher_features = student.predict_teacher_features(pixels)
    for name, output in outputs.items():
        expected = student.head(name)(taps_of_teacher(name, teacher_features))
        assert torch.equal(output.logits, expected.logits)


def test_depth_is_written_to_a_file(tmp_path: Path) -> None:
    """As text, the depth of one photo would take hundreds of megabytes."""
    depth = torch.rand(5, 7)
    assert to_json({"predicted_depth": depth}, tmp_path / "out" / "a-depth.npy") == {"predicted_depth": "a-depth.npy"}
    assert np.array_equal(np.load(tmp_path / "out" / "a-depth.npy"), depth.numpy())
    assert to_json({"predicted_depth": depth}, None) == {"predicted_depth": depth.tolist()}


def test_unreadable_images_are_skipped_and_listed(run: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(draw("paper", 0, 0).image).save(folder / "a.png")
    Image.new("RGB", (200, 200)).save(folder / "large.png")
    (folder / "broken.jpg").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match=r"2 of 3 images could not be read .*skipped\.jsonl"):
        predictions = predict(run, folder, ["segformer"], out=tmp_path / "out", max_pixels=20_000)
    assert list(predictions) == ["a.png"]
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["broken.jpg", "large.png"]
    with pytest.raises(RecipeError, match="whose images are read; choose another folder"):
        predict(run, folder, ["segformer"], out=folder / "out")


def test_unknown_heads_and_unreadable_folders_are_refused(run: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(RecipeError, match="not kept"):
        predict(run, tmp_path, ["unknown"])
    with pytest.raises(DataError, match="leave it out"):
        predict(run, tmp_path / "broken.png")


def test_pictures_of_images_with_similar_names_do_not_overwrite_each_other() -> None:
    names = ["a/1.png", "a/2.JPG", "b.png", "b.jpg", "x.parquet#0", "x.parquet#1"]
    assert list(picture_stems(names).values()) == ["a-1", "a-2", "b.png", "b.jpg", "x.parquet#0", "x.parquet#1"]
    long = ["/".join(["folder"] * 40) + f"/{name}.jpg" for name in "ab"]
    assert [len(stem) for stem in picture_stems(long).values()] == [47, 47]
    assert len(set(picture_stems(long).values())) == 2
    assert len(set(picture_stems(["a/b.jpg", "a-b.jpg", "a/b.png", "c.png"]).values())) == 4


def test_a_file_name_need_not_be_valid_text(run: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / os.fsdecode(b"\xff.png")
    Image.fromarray(draw("paper", 0, 0).image).save(file)
    (by_head,) = predict(run, file).values()
    assert by_head.keys() == {"segformer", "rt_detr_v2"}

"""A teacher whose features of some images are not finite is left out for these images, up to a limit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shoulders.config.recipe import Recipe
from shoulders.distillation import Trainer, distill, prepare
from shoulders.distributed.context import DistContext
from shoulders.errors import DataError, NumericError
from shoulders.features import Batch, Features
from shoulders.planning import plan
from shoulders.teachers import Teacher, Teachers
from shoulders.training.heldout import HeldOutSet
from shoulders.training.masked import FILE, Masked, MaskReport
from shoulders.transfer.fvu import fvu
from tests.marked import all_finite, mark_images, marked_teacher
from tests.tiny import metric_rows, student_weights, tiny_recipe

SINGLE_PROCESS = DistContext(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world; two of its training images and one held-out image are bright."""
    root = tmp_path_factory.mktemp("marked") / "world"
    shutil.copytree(tiny_world, root)
    names = mark_images(recipe(root, root / "run"), training=2, heldout=1)
    (root / "names.json").write_text(json.dumps(sorted(names)))
    return root


def recipe(world: Path, out: Path, **changes: Any) -> Recipe:
    return tiny_recipe(world, out, **{"train__steps": 8, "train__save_every": 4, **changes})


def marked_names(world: Path) -> list[str]:
    return json.loads((world / "names.json").read_text())


def listed(out: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (out / FILE).read_text().splitlines()]
    return sorted((row["teacher"], row["name"]) for row in rows)


def trainer_of(world: Path, value: float, out: Path) -> Trainer:
    return prepare(recipe(world, out), {"own": marked_teacher(value)}, SINGLE_PROCESS)


def bright_images(batch: Batch) -> torch.Tensor:
    return batch.pixels((32, 32)).mean((1, 2, 3)) > 0.6


def batch_with_a_bright_image(trainer: Trainer) -> Batch:
    return next(batch for batch in trainer.batches.training(0, 8) if bright_images(batch).any())


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 0.7])
def test_one_bad_sample_masks_its_teacher(
    world: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    summary = distill(recipe(world, out), extra_teachers={"own": marked_teacher(value)})
    assert all_finite(student_weights(out))
    assert all(0 < one < math.inf for name, one in summary.items() if name.startswith("fvu/"))
    assert [row["skipped_steps"] for row in metric_rows(out)] == [0] * 8
    log = capsys.readouterr().err
    if math.isfinite(value):  # right or wrong, it can be learned
        assert not (out / FILE).exists() and "not finite" not in log
    else:
        assert listed(out) == [("own", name) for name in marked_names(world)]
        assert "teachers.own: its features are not finite for 3 of 60 images so far" in log
        assert all(name in log for name in marked_names(world))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (math.nan, NumericError, "teachers.own: its features are not finite for 8 of 60 images"),
        (math.inf, NumericError, "teachers.own: its features are not finite for 8 of 60 images"),
        (0.0, DataError, "teachers.own: the summary of tap 'map' is the same for all"),
        (0.7, DataError, "teachers.own: the summary of tap 'map' is the same for all"),
    ],
)
def test_a_teacher_that_is_never_finite_is_named(
    world: Path, tmp_path: Path, value: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        distill(recipe(world, tmp_path / "run"), extra_teachers={"own": marked_teacher(value, everywhere=True)})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # before the first step


def test_the_calibration_finds_a_teacher_that_is_never_finite_whatever_the_limit(world: Path, tmp_path: Path) -> None:
    lenient = recipe(world, tmp_path / "run", transfer__max_not_finite=1.0)
    with pytest.raises(NumericError, match="teachers.own: its features are finite for 0 of 16 images only") as error:
        distill(lenient, extra_teachers={"own": marked_teacher(math.nan, everywhere=True)})
    assert error.value.exit_code == 4


def test_a_teacher_that_is_never_finite_is_named_without_standardizers(world: Path, tmp_path: Path) -> None:
    raw = recipe(world, tmp_path / "run", transfer__max_not_finite=1.0, transfer__standardize="none")
    with pytest.raises(NumericError, match="teachers.own: its features are finite for 0 of 8 images only"):
        distill(raw, extra_teachers={"own": marked_teacher(math.nan, everywhere=True)})


def test_a_plan_refuses_a_teacher_that_is_never_finite(world: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="teachers.own: its features are finite for 0 of 8 images only"):
        plan(recipe(world, tmp_path / "run"), extra_teachers={"own": marked_teacher(math.nan, everywhere=True)})


def test_the_limit_stops_a_run_and_a_higher_one_continues_it(world: Path, tmp_path: Path) -> None:
    teachers = {"own": marked_teacher(math.nan)}
    with pytest.raises(
        NumericError, match=r"of 60 images so far .* continue with transfer.max_not_finite=0.0\d"
    ) as error:
        distill(recipe(world, tmp_path / "run", transfer__max_not_finite=0.02), extra_teachers=teachers)
    assert error.value.exit_code == 4 and "\n" not in str(error.value)
    distill(recipe(world, tmp_path / "run"), extra_teachers=teachers, resume=True)
    assert listed(tmp_path / "run") == [("own", name) for name in marked_names(world)]


def test_a_masked_image_trains_the_student_as_if_its_source_had_no_such_teacher(world: Path, tmp_path: Path) -> None:
    """The same loss and gradients, bit for bit, as with a healthy teacher that is not run on these images."""
    broken, healthy = trainer_of(world, math.nan, tmp_path / "one"), trainer_of(world, 0.5, tmp_path / "other")
    batch = batch_with_a_bright_image(broken)
    bright = bright_images(batch)
    sourced = Batch(batch.ids, batch.rendered, views=batch.views, sources=bright.long())
    healthy.teachers.sources["own"] = [0]
    results = []
    for trainer, images in ((broken, batch), (healthy, sourced)):
        loss, terms, masked = trainer.step.backward(1, images)
        gradients = [p.grad for p in trainer.optimizers.parameters.values() if p.grad is not None]
        results.append((loss, terms, gradients, masked))
    one, other = results
    assert one[3] == [Masked("own", int(i)) for i in batch.ids[bright]] and other[3] == []
    assert torch.equal(one[0], other[0]) and one[1].keys() == other[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True)) and len(one[2]) > 20


def test_teachers_without_a_bad_image_keep_all_rows(world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(world, math.nan, tmp_path)
    teachers = Teachers({name: trainer.teachers[name] for name in ("classifier", "own")})
    batch = batch_with_a_bright_image(trainer)
    features = teachers(batch)
    assert {tap: one.rows is None for tap, one in features.items()} == {
        tap: not tap.startswith("own/") for tap in teachers.taps
    }
    assert features["own/map"].batch_size == len(features["own/map"].rows) < len(batch)


def test_a_held_out_image_that_is_not_finite_is_left_out(world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(world, math.nan, tmp_path)
    pairs = list(trainer.with_targets(trainer.batches.heldout()))
    heldout = HeldOutSet(pairs, trainer.student, (32, 32), {})
    trainer.module.eval()
    value = heldout.measure(trainer.student, torch.device("cpu"))[0]["fvu/own/map/summary"]
    pixels = torch.cat([batch.pixels((32, 32)) for batch, _ in pairs])
    good = pixels.mean((1, 2, 3)) < 0.6
    with torch.no_grad():
        latent = trainer.student.forward_features(pixels)["latent"].summary
    assert latent is not None and good.sum() == len(good) - 1
    assert value == pytest.approx(fvu(latent[good, None], pixels.mean((2, 3))[good, None]), rel=1e-3)
    assert value > 0


def test_a_student_that_is_not_finite_on_held_out_images_is_refused(world: Path, tmp_path: Path) -> None:
    trainer = trainer_of(world, 0.5, tmp_path)
    heldout = HeldOutSet(trainer.with_targets(trainer.batches.heldout()), trainer.student, (32, 32), {})
    trainer.module.eval()
    with torch.no_grad():
        for parameter in trainer.optimizers.parameters.values():
            parameter.mul_(1e30)
    with pytest.raises(NumericError, match="the student's features are not finite for 8 of 8 held-out images"):
        heldout.measure(trainer.student, torch.device("cpu"))


class Float16(torch.nn.Module):
    """Mean colours, computed in float16, in which those of bright images are too large."""

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        return {"mean": Features((pixels.mean((2, 3)) * 1e5).half(), None)}


def test_what_overflows_in_float16_is_left_out() -> None:
    teachers = Teachers({"own": Teacher(Float16(), (8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)})
    images = torch.tensor([25, 250, 100, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    features = teachers(Batch(torch.arange(4), {(8, 8): images}))["own/mean"]
    assert features.rows is not None and features.rows.tolist() == [0, 2]
    assert features.summary is not None and features.summary.isfinite().all()


def test_a_list_counts_an_image_once_for_each_teacher(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tmp_path / FILE

    def report() -> MaskReport:
        return MaskReport(path, {"a": 10, "b": 4}, 0.5, lambda i: f"{i}.jpg", lines.append)

    first = report()
    first.add([Masked("a", 1), Masked("a", 1), Masked("b", 1)])
    first.add([Masked("a", 2), Masked("a", 1)])
    with path.open("a") as file:
        file.write('{"teacher": "a", "na')  # a killed run
    again = report()
    again.resume()
    again.add([Masked("a", 3), Masked("b", 1)])
    assert {name: list(images) for name, images in again.names.items()} == {
        "a": ["1.jpg", "2.jpg", "3.jpg"],
        "b": ["1.jpg"],
    }
    assert len(path.read_text().splitlines()) == 4 and len(lines) == 2
    assert (
        again.describe("a") == "teachers.a: its features are not finite for 3 of 10 images so far (1.jpg, 2.jpg, 3.jpg)"
    )
    with pytest.raises(NumericError, match=r"teachers.b: .* 3 of 4 images .* continue with transfer.max_not_finite=1"):
        again.add([Masked("b", 2), Masked("b", 3)])
    again.restart()
    assert not path.exists() and not again.names

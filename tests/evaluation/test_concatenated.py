"""The features of all teachers side by side, as a model of an evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from shoulders.config.recipe import read_recipe
from shoulders.config.sections import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.evaluation.models import models_with_features
from shoulders.evaluation.teacher_heads import evaluate_heads
from shoulders.features import Batch, Features, FeaturesOf
from shoulders.images import evaluation_batches
from shoulders.inference import all_taps, concatenated_teachers, last_tap
from shoulders.tasks import TASKS
from shoulders.tasks.data.labelled import find_labelled
from shoulders.tasks.data.masks import find_masks
from shoulders.tasks.saved_probes import probe_names
from shoulders.tasks.vector_probes import evaluate_vectors, extract_vectors
from shoulders.teachers import Teacher, load_teacher
from tests.evaluation.test_evaluate import FEW_STEPS, evaluate_quickly, saved_rows, world  # noqa: F401
from tests.tiny import run_cli

SIZES = [(32, 32), (16, 48)]


class Pooled(nn.Module):
    """Mean colours on a grid, times ``scale``; with a summary, which is the first pixel of the image."""

    def __init__(self, grid: tuple[int, int], scale: float, summary: bool) -> None:
        super().__init__()
        self.grid, self.scale, self.summary = grid, scale, summary

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        maps = nn.functional.adaptive_avg_pool2d(pixels, self.grid) * self.scale
        return {"last": Features.from_map(maps, pixels[:, :2, 0, 0] if self.summary else None)}


def two_teachers() -> list[Teacher]:
    return [
        Teacher(Pooled((2, 2), 10.0, summary=True), size=SIZES[0], mean=(0, 0, 0), std=(1, 1, 1)),
        Teacher(Pooled((2, 6), 1.0, summary=False), size=SIZES[1], mean=(0, 0, 0), std=(1, 1, 1)),
    ]


def first_teacher() -> Teacher:
    return two_teachers()[0]


def second_teacher() -> Teacher:
    return two_teachers()[1]


def two_images() -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = {size: torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8) for size in SIZES}
    return Batch(torch.arange(2), pixels)


def test_vectors_are_side_by_side_each_of_the_input_of_its_teacher() -> None:
    batch = two_images()
    features = concatenated_teachers(two_teachers(), spatial=False)(batch)
    first = batch.pixels(SIZES[0])[:, :2, 0, 0]  # a summary
    second = batch.pixels(SIZES[1]).unflatten(2, (2, 8)).unflatten(4, (6, 8)).mean((3, 5)).mean((2, 3))  # mean token
    assert features.spatial is None and features.summary is not None
    torch.testing.assert_close(features.summary, torch.cat([first, second], 1))


@pytest.mark.parametrize(("spatial", "widths"), [(False, (2, 3)), (True, ())])
def test_the_model_has_the_inputs_and_widths_of_its_teachers(spatial: bool, widths: tuple[int, ...]) -> None:
    names = ("first", "second", "first_again")
    specs = [TeacherSpec(module=f"{__name__}:{name}_teacher") for name in ("first", "second", "first")]
    chosen = dict(zip(names[: 2 + spatial], specs, strict=False))
    (model,) = models_with_features(Path(), [], {}, chosen, spatial, None)
    assert (model.name, model.sizes, model.widths) == ("concatenated", SIZES, widths)
    assert model.settings == {"teachers": ", ".join(chosen)}
    components = model.features_of(two_images()).components()
    assert {name: part.shape[-1] for name, part in components.items()} == (
        {"spatial": 9} if spatial else {"summary": 5}
    )


def test_spatial_features_are_side_by_side_on_the_finest_grid() -> None:
    batch = two_images()
    coarse = batch.pixels(SIZES[0]).unflatten(2, (2, 16)).unflatten(4, (2, 16)).mean((3, 5)) * 10  # (2, 3, 2, 2)
    fine = batch.pixels(SIZES[1]).unflatten(2, (2, 8)).unflatten(4, (6, 8)).mean((3, 5))  # (2, 3, 2, 6)
    left, right = coarse[..., :1], coarse[..., 1:]
    # bilinear, cells of a third: centres at -1/3, 0, 1/3, 2/3, 1, 4/3 of the way between the two tokens, clamped
    resized = torch.cat([left, left, left * 2 / 3 + right / 3, left / 3 + right * 2 / 3, right, right], 3)
    for order in (1, -1):
        features = concatenated_teachers(two_teachers()[::order], spatial=True)(batch)
        assert features.grid == (2, 6)
        torch.testing.assert_close(features.to_map(), torch.cat([resized, fine][::order], 1))


def teachers_of(run: Path) -> dict[str, Teacher]:
    return {name: load_teacher(name, spec) for name, spec in read_recipe(run / "recipe.yaml").teachers.items()}


def test_probes_on_vectors_are_those_of_the_concatenation(world: Path) -> None:  # noqa: F811
    run, data = world / "run", world / "labelled"
    models: list[str] = []
    rows = evaluate_quickly(run, "classification", data, ["concatenated", "segmenter"], on_model=models.append)
    assert models == ["segmenter", "concatenated"]
    assert saved_rows(run, "classification")[-len(rows) :] == rows
    teachers, splits = teachers_of(run), find_labelled(data)
    batches = {
        name: list(evaluation_batches(split.images, [(32, 32)], 64, split.indices))
        for name, split in (("train", splits.train), ("test", splits.test))
    }
    with torch.no_grad():
        expected = [
            extract_vectors(_beside(last_tap(teachers["classifier"]), last_tap(teachers["segmenter"])), part, (16, 16))
            for part in batches.values()
        ]
    values = {
        row["metric"]: row["value"] for row in evaluate_vectors(expected[0], None, expected[1], 2, 0, "classification")
    }
    mine = [row for row in rows if row["model"] == "concatenated"]
    assert {row["metric"]: row["value"] for row in mine} == values and len(values) > 3
    assert {row["settings"]["teachers"] for row in mine} == {"classifier, segmenter"}
    assert "teachers" not in rows[0]["settings"]


def _beside(one: FeaturesOf, other: FeaturesOf) -> FeaturesOf:
    """The summary of one model and the mean token of the other."""

    def features_of(batch: Batch) -> Features:
        summary, spatial = one(batch).summary, other(batch).spatial
        assert summary is not None and spatial is not None
        return Features(torch.cat([summary, spatial.mean(1)], 1), None)

    return features_of


def test_a_dense_probe_is_fitted_on_the_concatenation(world: Path) -> None:  # noqa: F811
    run, data = world / "run", world / "masks"
    rows = evaluate_quickly(run, "semantic", data, ["concatenated"])
    each = [all_taps(teacher) for teacher in teachers_of(run).values()]

    def features_of(batch: Batch) -> Features:  # both have the same grid
        return Features.from_map(torch.cat([one(batch).to_map() for one in each], 1))

    expected = TASKS["semantic"].fit_probe(features_of, find_masks(data), [(32, 32)], step_fraction=FEW_STEPS)
    values = {row["metric"]: row["value"] for row in expected}
    assert {row["metric"]: row["value"] for row in rows} == values and "mIoU" in values
    assert "concatenated/semantic" not in probe_names(run)


def test_a_teacher_without_spatial_features_is_left_out_where_they_are_needed(
    world: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copytree(world / "run", tmp_path, dirs_exist_ok=True)
    recipe = yaml.safe_load((world / "run/recipe.yaml").read_text())
    recipe["teachers"]["flat"] = {"module": "tests.evaluation.test_evaluate:summary_teacher"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.warns(UserWarning, match="concatenated: without flat, which has no spatial features"):
        rows = evaluate_quickly(tmp_path, "semantic", world / "masks", ["concatenated"])
    assert rows[0]["settings"]["teachers"] == "classifier, segmenter"
    rows = evaluate_quickly(tmp_path, "classification", world / "labelled", ["concatenated"])
    assert rows[0]["settings"]["teachers"] == "classifier, segmenter, flat"
    recipe["teachers"] = {"flat": recipe["teachers"]["flat"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(RecipeError, match="concatenated has no spatial features, which semantic needs"):
        evaluate_quickly(tmp_path, "semantic", world / "masks", ["concatenated"])


def test_it_is_refused_where_it_means_nothing(world: Path) -> None:  # noqa: F811
    run, data = world / "run", world / "labelled"
    with pytest.raises(RecipeError, match="--models: concatenated needs the teachers of a run"):
        evaluate_quickly(run / "student", "classification", data, ["concatenated"])
    with pytest.raises(RecipeError, match="--finetune: concatenated has no adapter"):
        evaluate_quickly(run, "classification", data, ["concatenated"], finetune="adapter")
    with pytest.raises(RecipeError, match="no concatenated in this run; choose from student, base, teachers, classif"):
        evaluate_heads(run, "classification", data, ["concatenated"])


def test_the_table_of_the_command_has_a_row_of_it(world: Path) -> None:  # noqa: F811
    options = ["--models", "base,teachers,concatenated", "--workers", 0]
    done = run_cli("evaluate", world / "run", "--task", "classification", "--data", world / "labelled", *options)
    models = [line.split()[0] for line in done.stdout.splitlines()[3:]]
    assert models == ["base", "classifier", "segmenter", "concatenated"], done.stderr

"""Heads of teachers given as ``module:`` or from Python: kept by the name of their class, and their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import shoulders
from shoulders.config.sections import TeacherSpec
from shoulders.distillation import distill
from shoulders.errors import DataError, RecipeError
from shoulders.evaluation.teacher_heads import evaluate_heads
from shoulders.feature_cache import build_cache
from shoulders.prediction import predict
from shoulders.report import write_report
from shoulders.tasks import task_of_head
from shoulders.teachers import TaskHead, load_teacher
from shoulders.teachers.heads import load_head, taps_of_teacher
from shoulders.teachers.heads.post_process import post_process
from shoulders.teachers.heads.saved import open_head, save_head
from tests.tasks.scenes import save_masks, save_objects
from tests.teachers.heads import own_heads
from tests.teachers.heads.own_heads import Classifier, Finder, Segmenter, own_teacher
from tests.tiny import run_cli, same_tensors, save_base, save_images, student_weights, tiny_recipe

NAMES = {"classifier": "classification", "segmenter": "semantic", "detector": "detection", "instances": "instance"}
SIZES = [(48, 64), (20, 30)]


def spec_of(name: str, **more: Any) -> TeacherSpec:
    return TeacherSpec(module=f"tests.teachers.heads.own_heads:{name}", **more)


def recipe_of(root: Path, out: str, **changes: Any) -> Any:
    changes = {"teachers": {name: spec_of(name).model_dump() for name in NAMES}, "keep_heads": list(NAMES)} | changes
    settings = {"student__adapter__width": 4, "images__holdout": 8, "train__steps": 2, "train__save_every": 1}
    return tiny_recipe(root, out, **settings, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    save_base(root / "base")
    save_images(root / "images", 24)
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    distill(recipe_of(root, "run"))
    return root / "run"


def random_images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def equal(one: Any, other: Any) -> bool:
    """Whether predictions are the same, masks included."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", NAMES)
def test_the_student_keeps_the_head_of_its_teacher(run: Path, name: str) -> None:
    student, teacher = shoulders.load(run), load_teacher(name, spec_of(name))
    assert teacher.head is not None
    kept = student.head(name)
    assert task_of_head(kept) == NAMES[name] and kept.classes == teacher.head.classes
    assert same_tensors(dict(kept.state_dict()), {f"head.{key}": x for key, x in teacher.head.state_dict().items()})
    features = teacher(random_images())
    if name != "classifier":
        assert equal(kept(features), teacher.head(features))
    predicted = taps_of_teacher(name, student.predict_teacher_features(random_images()))
    expected = post_process(kept, kept(predicted), SIZES, 0.0)
    assert equal(student.predict(name, random_images(), SIZES, 0.0), expected)


def test_predictions_have_the_form_of_their_task(run: Path) -> None:
    student = shoulders.load(run)
    image = torch.full((1, 3, 32, 32), 0.4)
    image[:, :, 8:16, 4:20] = torch.tensor([0.9, 0.15, 0.15])[:, None, None]
    teachers = {name: load_teacher(name, spec_of(name)) for name in NAMES}
    outputs = {
        name: post_process(student.head(name), student.head(name)(teacher(image)), [(64, 64)])[0]
        for name, teacher in teachers.items()
    }
    assert [list(one) for one in outputs["classifier"]] == [["label", "score"]] * 3
    assert outputs["classifier"][0]["label"] == "class0" and sum(one["score"] for one in outputs["classifier"]) > 1.2
    assert [one["label"] for one in outputs["segmenter"]] == ["ground", "red"]
    (box,), (mask,) = outputs["detector"], outputs["instances"]
    assert (box["label"], round(box["score"], 3)) == ("red", 0.9)
    assert [round(side) for side in box["box"].values()] == pytest.approx([8, 16, 40, 32], abs=1)
    assert mask["mask"].shape == (64, 64) and torch.equal(mask["mask"], outputs["segmenter"][1]["mask"])
    head = student.head("detector")
    assert post_process(head, head(teachers["detector"](image)), [(64, 64)], threshold=0.95) == [[]]


def test_the_taps_of_a_kept_head_have_the_teachers_grid(run: Path, root: Path) -> None:
    grids = {tap: one.grid for tap, one in shoulders.load(run).predict_teacher_features(random_images()).items()}
    assert grids["segmenter/map"] == (16, 16)  # that of the student is 4 x 4
    changes = {"teachers": {"segmenter": spec_of("segmenter", match_grid=["map"]).model_dump()}}
    distill(recipe_of(root, "matched", keep_heads=[], **changes))
    student = shoulders.load(root / "matched")
    assert student.predict_teacher_features(random_images())["segmenter/map"].grid == (16, 16)
    assert not student.heads


def test_heads_are_evaluated_on_teacher_and_student(run: Path, tmp_path: Path) -> None:
    save_masks(tmp_path / "masks")
    save_objects(tmp_path / "objects")
    save_images(tmp_path / "labels", 12, classes=3)
    data = {"classification": "labels", "semantic": "masks", "detection": "objects", "instance": "objects"}
    values: dict[tuple[str, str], float] = {}
    for name, task in NAMES.items():
        rows = evaluate_heads(run, task, tmp_path / data[task], ["student", name], workers=0)
        assert {row["model"] for row in rows if row["head"] == name} == {"student", name}
        values |= {(name, row["metric"]): row["value"] for row in rows if row["model"] == name}
    assert values["classifier", "top1"] == 1
    assert values["segmenter", "mIoU"] > 0.8
    assert values["detector", "AP50"] > 0.4 and values["instances", "mask_AP50"] > 0.4


def test_predict_and_report_use_the_heads(run: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "photos", 2)
    predictions = predict(run, tmp_path / "photos", out=tmp_path / "out")
    assert {tuple(of_image) for of_image in predictions.values()} == {tuple(sorted(NAMES))}
    done = run_cli("predict", run, tmp_path / "photos", "--head", "segmenter", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    page = write_report(run).read_text()
    assert "could not" not in page
    assert all(f"with the head of {name}" in page for name in NAMES)


def test_a_resumed_run_and_a_cached_one_keep_the_same_heads(run: Path, root: Path) -> None:
    shutil.copytree(run, root / "resumed", ignore=shutil.ignore_patterns("student", "results.json", "summary.json"))
    shutil.rmtree(root / "resumed" / "checkpoints" / "step-00000002")
    distill(recipe_of(root, "resumed"), resume=True)
    changes = {"cache": {"path": str(root / "cache"), "mode": "require", "dtype": "float32"}, "images__views": 1}
    build_cache(recipe_of(root, "cached", **changes))
    distill(recipe_of(root, "cached", **changes))
    expected = shoulders.load(run)
    for out in ("resumed", "cached"):
        student = shoulders.load(root / out)
        assert list(student.heads) == sorted(NAMES)
        for name in NAMES:
            assert same_tensors(dict(student.head(name).state_dict()), dict(expected.head(name).state_dict()))
    assert same_tensors(student_weights(root / "resumed"), student_weights(run))


def test_a_teacher_from_python_keeps_its_head(root: Path) -> None:
    extra = {"mine": own_heads.segmenter()}
    recipe = recipe_of(root, "python", teachers={}, keep_heads=["mine"])
    distill(recipe, extra_teachers=extra)
    student = shoulders.load(root / "python")
    assert list(student.heads) == ["mine"]
    assert student.predict_teacher_features(random_images())["mine/map"].grid == (16, 16)
    assert {one["label"] for one in student.predict("mine", random_images())[0]} <= {"ground", "red", "blue"}
    save_masks(root / "masks")
    (row, *_) = evaluate_heads(root / "python", "semantic", root / "masks", workers=0)
    assert (row["model"], row["head"]) == ("student", "mine")
    assert "with the head of mine" in write_report(root / "python").read_text()
    shutil.rmtree(root / "python" / "student")
    distill(recipe, extra_teachers=extra, resume=True)
    assert list(shoulders.load(root / "python").heads) == ["mine"]
    changes = {"cache": {"path": str(root / "extra_cache"), "mode": "require"}, "images__views": 1}
    cached = recipe_of(root, "python_cached", teachers={}, keep_heads=["mine"], **changes)
    build_cache(cached, extra_teachers=extra)
    distill(cached, extra_teachers=extra)
    assert list(shoulders.load(root / "python_cached").heads) == ["mine"]


def test_a_kept_head_of_no_teacher_from_python_is_refused(root: Path) -> None:
    extra = {"mine": own_heads.segmenter()}
    with pytest.raises(RecipeError, match="keep_heads: mine not among teachers: other"):
        distill(recipe_of(root, "no", teachers={}, keep_heads=["mine"]), extra_teachers={"other": extra["mine"]})
    with pytest.raises(RecipeError, match="teachers.mine.*carries no head"):
        headless = {"mine": own_heads.without_head()}
        distill(recipe_of(root, "no", teachers={}, keep_heads=["mine"]), extra_teachers=headless)


class Unstable(Segmenter):
    """Its classes depend on more than its arguments and weights."""

    shift = 0

    def post_process(self, outputs: dict[str, Tensor], sizes: Any, threshold: float) -> list[Tensor]:
        return [(image + self.shift) % 3 for image in super().post_process(outputs, sizes, threshold)]


class Mixing(Segmenter):
    """An image's outputs depend on the other images."""

    def forward(self, taps: Any) -> dict[str, Tensor]:
        logits = super().forward(taps)["logits"]
        return {"logits": logits - logits.mean((0, 2, 3), keepdim=True)}


class Failing(Segmenter):
    """It does not return tensors by name."""

    def forward(self, taps: Any) -> Any:
        return super().forward(taps)["logits"]


def shifted() -> TaskHead:
    head = Unstable(["a", "b", "c"])
    head.shift = 1
    return head


def third_class() -> TaskHead:
    head = Segmenter(["a", "b"])
    torch.nn.init.constant_(head.conv.weight, 0)
    torch.nn.init.constant_(head.conv.bias[2:], 1)  # type: ignore[index]
    return head


def local() -> TaskHead:
    class Local(Segmenter):
        pass

    return Local(["a", "b", "c"])


def with_args(head: TaskHead, args: dict[str, Any]) -> TaskHead:
    head.args = args
    return head


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: None, "carries no head that can be kept; give Teacher"),
        (shifted, "gives other predictions; put all that they depend on into args"),
        (local, "cannot be imported .*define it at the top level of a module"),
        (
            lambda: with_args(Segmenter(["a", "b", "c"]), {"classes": ("a", "b")}),
            "args of Segmenter must be plain JSON",
        ),
        (lambda: with_args(Segmenter(["a", "b", "c"]), {"classes": {1, 2}}), "args of Segmenter must be plain JSON"),
        (lambda: with_args(Segmenter(["a", "b", "c"]), {}), "fails: TypeError: .*missing 1 required"),
        (lambda: with_args(Segmenter(["a", "b", "c"]), {"classes": ["a"]}), "gives other predictions|must return"),
        (lambda: with_args(Classifier(["a", "b", "c"]), {"classes": ["a"]}), "has other weights: .*size mismatch"),
        (lambda: Mixing(["a", "b", "c"]), "an image gets other predictions beside other images"),
        (lambda: Failing(["a", "b", "c"]), r"must return \{name: tensor\} with B = 2 first"),
        (third_class, "post_process: must return a list of B tensors .* for semantic"),
    ],
)
def test_a_head_that_cannot_be_built_again_is_refused(build: Callable[[], TaskHead | None], reason: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(RecipeError, match=rf"^teachers\.t: .*{reason}"):
        load_head("t", None, own_teacher(build()))


def test_taps_that_the_head_takes_must_be_chosen() -> None:
    enough = spec_of("segmenter", taps=["map"])
    assert list(load_head("t", enough, load_teacher("t", enough)).taps) == ["map"]
    spec = spec_of("segmenter", taps=["mean"])
    with pytest.raises(RecipeError, match=r"^teachers\.t\.taps: the head also takes map"):
        load_head("t", spec, load_teacher("t", spec))
    with pytest.raises(RecipeError, match=r"^teachers\.t\.classes: a head of your own has its classes"):
        load_head("t", spec_of("segmenter", classes=["a"]), own_heads.segmenter())
    with pytest.raises(RecipeError, match="head: must be a shoulders.TaskHead, got Conv2d"):
        own_teacher(torch.nn.Conv2d(3, 3, 1))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="task 'depth' is not one of classification, semantic, detection, instance"):
        Finder("depth")


OBJECTS = {"scores": torch.ones(2), "labels": torch.tensor([0, 1]), "boxes": torch.ones(2, 4)}
MASKS = {"scores": torch.ones(1), "labels": torch.tensor([1]), "masks": torch.ones(1, 48, 64) > 0}


@pytest.mark.parametrize(
    ("task", "valid", "wrong"),
    [
        (
            "classification",
            torch.rand(1, 2),
            [
                torch.rand(2, 2),
                torch.rand(1, 3),
                torch.rand(1, 2) + 1,
                torch.rand(1, 2) - 1,
                torch.full((1, 2), torch.nan),
            ],
        ),
        (
            "semantic",
            [torch.ones(48, 64).long()],
            [
                [],
                [torch.ones(64, 48).long()],
                [torch.ones(48, 64)],
                [torch.full((48, 64), 2)],
                [torch.full((48, 64), -1)],
            ],
        ),
        (
            "detection",
            [OBJECTS],
            [
                [],
                OBJECTS,
                [OBJECTS | {"boxes": torch.ones(1, 4)}],
                [OBJECTS | {"labels": torch.tensor([0, 2])}],
                [OBJECTS | {"labels": torch.ones(2)}],
                [OBJECTS | {"scores": torch.tensor([1, torch.nan])}],
                [{"scores": torch.ones(2), "labels": torch.tensor([0, 1])}],
            ],
        ),
        (
            "instance",
            [MASKS],
            [[MASKS | {"masks": torch.ones(1, 48, 64)}], [MASKS | {"masks": torch.ones(1, 32, 32) > 0}], [OBJECTS]],
        ),
    ],
)
def test_predictions_of_another_form_are_refused(task: str, valid: Any, wrong: list[Any]) -> None:
    class Given(TaskHead):
        def forward(self, taps: Any) -> dict[str, Tensor]:
            return {}

        def post_process(self, outputs: Any, sizes: Any, threshold: float) -> Any:
            return outputs["predictions"]

    head = Given(task, ["a", "b"])
    assert head.predict({"predictions": valid}, [(48, 64)], 0.5) is valid
    for predictions in wrong:
        with pytest.raises(RecipeError, match=rf"Given\.post_process: must return .* for {task}"):
            head.predict({"predictions": predictions}, [(48, 64)], 0.5)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A folder as that of a student with a kept head, without the student."""
    folder = tmp_path / "student"
    save_head(load_head("mine", None, own_heads.segmenter()), folder / "heads" / "mine")
    return folder


def set_code(student: Path, code: str) -> Path:
    head = student / "heads" / "mine"
    file = head / "head.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code": code}))
    return head


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "nowhere:Head",
            "its code 'nowhere:Head' cannot be used: no Python module 'nowhere' .*; run the command in the",
        ),
        ("tests.teachers.heads.own_heads:Nobody", "has no function 'Nobody'"),
        ("torch.nn:Linear", "torch.nn:Linear is no subclass of shoulders.TaskHead"),
        ("torch:save", "torch:save is no subclass of shoulders.TaskHead"),
        ("os:system", "os is a module of Python itself"),
        ("os.system", "must be written package.module:function"),
    ],
)
def test_a_head_whose_code_is_missing_is_refused(student: Path, code: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"heads/mine: .*{reason}"):
        open_head(set_code(student, code))


@pytest.mark.parametrize("place", ["student", "run"])
def test_code_that_comes_with_a_student_never_runs(
    student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    folder = {"student": student, "run": student.parent}[place]
    monkeypatch.chdir(folder)
    (folder / f"evil_{place}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Head: pass\n")
    with pytest.raises(DataError, match="code that comes with a student is not run"):
        open_head(set_code(student, f"evil_{place}:Head"))
    assert not (tmp_path / "ran").exists()


def test_a_kept_head_without_its_weights_is_refused(student: Path) -> None:
    head = student / "heads" / "mine"
    assert open_head(head).classes == ["ground", "red", "blue"]
    weights = load_file(head / "model.safetensors")
    save_file({"head.conv.bias": weights["head.conv.bias"]}, head / "model.safetensors")
    with pytest.raises(DataError, match=r"not a valid head: the weights lack head\.conv\.weight"):
        open_head(head)
    save_file(weights | {"head.scale": torch.ones(1)}, head / "model.safetensors")
    with pytest.raises(DataError, match=r"not a valid head: the weights have head\.scale, which the head does not"):
        open_head(head)

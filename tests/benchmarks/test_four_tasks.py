"""The benchmark of the four tasks: its rows, its tables, and that an interrupted run is resumed."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoulders.features import Batch, Features
from shoulders.tasks import TASKS

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "four_tasks"
SCRIPTS = [path.stem for path in FOLDER.glob("*.py")]


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import each other; their names are common, so they are removed from the modules afterwards."""
    before = {name: sys.modules.pop(name) for name in SCRIPTS if name in sys.modules}
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def script(name: str) -> Any:
    return importlib.import_module(name)


def row(dataset: str, kind: str, metric: str, value: float, **more: Any) -> dict[str, Any]:
    return {"dataset": dataset, "kind": kind, "metric": metric, "value": value, "seed": 0, **more}


def test_every_setting_has_one_job_for_each_task_and_metrics_for_every_kind() -> None:
    jobs = script("jobs")
    for setting in jobs.SETTINGS.values():
        assert [job.task for job in setting.jobs] == list(TASKS)
        assert setting.recipe.is_file()
        for job in setting.jobs:
            for kind in jobs.KINDS:
                assert any(jobs.name_in_rows(metric, kind) for metric in job.metrics.values()), (job.task, kind)


def test_both_recipes_are_valid_and_keep_the_heads_of_the_jobs() -> None:
    from shoulders.config.recipe import read_recipe

    for setting in script("jobs").SETTINGS.values():
        recipe = read_recipe(setting.recipe, setting.overrides(Path("data")))
        assert {job.teacher for job in setting.jobs} == set(recipe.keep_heads) == set(recipe.teachers)
        assert set(setting.sources) in (set(), set(recipe.images.all_sources()))


def test_rows_have_the_metrics_and_intervals_of_the_task() -> None:
    job = next(job for job in script("jobs").SETTINGS["real"].jobs if job.task == "instance")
    scores = [
        {"metric": name, "value": value, "n": 50, "seconds": 1.5, "settings": {}}
        for name, value in (
            ("mask_AP", 0.5),
            ("mask_AP50", 0.9),
            ("mask_AP_low", 0.4),
            ("mask_AP_high", 0.6),
            ("AP", 0.7),
        )
    ]
    make_rows = script("measure").make_rows
    masks, boxes = make_rows(job, "teacher", scores, None)
    assert masks == {
        "dataset": "pennfudan",
        "task": "instance",
        "kind": "teacher",
        "metric": "mask_AP",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "seed": None,
        "probe_seed": None,
        "n": 50,
        "seconds": 1.5,
    }
    assert (boxes["metric"], boxes["value"]) == ("box_AP", 0.7) and "low" not in boxes
    probe = {row["metric"]: row["value"] for row in make_rows(job, "student_probe", scores, 0, 2)}
    assert probe == {"mask_AP": 0.5, "box_AP": 0.7}


def test_the_table_has_intervals_deviations_and_retention_but_none_of_weak_teachers() -> None:
    rows = [
        row("bccd", "teacher", "box_AP", 0.6, low=0.55, high=0.65),
        row("bccd", "teacher_head", "box_AP", 0.3, low=0.2, high=0.5),
        row("bccd", "teacher_head", "box_AP", 0.4, low=0.3, high=0.6) | {"seed": 1},
        *(row("bccd", "student_probe", "box_AP", value, probe_seed=seed) for seed, value in enumerate((0.4, 0.5, 0.6))),
        row("pennfudan", "teacher", "mask_AP", 0.2),
        row("pennfudan", "teacher_head", "mask_AP", 0.19),
        row("cifar10", "teacher", "top1", 1.0),
        row("cifar10", "student_probe", "knn_top1", 0.7),
    ]
    lines = script("tables").table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2:] == [
        "| cifar10 | classification (top-1) | 1.000 | - | - | - | - | - |",
        "| cifar10 | classification (k-NN top-1) | - | - | - | .700 | - | - |",
        "| bccd | detection (box AP) | .600 (.550 to .650) | .350 ± .071 (.250 to .550) | 0.58 | .500 ± .100 | - | - |",
        "| pennfudan | instance (mask AP) | .200 | .190 | - (teacher AP < .25) | - | - | - |",
    ]


def test_fresh_scenes_are_compared_with_those_of_the_main_table() -> None:
    fresh = [row("world/neon", "teacher", "box_AP", 0.8), row("world/neon", "teacher_head", "box_AP", 0.6)]
    known = [row("world/neon", "teacher", "box_AP", 0.9), row("world/neon", "teacher_head", "box_AP", 0.72)]
    lines = script("fresh").table(fresh, known).splitlines()
    assert lines[2:] == ["| world/neon (box AP) | .800 | .600 | 0.750 | 0.800 |"]


def test_a_table_is_written_between_its_markers(tmp_path: Path) -> None:
    insert, page = script("tables").insert, tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- some: written by its script -->\nold\n<!-- end of some -->\n\nrest\n")
    insert("some", "| new |\n", page)
    text = page.read_text()
    assert "| new |" in text and "old" not in text
    assert text.startswith("# Title\n") and text.endswith("\n\nrest\n")
    insert("some", "| new |\n", page)
    assert page.read_text() == text
    with pytest.raises(SystemExit, match="does not have the markers"):
        insert("other", "", page)


def test_published_rows_replace_those_of_the_same_data_sets(tmp_path: Path) -> None:
    row_file = script("row_file")
    path = tmp_path / "results.json"
    row_file.publish([row("a", "teacher", "top1", 0.1), row("b", "teacher", "top1", 0.2)], path)
    rows = row_file.publish([row("b", "teacher", "top1", 0.3)], path)
    assert rows == json.loads(path.read_text())
    assert [(each["dataset"], each["value"]) for each in rows] == [("a", 0.1), ("b", 0.3)]


def test_two_processes_can_add_to_one_file(tmp_path: Path) -> None:
    RowFile = script("row_file").RowFile
    one, other = RowFile(tmp_path / "results.json"), RowFile(tmp_path / "results.json")
    one.add([row("a", "teacher", "top1", 0.1)])
    other.add([row("b", "teacher", "top1", 0.2)])
    assert [each["dataset"] for each in RowFile(tmp_path / "results.json").rows] == ["a", "b"]
    assert other.has(dataset="a", kind="teacher") and not one.has(dataset="b")


class FakeMeasurements:
    """Replaces all slow measurements, records the calls, and is interrupted at one of them."""

    def __init__(self, interrupt_at: int | None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.interrupt_at = interrupt_at

    def rows(self, job: Any, kind: str, *seeds: Any) -> list[dict[str, Any]]:
        self.calls.append((job.dataset, kind, *seeds))
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        return [
            row(job.dataset, kind, metric, 0.5) | {"seed": seeds[0], "probe_seed": (*seeds, None)[1]}
            for metric in job.metrics
        ]


def run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt_at: int | None) -> list[tuple[Any, ...]]:
    run, measure, row_file, jobs = (script(name) for name in ("run", "measure", "row_file", "jobs"))
    fake = FakeMeasurements(interrupt_at)
    monkeypatch.setattr(measure, "evaluate_teacher", lambda job, *rest: fake.rows(job, "teacher", None))
    monkeypatch.setattr(
        measure, "evaluate_teacher_head", lambda job, run, labels, seed: fake.rows(job, "teacher_head", seed)
    )
    monkeypatch.setattr(measure, "evaluate_from_scratch", lambda job, *rest: fake.rows(job, "scratch", 0))
    monkeypatch.setattr(measure, "distill_setting", lambda setting, work, *rest: work)
    monkeypatch.setattr(run, "draw_sheets", lambda *rest: None)

    def evaluate_probes(job: Any, folder: Path, labels: Path, kind: str, seed: int, seeds: list[int]) -> Iterator[Any]:
        for probe_seed in seeds:
            yield fake.rows(job, kind, seed, probe_seed)

    monkeypatch.setattr(measure, "evaluate_probes", evaluate_probes)
    args = Namespace(
        work=tmp_path,
        data=tmp_path,
        seeds=[0, 1],
        probe_seeds=[0, 1, 2],
        kinds=list(jobs.KINDS),
        scratch_steps=None,
        overrides=[],
        doc=tmp_path / "page.md",
    )
    try:
        run.run_setting(jobs.SETTINGS["real"], row_file.RowFile(tmp_path / "results.json"), args)
    except KeyboardInterrupt:
        pass
    return fake.calls


def test_an_interrupted_benchmark_is_resumed_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4 teachers, 4 heads on 2 students, 4 probes on student and base with 3 seeds, 4 from scratch
    complete = run_once(tmp_path / "complete", monkeypatch, None)
    assert len(complete) == len(set(complete)) == 4 + 8 + 24 + 4
    first = run_once(tmp_path / "interrupted", monkeypatch, 18)
    rest = run_once(tmp_path / "interrupted", monkeypatch, None)
    assert first[:-1] + rest == complete
    assert run_once(tmp_path / "interrupted", monkeypatch, None) == []
    stored = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("complete", "interrupted")]
    assert stored[0] == stored[1]


def test_features_are_computed_once_for_all_probe_seeds() -> None:
    calls: list[int] = []

    def features_of(batch: Batch) -> Features:
        calls.append(len(batch))
        return Features.from_map(batch.pixels((4, 4)), batch.pixels((4, 4)).mean((2, 3)))

    pixels = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
    batch, other = Batch(torch.tensor([5, 7]), {(4, 4): pixels}), Batch(torch.tensor([8, 7]), {(4, 4): pixels})
    cached = script("measure").cache_features(features_of, summaries_only=True)
    torch.testing.assert_close(cached(batch).summary, features_of(batch).summary)
    cached(batch)
    assert calls == [2, 2] and cached(batch).spatial is None  # spatial features would not fit into memory
    cached(other)
    assert calls == [2, 2, 2]


def test_input_sizes_are_multiples_of_the_patch_size() -> None:
    student = Namespace(encoder=Namespace(patch_size=14), config=Namespace(image_size=[98, 140]))
    assert script("sizes").sizes_of(student) == {
        0.5: (56, 70),
        0.75: (70, 112),
        1.0: (98, 140),
        1.5: (140, 210),
        2.0: (196, 280),
    }
    rows = [row("bccd", "teacher_head", "box_AP", value, factor=factor) for factor, value in ((0.5, 0.1), (2.0, 0.3))]
    line = "| bccd (box AP) | teacher head | .100 | - | - | - | .300 |"
    assert script("sizes").table(rows).splitlines()[2:] == [line]


def test_the_table_of_serving_has_median_range_and_speed_up() -> None:
    serving = script("serving")
    rows: list[dict[str, Any]] = [
        {"dataset": "world", "side": side, "batch": batch, "round": at, "images_per_s": speed, "cpu_ms": 1000 / speed}
        for side in serving.SIDES
        for batch in serving.BATCHES
        for at, speed in enumerate((10.0, 12.0, 11.0) if side == serving.TEACHERS else (30.0, 36.0, 33.0))
    ]
    rows += [
        {"dataset": "world", "side": side, "batch": batch, "peak_mib": 500.0, "before_mib": 300.0}
        for side in serving.SIDES
        for batch in serving.BATCHES
    ]
    lines = serving.table(rows).splitlines()
    assert len(lines) == 2 + len(serving.SIDES) * len(serving.BATCHES)
    assert "| 11.0 (10.0 to 12.0) |" in lines[2] and "| 1.00x | 500 | 200 |" in lines[2]
    assert "| 33.0 (30.0 to 36.0) |" in lines[3] and "| 3.00x |" in lines[3]


def test_ablations_have_the_retention_of_each_variant() -> None:
    rows = [
        row("camvid", "teacher", "mIoU", 0.5),
        row("camvid", "teacher_head", "mIoU", 0.4, variant="teacher's grid"),
        row("camvid", "teacher_head", "mIoU", 0.3, variant="student's grid"),
    ]
    variants = ["teacher's grid", "student's grid", "not measured"]
    lines = script("ablations").table(variants, rows).splitlines()
    assert lines[2:] == ["| camvid (mIoU) | .500 | .400 (0.80) | .300 (0.60) | - |"]


def box(left: float, label: str = "a", score: float | None = 0.9) -> dict[str, Any]:
    corners = dict(zip(("xmin", "ymin", "xmax", "ymax"), (left, 4.0, left + 20, 30.0), strict=True))
    return {"label": label, "score": score, "box": corners}


def masked(label: str, score: float | None) -> dict[str, Any]:
    return {"label": label, "score": score, "mask": torch.ones(40, 60, dtype=torch.bool).tril()}


@pytest.mark.parametrize(
    ("task", "prediction", "labels"),
    [
        ("classification", [{"label": "a", "score": 0.8}], [{"label": "b", "score": None}]),
        ("detection", [box(2), box(30, "b")], [box(2, score=None)]),
        ("semantic", [masked("a", None)], [masked("b", None)]),
        ("instance", [masked("a", 0.7)], [masked("a", 1.0)]),
        ("instance", [], []),
    ],
)
def test_sheets_show_the_predictions(task: str, prediction: list[Any], labels: list[Any]) -> None:
    sheets, jobs = script("side_by_side"), script("jobs")
    job = next(job for job in jobs.SETTINGS["real"].jobs if job.task == task)
    image = torch.full((3, 40, 60), 200, dtype=torch.uint8)
    drawn = sheets.draw_sheet(job, "title", ["a", "b"], [(image, prediction, prediction[:1], labels)] * 3)
    columns = 3 if task == "classification" else 4
    assert drawn.width == 2 * (columns * (sheets.SMALL_CELL + sheets.GAP) - sheets.GAP) + 3 * sheets.MARGIN
    cells = [
        np.asarray(drawn)[sheets.TITLE + sheets.HEADING + 40, at * (sheets.SMALL_CELL + sheets.GAP) + 60]
        for at in range(2)
    ]
    assert (cells[0] == 200).all()
    assert bool(prediction) == (np.asarray(drawn.crop((214, 68, 406, 196))) != 200).any()


def test_objects_of_one_class_have_different_colours() -> None:
    sheets = script("side_by_side")
    named, colours = sheets.colour_objects([masked("pedestrian", 0.5), masked("pedestrian", 0.6)])
    assert [item["label"] for item in named] == ["0", "1"] and colours["0"] != colours["1"]

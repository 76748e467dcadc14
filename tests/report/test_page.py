"""The page of a run: complete, self-contained, safe, and written whatever a run lacks."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from shoulders.config.recipe import Recipe
from shoulders.errors import DataError, RecipeError
from shoulders.images import open_images, open_source
from shoulders.report import write_report
from shoulders.report.choose import choose_images
from shoulders.report.headline import headline
from shoulders.report.record import read_run
from shoulders.report.results import table_lines
from tests.tiny import save_images

SECTIONS = ["results", "heads", "features", "training", "balance", "run"]
VOID_TAGS = ("meta", "img", "br")


class Page(HTMLParser):
    """The elements and the text of a page; every element must be closed in order."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.source = file.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, class_: str = "") -> list[dict[str, str]]:
        named = [attrs for name, attrs in self.elements if name == tag]
        return [attrs for attrs in named if not class_ or class_ in attrs.get("class", "").split()]


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run))


def copy_run(run: Path, tmp_path: Path, *names: str) -> Path:
    """A run folder with some of the files of a run."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in names:
        if (run / name).is_dir():
            (folder / name).symlink_to(run / name)
        else:
            shutil.copy(run / name, folder / name)
    return folder


def test_the_page_is_complete(run: Path, page: Page) -> None:
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    assert "Three teachers, one student" in page.text
    for value in ("0.800", "0.600", "75 %", "0.700", "0.450"):  # teacher, head, retention, the two probes
        assert value in page.text
    # training loss, loss and fvu of all teachers, fvu of each of three teachers and of the base, and the spread
    assert len([svg for svg in page.all("svg") if "aria-label" in svg and "bars" not in svg.get("class", "")]) == 8
    assert len(page.all("div", "column")) == 3 + 2 * 3
    assert len(page.all("div", "sides")) == 6  # two images for each of three heads
    teacher_heads = re.findall(r'alt="[^"]*: the teacher with the head of (\w+)', page.source)
    assert sorted(teacher_heads) == ["resnet", "resnet", "rt_detr_v2", "rt_detr_v2", "segformer", "segformer"]
    for fact in ("transformers", "torch", "thread", "GiB", "images per second"):
        assert fact in page.text
    assert page.text.count("unknown") >= 3  # the licenses of random weights
    assert (run / "recipe.yaml").read_text() in page.text


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for _, attrs in page.elements:
        assert attrs.get("href", "#").startswith("#")
        assert attrs.get("src", "data:image/").startswith("data:image/")
        assert not any(key.startswith("on") for key in attrs)
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert "default-src 'none'" in page.source
    assert len(page.source) < 3e6


def test_the_page_is_accessible(page: Page) -> None:
    assert page.source.startswith("<!doctype html>\n<html lang=")
    images = page.all("img")
    assert images and all(attrs["alt"] and int(attrs["width"]) and int(attrs["height"]) for attrs in images)
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert all(attrs.get("aria-label") for attrs in page.all("svg") if attrs.get("role") == "img")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for attrs in page.all("a")} <= set(ids)


def test_pictures_have_their_declared_size(page: Page) -> None:
    for attrs in page.all("img"):
        data = base64.b64decode(attrs["src"].split(",", 1)[1])
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (int(attrs["width"]), int(attrs["height"])) and max(image.size) <= 480


def test_the_same_run_gives_the_same_page(run: Path, page: Page, tmp_path: Path) -> None:
    again = write_report(run, out=tmp_path / "again.html")
    assert again == tmp_path / "again.html" and again.read_text() == page.source


def test_text_of_users_is_escaped(run: Path, tmp_path: Path) -> None:
    evil = "</pre></style><script>alert(1)</script>\"'&"
    folder = copy_run(run, tmp_path, "metrics.jsonl")
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["student"]["base"] = evil
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    teachers = {evil: {"source": evil, "revision": evil, "license": evil}}
    (folder / "student").mkdir()
    (folder / "student" / "config.json").write_text(json.dumps({"teachers": teachers}))
    row = {"model": evil, "head": evil, "task": "detection", "data": f"/x/{evil}", "metric": "AP", "value": 0.5}
    folder = folder.rename(tmp_path / "a<b>&'\"")
    for rows in ([row], [{**row, "metric": f"AP{evil}"}], []):
        page = Page(write_report(folder, rows=rows))
        assert not page.all("script")
        assert evil in page.text and "a<b>&'\"" in page.text
        assert len(page.all("section")) == len(SECTIONS)


@pytest.mark.parametrize(
    ("files", "commands"),
    [
        (["recipe.yaml"], ["--task TASK --data PATH [--heads]", "distill", "--resume"]),
        (["recipe.yaml", "metrics.jsonl"], ["--task TASK --data PATH [--heads]", "--resume"]),
        (["recipe.yaml", "student"], ["--task TASK --data PATH [--heads]", "shoulders distill"]),
        (["recipe.yaml", "student", "results.json"], ["--models scratch", "shoulders distill"]),
    ],
)
def test_missing_parts_are_named_with_the_command_that_produces_them(
    run: Path, tmp_path: Path, files: list[str], commands: list[str]
) -> None:
    page = Page(write_report(copy_run(run, tmp_path, *files)))
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    assert page.all("p", "missing")
    for command in commands:
        assert command in page.text


def test_missing_teachers_and_images_are_named(run: Path, tmp_path: Path) -> None:
    folder = copy_run(run, tmp_path, "recipe.yaml", "metrics.jsonl", "results.json", "student")
    text = (folder / "recipe.yaml").read_text().replace(f"{run.parent}/", f"{run.parent}/moved/")
    (folder / "recipe.yaml").write_text(text)
    page = Page(write_report(folder))
    assert "The teacher segformer could not be loaded" in page.text
    assert "The images of the recipe could not be opened" in page.text
    assert not page.all("div", "column")
    # the images that this head was evaluated on still exist, and the student has the head
    assert len(page.all("div", "sides")) == 2 and "with the head of resnet" in page.source
    assert "the teacher with" not in page.source


def test_predictions_are_for_the_evaluated_images_or_for_those_of_the_caller(run: Path, tmp_path: Path) -> None:
    evaluated = set(re.findall(r'alt="([^"]*): the student with the head of resnet', write_report(run).read_text()))
    assert len(evaluated) == 2 and all(name.startswith("class") for name in evaluated)
    own = open_source(save_images(tmp_path / "own", 5))
    for images in (own, {"resnet": own}):
        text = write_report(run, images=images, out=tmp_path / "page.html").read_text()
        shown = re.findall(r'alt="([^"]*): the student with the head of (\w+)', text)
        assert {name for name, head in shown if head == "resnet"} <= {f"{i:04d}.jpg" for i in range(5)}


def test_sources_alternate(run: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    few = save_images(tmp_path / "few", 20)
    tree["images"] |= {"path": None, "sources": {"many": {"path": tree["images"]["path"]}, "few": {"path": str(few)}}}
    folder = copy_run(run, tmp_path, "student")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    record = read_run(folder)
    assert record.recipe is not None
    heldout = [name.split("/")[0] for name in heldout_names(record.recipe)]
    shown = [name.split("/")[0] for name, _ in choose_images(record, ["a", "b"], None).predictions["a"]]
    alternating = 2 * min(heldout.count("few"), 2)
    assert heldout.count("few") and shown[:alternating] == ["few", "many"] * (alternating // 2)


def heldout_names(recipe: Recipe) -> list[str]:
    """The names of the held-out images of a run."""
    images = open_images(recipe.images, recipe.train.seed)
    return [images.collection.name(index) for index in images.heldout.tolist()]


def test_rows_of_the_caller_replace_those_of_the_run(run: Path, tmp_path: Path) -> None:
    rows = [
        {"task": "semantic", "kind": kind, "metric": "mIoU", "value": value + seed / 100, "seed": seed}
        for kind, value in (("teacher", 0.9), ("teacher_head", 0.45), ("scratch", 0.2))
        for seed in (0, 1)
    ]
    page = Page(write_report(run, rows=rows, out=tmp_path / "page.html"))
    assert "from scratch" in page.text and "2 seeds" in page.text and "50 %" in page.text
    assert "0.800" not in page.text


def test_damaged_run_folders_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give the folder of a run"):
        write_report(tmp_path)
    folder = copy_run(run, tmp_path, "recipe.yaml")
    (folder / "results.json").write_text("[{")
    with pytest.raises(DataError, match="results.json: not JSON"):
        write_report(folder)
    (folder / "results.json").write_text("{}")
    with pytest.raises(DataError, match="holds a dict, not a list"):
        write_report(folder)
    (folder / "results.json").unlink()
    (folder / "recipe.yaml").write_text("a: [")
    with pytest.raises(DataError, match="not a recipe"):
        write_report(folder)
    (folder / "recipe.yaml").write_text("teachers: [a, b]")
    with pytest.raises(DataError, match="teachers is a list, not a section"):
        write_report(folder)


def test_a_log_may_have_an_incomplete_line_and_values_that_are_not_finite(run: Path, tmp_path: Path) -> None:
    folder = copy_run(run, tmp_path, "recipe.yaml")
    rows = [{"step": step, "kind": "train", "loss": value} for step, value in enumerate((1.0, float("nan"), 0.5))]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "kind": "tr')
    record = read_run(folder)
    assert record.curves("train") == {"loss": [(0, 1.0), (2, 0.5)]}
    assert "Training loss" in Page(write_report(folder)).text


def test_the_page_counts_what_was_not_finite(run: Path, page: Page, tmp_path: Path) -> None:
    folder = copy_run(run, tmp_path, "recipe.yaml")
    rows = [{"step": step, "kind": "train", "skipped_steps": step // 2} for step in range(5)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    masked = [{"teacher": "own", "name": f"{i}.jpg"} for i in range(4)] + [{"teacher": "other", "name": "<b>.jpg"}]
    (folder / "not_finite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in masked))
    text = Page(write_report(folder)).text
    assert "own: 4 images (0.jpg, 1.jpg, 2.jpg, ..); other: 1 image (<b>.jpg)" in text
    assert "2: their loss or gradients were not finite" in text
    assert "not finite" not in page.text


def test_a_run_records_its_environment(run: Path) -> None:
    record = read_run(run)
    assert record.environment["torch"] == torch.__version__
    assert record.environment["processes"] == 1 and record.environment["device"].startswith("c")
    memory = record.training_values("peak_gib")
    assert len(memory) == 4 and all(0.05 < value < 1000 for value in memory) and memory == sorted(memory)


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ({}, "built on base, without labels."),
        ({"a": 0.9, "b": 0.85, "c": 1.0}, "The student can replace its teachers: on its features, their heads keep 85"),
        (
            {"a": 0.1, "b": 0.0, "c": 0.4},
            "cannot replace its teachers yet: on its features, their heads keep only 0 to 40",
        ),
        ({"a": 0.1, "b": 0.9, "c": 0.4}, "without labels. On its features, the teachers’ heads keep 10 to 90 %"),
        ({"a": 0.9}, "without labels. On its features, the teachers’ heads measured so far keep 90 % of their scores."),
    ],
)
def test_the_headline_follows_the_retention(run: Path, scores: dict[str, float], sentence: str) -> None:
    rows = [
        {"task": "semantic", "kind": kind, "head": head, "metric": "mIoU", "value": value, "data": f"/{head}"}
        for head, retention in scores.items()
        for kind, value in (("teacher", 1.0), ("teacher_head", retention))
    ]
    record = read_run(run, rows)
    assert len(record.teachers) == 3
    text = re.sub("<[^>]*>", "", headline(record, table_lines(rows), {}))
    assert sentence in text


def test_the_headline_of_an_unfinished_run_has_its_step(run: Path, tmp_path: Path) -> None:
    record = read_run(copy_run(run, tmp_path, "recipe.yaml", "metrics.jsonl"))
    text = re.sub("<[^>]*>", "", headline(record, [], {}))
    assert "This run distils segformer, rt_detr_v2 and resnet into one encoder" in text and "It is at step 4." in text

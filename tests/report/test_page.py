"""The page of a run: whole, self-contained, safe, and there whatever of a run is missing."""

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
from shoulders.report.choose import choose
from shoulders.report.gather import read_run
from tests.tiny import save_images

SECTIONS = ["results", "heads", "features", "learning", "balance", "run"]
VOID = ("meta", "img", "br")


class Page(HTMLParser):
    """A page taken apart; every element must be closed in its turn."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.source = file.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str, class_: str = "") -> list[dict[str, str]]:
        named = [attrs for name, attrs in self.found if name == tag]
        return [attrs for attrs in named if not class_ or class_ in attrs.get("class", "").split()]


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run))


def copy(run: Path, tmp_path: Path, *parts: str) -> Path:
    """A run folder with some of what a run leaves."""
    there = tmp_path / "copied"
    there.mkdir()
    for part in parts:
        if (run / part).is_dir():
            (there / part).symlink_to(run / part)
        else:
            shutil.copy(run / part, there / part)
    return there


def test_everything_is_there(run: Path, page: Page) -> None:
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    assert "Three teachers, one student" in page.words
    for said in ("0.800", "0.600", "75 %", "0.700", "0.450"):  # teacher, head, retention, the two probes
        assert said in page.words
    # a training loss, losses and fvu by teacher, three teachers and the base one by one, and the spread
    assert len([svg for svg in page.all("svg") if "aria-label" in svg and "bars" not in svg.get("class", "")]) == 8
    assert len(page.all("div", "strip")) == 3 + 2 * 3
    assert len(page.all("div", "sides")) == 6  # two images for each of three heads
    by_teachers = re.findall(r'alt="[^"]*: the teacher with the head of (\w+)', page.source)
    assert sorted(by_teachers) == ["resnet", "resnet", "rt_detr_v2", "rt_detr_v2", "segformer", "segformer"]
    for noted in ("transformers", "torch", "thread", "GiB", "images a second"):
        assert noted in page.words
    assert page.words.count("unknown") >= 3  # the licenses of random weights
    assert (run / "recipe.yaml").read_text() in page.words


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for _, attrs in page.found:
        assert attrs.get("href", "#").startswith("#")
        assert attrs.get("src", "data:image/").startswith("data:image/")
        assert not any(key.startswith("on") for key in attrs)
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert "default-src 'none'" in page.source
    assert len(page.source) < 3e6


def test_it_can_be_read_by_those_who_cannot_see(page: Page) -> None:
    assert page.source.startswith("<!doctype html>\n<html lang=")
    images = page.all("img")
    assert images and all(attrs["alt"] and int(attrs["width"]) and int(attrs["height"]) for attrs in images)
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert all(attrs.get("aria-label") for attrs in page.all("svg") if attrs.get("role") == "img")
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for attrs in page.all("a")} <= set(ids)


def test_pictures_are_what_they_say(page: Page) -> None:
    for attrs in page.all("img"):
        data = base64.b64decode(attrs["src"].split(",", 1)[1])
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (int(attrs["width"]), int(attrs["height"])) and max(image.size) <= 480


def test_the_same_run_gives_the_same_page(run: Path, page: Page, tmp_path: Path) -> None:
    again = write_report(run, out=tmp_path / "again.html")
    assert again == tmp_path / "again.html" and again.read_text() == page.source


def test_what_users_write_is_text(run: Path, tmp_path: Path) -> None:
    evil = "</pre></style><script>alert(1)</script>\"'&"
    there = copy(run, tmp_path, "metrics.jsonl")
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["student"]["base"] = evil
    (there / "recipe.yaml").write_text(yaml.safe_dump(tree))
    facts = {evil: {"source": evil, "revision": evil, "license": evil}}
    (there / "student").mkdir()
    (there / "student" / "config.json").write_text(json.dumps({"teachers": facts}))
    row = {"model": evil, "head": evil, "task": "detection", "data": f"/x/{evil}", "metric": "AP", "value": 0.5}
    there = there.rename(tmp_path / "a<b>&'\"")
    for rows in ([row], [{**row, "metric": f"AP{evil}"}], []):
        page = Page(write_report(there, rows=rows))
        assert not page.all("script")
        assert evil in page.words and "a<b>&'\"" in page.words
        assert len(page.all("section")) == len(SECTIONS)


@pytest.mark.parametrize(
    ("left", "commands"),
    [
        (["recipe.yaml"], ["--task TASK --data PATH [--heads]", "distill", "--resume"]),
        (["recipe.yaml", "metrics.jsonl"], ["--task TASK --data PATH [--heads]", "--resume"]),
        (["recipe.yaml", "student"], ["--task TASK --data PATH [--heads]", "shoulders distill"]),
        (["recipe.yaml", "student", "results.json"], ["--models scratch", "shoulders distill"]),
    ],
)
def test_what_a_run_lacks_is_named_with_the_command_that_fills_it(
    run: Path, tmp_path: Path, left: list[str], commands: list[str]
) -> None:
    page = Page(write_report(copy(run, tmp_path, *left)))
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    assert page.all("p", "missing")
    for command in commands:
        assert command in page.words


def test_teachers_and_images_that_went_away_are_said_to_be_missing(run: Path, tmp_path: Path) -> None:
    there = copy(run, tmp_path, "recipe.yaml", "metrics.jsonl", "results.json", "student")
    text = (there / "recipe.yaml").read_text().replace(f"{run.parent}/", f"{run.parent}/moved/")
    (there / "recipe.yaml").write_text(text)
    page = Page(write_report(there))
    assert "The teacher segformer is not here" in page.words and "The images of the recipe are not here" in page.words
    assert not page.all("div", "strip")
    # the images that this head was scored on are still there, and the student keeps the head
    assert len(page.all("div", "sides")) == 2 and "with the head of resnet" in page.source
    assert "the teacher with" not in page.source


def test_heads_are_shown_on_the_images_they_were_scored_on_else_on_those_given(run: Path, tmp_path: Path) -> None:
    scored = set(re.findall(r'alt="([^"]*): the student with the head of resnet', write_report(run).read_text()))
    assert len(scored) == 2 and all(name.startswith("class") for name in scored)
    mine = open_source(save_images(tmp_path / "mine", 5))
    for images in (mine, {"resnet": mine}):
        text = write_report(run, images=images, out=tmp_path / "page.html").read_text()
        shown = re.findall(r'alt="([^"]*): the student with the head of (\w+)', text)
        assert {name for name, head in shown if head == "resnet"} <= {f"{i:04d}.jpg" for i in range(5)}


def test_sources_take_turns(run: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    few = save_images(tmp_path / "few", 20)
    tree["images"] |= {"path": None, "sources": {"many": {"path": tree["images"]["path"]}, "few": {"path": str(few)}}}
    there = copy(run, tmp_path, "student")
    (there / "recipe.yaml").write_text(yaml.safe_dump(tree))
    told = read_run(there)
    assert told.recipe is not None
    held = [path.split("/")[0] for path in names_of(told.recipe)]
    shown = [name.split("/")[0] for name, _ in choose(told, ["a", "b"], None).heads["a"]]
    turns = 2 * min(held.count("few"), 2)
    assert held.count("few") and shown[:turns] == ["few", "many"] * (turns // 2)


def names_of(recipe: Recipe) -> list[str]:
    """The held-out images of a run, by name."""
    images = open_images(recipe.images, recipe.train.seed)
    return [images.collection.name(at) for at in images.heldout.tolist()]


def test_rows_can_be_given(run: Path, tmp_path: Path) -> None:
    rows = [
        {"task": "semantic", "kind": kind, "metric": "mIoU", "value": value + seed / 100, "seed": seed}
        for kind, value in (("teacher", 0.9), ("inherited", 0.45), ("scratch", 0.2))
        for seed in (0, 1)
    ]
    page = Page(write_report(run, rows=rows, out=tmp_path / "page.html"))
    assert "from scratch, equal cost" in page.words and "2 seeds" in page.words and "50 %" in page.words
    assert "0.800" not in page.words


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give the folder of a run"):
        write_report(tmp_path)
    there = copy(run, tmp_path, "recipe.yaml")
    (there / "results.json").write_text("[{")
    with pytest.raises(DataError, match="results.json: not JSON"):
        write_report(there)
    (there / "results.json").write_text("{}")
    with pytest.raises(DataError, match="holds a dict, not a list"):
        write_report(there)
    (there / "results.json").unlink()
    (there / "recipe.yaml").write_text("a: [")
    with pytest.raises(DataError, match="not a recipe"):
        write_report(there)


def test_a_log_may_end_in_half_a_line_and_hold_what_is_no_number(run: Path, tmp_path: Path) -> None:
    there = copy(run, tmp_path, "recipe.yaml")
    rows = [{"step": step, "kind": "train", "loss": value} for step, value in enumerate((1.0, float("nan"), 0.5))]
    (there / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "kind": "tr')
    told = read_run(there)
    assert told.curves("train") == {"loss": [(0, 1.0), (2, 0.5)]}
    assert "Training loss" in Page(write_report(there)).words


def test_a_run_notes_what_it_ran_on(run: Path) -> None:
    told = read_run(run)
    assert told.environment["torch"] == torch.__version__
    assert told.environment["processes"] == 1 and told.environment["device"].startswith("c")
    memory = told.of_training("peak_gib")
    assert len(memory) == 4 and all(0.05 < value < 1000 for value in memory) and memory == sorted(memory)

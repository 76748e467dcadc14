"""A full disk ends a command with exit code 5, the path in one line and nothing half written."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from shoulders.distillation import distill
from tests.crashes import fill_disk_at, fork, watch_disk
from tests.runs import SHORT, run_tree
from tests.teachers.heads.test_saved import save_teacher
from tests.tiny import run_cli, save_base, save_images, tiny_recipe

HEADS = ("segformer", "depth_anything")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two heads, labelled images, and the recipe of a cache."""
    root = tmp_path_factory.mktemp("world")
    save_base(root / "base")
    save_images(root / "images", 24)
    save_images(root / "photos", 2)
    for split in ("train", "test"):
        save_images(root / "labelled" / split, 8, classes=2)
    teachers = {kind: save_teacher(kind, root / kind).model_dump() for kind in HEADS}
    distill(
        tiny_recipe(
            root,
            teachers=teachers,
            images__holdout=8,
            keep_heads=list(HEADS),
            train__steps=1,
            train__batch=4,
        )
    )
    one_teacher = {"t": teachers["segformer"]}
    tree = run_tree(root, root / "unused", teachers=one_teacher, images__holdout=8, **SHORT)
    (root / "distill.yaml").write_text(yaml.safe_dump(tree))
    (root / "cache.yaml").write_text(yaml.safe_dump(tree | {"images": tree["images"] | {"views": 1}}))
    return root


def check_complete(path: Path) -> None:
    """A file is complete, by its kind."""
    assert path.suffix not in (".partial", ".replaced")
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".npy":
        np.load(path)


# (command, number of its writes, every how many of them is tried in `make test`)
COMMANDS: dict[str, tuple[list[str], int, int]] = {
    "evaluate": (
        ["evaluate", "RUN", "--task=classification", "--data=WORLD/labelled", "--models=student", "--workers=0"],
        4,
        2,
    ),
    "predict": (["predict", "RUN", "WORLD/photos", "--out=RUN/predictions"], 20, 10),
    "report": (["report", "RUN"], 2, 2),
    "cache": (["cache", "WORLD/cache.yaml", "cache.path=RUN/cache"], 8, 4),
    "distill": (["distill", "WORLD/distill.yaml", "out=RUN/distilled"], 40, 13),
}


def run_on_full_disk(number: int, args: list[str], log: Path) -> None:
    """Run a command in this (child) process, whose disk is full from a write on; ends with its exit code."""
    with log.open("w") as file:
        watch_disk(fill_disk_at(number))
        finished = run_cli(*args)
        file.write("\n".join(line for line in finished.stderr.splitlines() if line.startswith("shoulders: ")))
    sys.exit(finished.returncode)


@pytest.mark.parametrize("every_write", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_ends_a_command_in_one_line_and_leaves_nothing_half_written(
    command: str, every_write: bool, world: Path, tmp_path: Path
) -> None:
    template, writes, stride = COMMANDS[command]
    folder = tmp_path / "run"
    args = [arg.replace("RUN", str(folder)).replace("WORLD", str(world)) for arg in template]
    for number in count(1) if every_write else range(1, writes + 1, stride):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(world / "run", folder)
        code = fork(partial(run_on_full_disk, number, args, tmp_path / "log"))
        if code == 0:
            break
        (line,) = (tmp_path / "log").read_text().splitlines()
        assert (code, "no space left on the disk" in line, str(folder) in line) == (5, True, True), (number, code, line)
        for path in folder.rglob("*"):
            check_complete(path)
        assert {path.name for path in (world / "run").iterdir()} <= {path.name for path in folder.iterdir()}
    assert number > writes or not every_write

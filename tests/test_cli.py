"""The command line: frozen, quick to open, one line per refusal, and what the README says works."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from shoulders import cli
from tests.tiny import save_base, save_convnext, save_images, save_segformer

ROOT = Path(__file__).resolve().parents[1]

# Every command with its arguments and options. A new option is a promise to keep: add it here on purpose.
FROZEN = {
    "distill": ["{recipe}", "[overrides]...", "--resume", "--json", "--help"],
    "plan": ["{recipe}", "[overrides]...", "--json", "--help"],
    "cache": ["{recipe}", "[overrides]...", "--plan", "--verify", "--info", "--json", "--help"],
    "evaluate": [
        "{run}",
        "--task",
        "--data",
        "--models",
        "--column",
        "--batch",
        "--workers",
        "--seed",
        "--heads",
        "--size",
        "--tune",
        "--scratch-steps",
        "--probe",
        "--json",
        "--help",
    ],
    "predict": ["{run}", "{images}", "--head", "--probe", "--out", "--threshold", "--max-pixels", "--json", "--help"],
    "report": ["{run}", "--out", "--json", "--help"],
    "teachers": ["[recipe]", "[overrides]...", "--families", "--json", "--help"],
    "demo": ["--out", "--quick", "--json", "--help"],
    "world": ["{folder}", "--style", "--train", "--val", "--test", "--size", "--seed", "--json", "--help"],
}


def shoulders(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoulders", *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=280)


def test_the_commands_are_frozen() -> None:
    listed = shoulders("--help").stdout.split("Commands:")[1]
    assert re.findall(r"^  (\w+)", listed, re.M) == list(FROZEN)
    for command, expected in FROZEN.items():
        text = shoulders(command, "--help").stdout
        usage = re.search(r"Usage: .*? \[OPTIONS\] ?(.*)", text)
        assert usage is not None
        assert usage[1].split() + re.findall(r"^  (--[a-z-]+)", text, re.M) == expected


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, shoulders.cli; print(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_base(root / "base")
    save_convnext(root / "classifier")
    save_segformer(root / "segmenter")
    save_images(root / "labelled", 90, classes=3)
    recipe = {
        "student": {"base": "base", "adapter": {"kind": "lora", "rank": 2}},
        "teachers": {"classifier": {"model": "classifier"}, "segmenter": {"model": "segmenter", "taps": ["stage1"]}},
        "images": {"path": "labelled", "size": 32, "holdout": 16, "workers": 0},
        "transfer": {"calibration_images": 16},
        "train": {"steps": 4, "batch": 8, "log_every": 2, "tensorboard": True},
        "out": "runs/x",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def test_from_recipe_to_scores(world: Path) -> None:
    done = shoulders("distill", "recipe.yaml", "train.steps=6", "--json", cwd=world)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 6 and summary["fvu_spread"] >= 1
    assert list((world / "runs/x/tensorboard").glob("events*"))
    shown = shoulders("evaluate", "runs/x", "--task", "classification", "--data", "labelled", cwd=world)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[1].split() == ["model", "knn_top1", "linear_top1", "1shot_top1", "5shot_top1", "10shot_top1"]
    assert [line.split()[0] for line in lines[3:]] == ["student", "base", "classifier", "segmenter"]
    rows = json.loads((world / "runs/x/results.json").read_text())
    assert {row["task"] for row in rows} == {"inheritance", "classification"}
    again = shoulders(
        "evaluate",
        "runs/x",
        "--task",
        "classification",
        "--data",
        "labelled",
        "--models",
        "student",
        "--json",
        cwd=world,
    )
    values = {(row["model"], row["metric"]): row["value"] for row in rows if row["task"] == "classification"}
    assert all(row["value"] == values["student", row["metric"]] for row in json.loads(again.stdout))
    # rows of the same measurement are replaced, not doubled
    assert len(json.loads((world / "runs/x/results.json").read_text())) == len(rows)
    told = json.loads(shoulders("report", "runs/x", "--json", cwd=world).stdout)
    page = (world / told["report"]).read_text()
    assert told == {"report": "runs/x/report.html"} and f"{values['student', 'linear_top1']:.3f}" in page


def test_it_says_what_teachers_are(world: Path) -> None:
    families = json.loads(shoulders("teachers", "--families", "--json").stdout)
    assert len(families) >= 15
    described = json.loads(shoulders("teachers", "recipe.yaml", "--json", cwd=world).stdout)
    assert [row["name"] for row in described] == ["classifier", "segmenter"]
    assert "classifier" in shoulders("teachers", "recipe.yaml", cwd=world).stdout
    assert "dinov2" in shoulders("teachers", "--families").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["distill", "recipe.yaml", "train.stepz=1"], "train.stepz: unknown key; did you mean steps?"),
        (["distill", "none.yaml"], "cannot read the recipe"),
        (["distill", "recipe.yaml", "teachers.classifier.taps=[stage7]", "out=runs/y"], "teachers.classifier.taps: "),
        (["distill", "recipe.yaml", "images.size=30", "out=runs/y"], "images.size: "),
        (["distill", "recipe.yaml", "student.base=nowhere/at/all", "out=runs/y"], "student.base: "),
        (["distill", "recipe.yaml", "transfer.layers=[block9]", "out=runs/y"], "transfer.layers: "),
        (["evaluate", "runs/x", "--task", "flying", "--data", "labelled"], "'flying' is not one of classification"),
        (["evaluate", "runs/x", "--task", "classification", "--data", "nowhere"], "nowhere"),
        (
            ["evaluate", "runs/x", "--task", "semantic", "--data", "labelled", "--heads", "--tune", "adapter"],
            "--tune: ",
        ),
        (["teachers"], "give a recipe, or --families"),
    ],
)
def test_refusals_are_one_line_and_exit_2(args: list[str], message: str, world: Path) -> None:
    done = shoulders(*args, cwd=world)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr
    assert done.stdout == ""


def commands_of(readme: str) -> list[str]:
    """The lines of the console blocks that start the program."""
    blocks = re.findall(r"```console\n(.*?)```", readme, re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("shoulders ")]


def test_what_the_readme_shows_works(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    for name in ("recipes", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    save_images(tmp_path / "photos", 60)
    save_images(tmp_path / "labelled", 90, classes=3)
    commands = commands_of(readme)
    assert [command.split()[1] for command in commands] == ["distill", "evaluate", "teachers"]
    small = ["train.steps=2", "train.batch=8", "transfer.calibration_images=16", "images.holdout=8"]
    for command in commands:
        args = shlex.split(command)[1:]
        done = shoulders(*args, *(small if args[0] == "distill" else []), cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        done = subprocess.run(
            [sys.executable, "-c", block],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=200,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr[-2000:]


def test_world_is_written_once(tmp_path: Path) -> None:
    asked = ("world", tmp_path, "--style", "ink", "--train", 3, "--val", 0, "--test", 2)
    first = shoulders(*asked)
    assert first.returncode == 0 and "written" in first.stdout and "instances/ (COCO JSON)" in first.stdout
    told = json.loads(shoulders(*asked, "--json").stdout)
    assert told == [{"style": "ink", "path": str(tmp_path / "ink"), "written": False}]
    refused = shoulders(*asked, "--seed", 1)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"shoulders: {tmp_path / 'ink'}: holds the world")


def test_the_short_name_of_ones_own_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert shoulders("world", "~/w", "--style", "ink", "--train", 1, "--val", 0, "--test", 1).returncode == 0
    assert (tmp_path / "w" / "ink").is_dir() and not (tmp_path / "~").exists()


def test_of_several_processes_one_tells_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shoulders("teachers", "--families").stdout == ""
    monkeypatch.setenv("RANK", "0")
    assert "dinov2" in shoulders("teachers", "--families").stdout


def test_ctrl_c_is_answered_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", typer.Typer())
    cli.app.command()(interrupted)
    monkeypatch.setattr(sys, "argv", ["shoulders"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "shoulders: stopped; start it again: what is finished is kept"

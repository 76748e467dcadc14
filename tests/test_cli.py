"""The command line: its commands and options, its start-up, its refusals, and the commands that the README shows."""

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

import shoulders.cli
from shoulders.config.recipe import dump_recipe
from shoulders.errors import explain_error
from tests.tiny import run_cli, save_images, save_tiny_world, tiny_recipe

ROOT = Path(__file__).resolve().parents[1]

# Every command with its arguments and options. Users rely on them: add a new one on purpose.
INTERFACE = {
    "distill": "{recipe} [overrides]... --resume --json --help",
    "plan": "{recipe} [overrides]... --json --help",
    "cache": "{recipe} [overrides]... --estimate --verify --info --json --help",
    "evaluate": (
        "{run} --task --data --models --column --batch --workers --seed --heads --classes --size --finetune "
        "--scratch-steps --probe --max-unreadable --json --help"
    ),
    "predict": "{run} {images} --head --probe --out --threshold --max-pixels --no-pictures --no-verify --json --help",
    "report": "{run} --out --json --help",
    "teachers": "[recipe] [overrides]... --families --json --help",
    "demo": "--out --quick --json --help",
    "world": "{folder} --style --train --val --test --size --seed --json --help",
}


def run_process(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m shoulders ARGS`` in a process of its own."""
    command = [sys.executable, "-m", "shoulders", *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=280)


def test_commands_and_options_are_those_that_are_promised() -> None:
    listed = run_cli("--help").stdout.split("Commands:")[1]
    assert re.findall(r"^  (\w+)", listed, re.M) == list(INTERFACE)
    for command, expected in INTERFACE.items():
        text = run_cli(command, "--help").stdout
        usage = re.search(r"Usage: .*? \[OPTIONS\] ?(.*)", text)
        assert usage is not None
        assert usage[1].split() + re.findall(r"^  (--[a-z-]+)", text, re.M) == expected.split()


def test_help_is_printed_without_importing_torch() -> None:
    code = "import sys, shoulders.cli; print(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_the_help_of_evaluate_lists_every_task_and_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from shoulders.tasks import TASKS

    monkeypatch.setitem(TASKS, "depth", TASKS["semantic"])
    text = " ".join(run_cli("evaluate", "--help").stdout.split())
    assert "One of classification, detection, semantic, instance, depth." in text
    assert "rt_detr_v2, upernet, mask2former" in text


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, photos, labelled images, and a recipe over them with relative paths."""
    root = save_tiny_world(tmp_path_factory.mktemp("world"), images=90)
    save_images(root / "labelled", 90, classes=3)
    recipe = tiny_recipe(Path(), "runs/x", student__adapter={"kind": "lora", "rank": 2}, train__tensorboard=True)
    (root / "recipe.yaml").write_text(dump_recipe(recipe))
    return root


@pytest.fixture
def in_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder."""
    monkeypatch.chdir(world)
    return world


def test_from_recipe_to_scores(in_world: Path) -> None:
    done = run_process("distill", "recipe.yaml", "train.steps=6", "--json", cwd=in_world)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 6 and summary["fvu_spread"] >= 1
    assert list(Path("runs/x/tensorboard").glob("events*"))
    command = ("evaluate", "runs/x", "--task", "classification", "--data", "labelled")
    shown = run_cli(*command)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0] == "classification: scores in %, 18 images"
    assert lines[1].split() == ["model", "knn_top1", "linear_top1", "1shot_top1", "5shot_top1", "10shot_top1"]
    assert [line.split()[0] for line in lines[3:]] == ["student", "base", "classifier", "segmenter"]
    rows = json.loads(Path("runs/x/results.json").read_text())
    assert {row["task"] for row in rows} == {"inheritance", "classification"}
    again = run_cli(*command, "--models", "student", "--json")
    values = {(row["model"], row["metric"]): row["value"] for row in rows if row["task"] == "classification"}
    assert all(row["value"] == values["student", row["metric"]] for row in json.loads(again.stdout))
    # rows of the same measurement are replaced, not doubled
    assert len(json.loads(Path("runs/x/results.json").read_text())) == len(rows)
    written = json.loads(run_cli("report", "runs/x", "--json").stdout)
    assert written == {"report": "runs/x/report.html"}
    assert f"{values['student', 'linear_top1']:.3f}" in Path("runs/x/report.html").read_text()


def test_teachers_are_described_and_families_listed(in_world: Path) -> None:
    families = json.loads(run_cli("teachers", "--families", "--json").stdout)
    assert len(families) >= 15
    described = json.loads(run_cli("teachers", "recipe.yaml", "--json").stdout)
    assert [row["name"] for row in described] == ["classifier", "segmenter"]
    assert "classifier" in run_cli("teachers", "recipe.yaml").stdout
    assert "dinov2" in run_cli("teachers", "--families").stdout


def distill_with(override: str) -> list[str]:
    return ["distill", "recipe.yaml", override, "out=runs/y"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["distill", "recipe.yaml", "train.stepz=1"], "train.stepz: unknown key; did you mean steps?"),
        (["distill", "none.yaml"], "cannot read the recipe"),
        (distill_with("teachers.classifier.taps=[stage7]"), "teachers.classifier.taps: "),
        (distill_with("images.size=30"), "images.size: "),
        (distill_with("student.base=nowhere/at/all"), "student.base: "),
        (distill_with("transfer.layers=[block9]"), "transfer.layers: "),
        (["cache", "recipe.yaml", "--estimate", "--info"], "give one of --estimate, --verify and --info"),
        (["evaluate", "runs/x", "--task", "flying", "--data", "labelled"], "'flying' is not one of classification"),
        (["evaluate", "runs/x", "--task", "classification", "--data", "nowhere"], "nowhere"),
        (
            ["evaluate", "runs/x", "--task", "semantic", "--data", "labelled", "--heads", "--finetune", "adapter"],
            "--finetune: --heads fits nothing",
        ),
        (["evaluate", "runs/x", "--task", "semantic", "--data", "labelled", "--size", "1,2,3"], "--size: '1,2,3'"),
        (["teachers"], "give a recipe, or --families"),
    ],
)
def test_refusals_are_one_line_and_exit_2(args: list[str], message: str, in_world: Path) -> None:
    done = run_cli(*args)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("shoulders: ") and message in done.stderr
    assert done.stdout == ""


def test_a_refusal_ends_the_process_with_its_exit_code(in_world: Path) -> None:
    done = run_process("distill", "recipe.yaml", "train.stepz=1", cwd=in_world)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "shoulders: recipe.yaml: train.stepz: unknown key; did you mean steps?\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 5, "out of memory; raise train.accumulate"),
        (RuntimeError("CUDA out of memory.\n Tried"), 5, "CUDA out of memory. Tried; raise train.accumulate"),
        (RuntimeError("DataLoader worker (pid 1) is killed"), 70, "lower images.workers"),
        (OSError(28, "No space left on device", "a/b"), 5, "a/b: no space left on the disk"),
        (PermissionError(13, "Permission denied", "a/b"), 3, "a/b: Permission denied"),
    ],
)
def test_errors_of_the_machine_have_an_exit_code_and_a_fix(error: Exception, code: int, message: str) -> None:
    explained = explain_error(error)
    assert explained is not None
    assert explained[0] == code and message in explained[1]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain_error(RuntimeError("shapes cannot be multiplied")) is None
    assert explain_error(KeyError("x")) is None
    with pytest.raises(KeyError):
        run_with(monkeypatch, KeyError("x"))


def run_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> tuple[int, str]:
    """Exit code and stderr of a command that raises ``error``."""

    def command() -> None:
        raise error

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    monkeypatch.setattr(shoulders.cli, "app", app)
    done = run_cli()
    return done.returncode, done.stderr.strip()


def test_ctrl_c_prints_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    code, message = run_with(monkeypatch, KeyboardInterrupt())
    assert code == 130
    assert message == "shoulders: interrupted; start it again to continue: finished parts are kept"


def commands_of(readme: str) -> list[str]:
    """The lines of the console blocks that start the program."""
    blocks = re.findall(r"```console\n(.*?)```", readme, re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("shoulders ")]


def test_the_commands_and_the_code_of_the_readme_work(tmp_path: Path) -> None:
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
        done = run_process(*args, *(small if args[0] == "distill" else []), cwd=tmp_path)
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


def test_the_world_is_written_once(tmp_path: Path) -> None:
    command = ("world", tmp_path, "--style", "ink", "--train", 3, "--val", 0, "--test", 2)
    first = run_cli(*command)
    assert first.returncode == 0 and "written" in first.stdout and "instances/ (COCO JSON)" in first.stdout
    listed = json.loads(run_cli(*command, "--json").stdout)
    assert listed == [{"style": "ink", "path": str(tmp_path / "ink"), "written": False}]
    refused = run_cli(*command, "--seed", 1)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"shoulders: {tmp_path / 'ink'}: is the world")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run_cli("world", "~/w", "--style", "ink", "--train", 1, "--val", 0, "--test", 1).returncode == 0
    assert (tmp_path / "w" / "ink").is_dir() and not (tmp_path / "~").exists()


def test_of_several_processes_only_the_main_rank_prints_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_cli("teachers", "--families").stdout == ""
    monkeypatch.setenv("RANK", "0")
    assert "dinov2" in run_cli("teachers", "--families").stdout


def test_no_command_needs_what_windows_lacks() -> None:
    """``resource`` exists on Unix alone."""
    code = (
        "import sys; sys.modules['resource'] = None; import shoulders.distillation, shoulders.planning.estimate, "
        "shoulders.feature_cache.commands, shoulders.evaluation.evaluate, shoulders.prediction, shoulders.demo; "
        "from shoulders.distributed.device import peak_main_memory; print(peak_main_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "0", done.stderr

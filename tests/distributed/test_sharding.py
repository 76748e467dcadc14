"""Two ranks that hold a part of every weight learn what one learns, and their checkpoints are anybody's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import shoulders
from shoulders.config.recipe import check_recipe
from shoulders.distillation import distill
from shoulders.distributed.context import DistContext
from shoulders.errors import Interrupted, RecipeError
from shoulders.training.checkpoint import checkpoints
from shoulders.training.preflight import check_run
from shoulders.training.step import TrainStep
from tests.tiny import ADAPTERS, metric_rows, save_base, save_convnext, save_images, save_segformer, tiny_tree

pytestmark = pytest.mark.timeout(600)  # one fixture does nearly all, and cores may be busy

STEPS, STOP = 24, 8
BASES = {"dinov2": 2, "dinov3_vit": 1, "siglip_vision_model": 0, "vit": 3}  # each with one of the adapters

# What a rank does: one run after another, each of them a recipe, whether to go on, and the step to be stopped at.
RANK = """
import importlib, json, os, signal, sys
from contextlib import nullcontext
from pathlib import Path
from shoulders.errors import Interrupted
from shoulders.distributed.context import init_distributed
from shoulders.config.recipe import check_recipe
from shoulders.training.step import TrainStep
from torch.distributed.tensor import DTensor

story = importlib.import_module("shoulders.distillation")
held, stop_at, out = {}, None, ""


def numbers_held(step):
    parameters = [*step.module.parameters(), *step.teachers.parameters()]
    assert all(isinstance(p, DTensor) or not p.ndim for p in parameters)
    on_this_rank = sum(p.to_local().numel() if isinstance(p, DTensor) else 1 for p in parameters)
    return on_this_rank, sum(p.numel() for p in parameters)


def call(step, number, batch, original=TrainStep.__call__):
    if number == 2:
        held[out] = numbers_held(step)
    if number == stop_at and step.dist.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # one rank gets the signal, all of them stop
    return original(step, number, batch)


TrainStep.__call__ = call
with init_distributed() as dist:
    story.init_distributed = lambda: nullcontext(dist)
    for recipe, resume, stop_at in json.loads(Path(sys.argv[1]).read_text()):
        out = recipe["out"]
        try:
            story.distill(check_recipe(recipe), resume=resume)
        except Interrupted:
            assert stop_at
    Path(f"{sys.argv[1]}.{dist.rank}").write_text(json.dumps(held))
"""


def torchrun(ranks: int, code: str, *args: object, timeout: float = 400) -> None:
    """Run Python code on so many ranks, which find each other on a free port; nothing of them is left behind."""
    # each has a session of its own, and ends itself: it tells where it was, which nobody can who kills it
    code = f"import faulthandler; faulthandler.dump_traceback_later({timeout}, exit=True)\n{code}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "--no-python",
        sys.executable,
        "-c",
        code,
        *map(str, args),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate(timeout=timeout + 30)
        finally:
            process.kill()
    assert process.returncode == 0, said[-6000:]


def save_classifier(folder: Path) -> Path:
    """The tiny ConvNeXt with a head, and names for its classes."""
    save_convnext(folder)
    config = transformers.ConvNextConfig.from_pretrained(folder)
    config.num_labels = 3
    transformers.ConvNextForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_classifier(root / "classifier")
    save_segformer(root / "segmenter")
    for folder in ("images", "few"):
        save_images(root / folder, 60)
    for kind in BASES:
        save_base(root / kind, kind)
    return root


def tree(world: Path, out: str, **train: Any) -> dict[str, Any]:
    settings = {
        "steps": STEPS,
        "save_every": STOP,
        "evaluate_every": 12,
        "ema": 0.9,
        "accumulate": 2,
        "optimizer": "adamw",
        "clip": 0.2,
    }
    changes = {f"train__{key}": value for key, value in (settings | train).items()}
    base = str(world / "dinov2")
    return tiny_tree(world, out, student__base=base, transfer__balance="dropping", keep_heads=["classifier"], **changes)


def of_base(world: Path, kind: str, out: str, **train: Any) -> dict[str, Any]:
    adapter = ADAPTERS[BASES[kind]] | ({"blocks": [0]} if ADAPTERS[BASES[kind]]["kind"] == "conv" else {})
    recipe = tree(world, out, steps=3, **train) | {"keep_heads": []}
    recipe["student"] = {"base": str(world / kind), "adapter": adapter}
    recipe["transfer"] = {"calibration_images": 16, "layers": ["block0", "latent"], "t2s": "each"}
    return recipe


def of_few(world: Path, out: str, **train: Any) -> dict[str, Any]:
    """One image in twelve is of the only source that the segmenter is asked about: mostly a rank has none."""
    recipe = tree(world, out, steps=6, **train)
    few = {"path": str(world / "few"), "share": 0.09}
    sources = {"many": {"path": str(world / "images")}, "few": few}
    recipe["images"] |= {"path": None, "sources": sources, "holdout": 12}
    recipe["teachers"]["segmenter"]["sources"] = ["few"]
    recipe["transfer"]["calibration_images"] = 64
    return recipe


def run(recipe: dict[str, Any], resume: bool = False) -> Path:
    distill(check_recipe(recipe), resume=resume)
    return Path(recipe["out"])


def same_run(one: Path, other: Path, off: float) -> None:
    """Losses, gradient norms, held-out measures and the student agree."""
    for kind, names in (("train", ("step", "loss", "gradient_norm")), ("evaluation", ("step", "fvu_spread"))):
        for name in names:
            ours, theirs = ([row[name] for row in metric_rows(out, kind)] for out in (one, other))
            assert ours == pytest.approx(theirs, rel=off), name
    ours_, theirs_ = (load_file(out / "student" / "model.safetensors") for out in (one, other))
    assert ours_.keys() == theirs_.keys()
    for name, weight in ours_.items():
        assert torch.allclose(weight, theirs_[name], rtol=100 * off, atol=10 * off), name


@pytest.fixture(scope="module")
def held(world: Path) -> dict[str, tuple[int, int]]:
    """All that two ranks do here, in one start: {out: (numbers that rank 0 holds, all)} of each run."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(STOP, patch)
        with pytest.raises(Interrupted):
            run(tree(world, "begun by one"))
    jobs = [
        (tree(world, "two", parallel="fsdp"), False, None),
        (tree(world, "begun by two", parallel="fsdp"), False, STOP),
        (tree(world, "begun by one", parallel="fsdp"), True, None),
        (of_few(world, "two of few", parallel="fsdp"), False, None),
        *((of_base(world, kind, f"two {kind}", parallel="fsdp", optimizer="muon"), False, 2) for kind in BASES),
        *((of_base(world, kind, f"two {kind}", parallel="fsdp", optimizer="muon"), True, None) for kind in BASES),
    ]
    (world / "jobs").write_text(json.dumps(jobs))
    torchrun(2, RANK, world / "jobs")
    return {Path(out).name: numbers for out, numbers in json.loads((world / "jobs.0").read_text()).items()}


def interrupt_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM to this process in a step."""
    original = TrainStep.__call__

    def interrupted(self: TrainStep, number: int, batch: Any) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, number, batch)

    patch.setattr(TrainStep, "__call__", interrupted)


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    """The uninterrupted run of one process; ``fsdp`` changes nothing there."""
    return run(tree(world, "one", parallel="fsdp"))


def test_two_ranks_learn_in_parts_what_one_learns(world: Path, alone: Path, held: dict[str, Any]) -> None:
    same_run(world / "two", alone, 1e-5)
    norms = [row["gradient_norm"] for row in metric_rows(alone)]
    assert max(norms) > 0.2  # clipped, some of them


def test_a_rank_holds_half_of_every_model(held: dict[str, tuple[int, int]]) -> None:
    for here, everything in held.values():
        assert here == pytest.approx(everything / 2, rel=0.02)


@pytest.mark.parametrize("begun", ["begun by one", "begun by two"])
def test_a_checkpoint_is_gone_on_with_by_any_number_of_ranks(
    begun: str, world: Path, alone: Path, held: dict[str, Any]
) -> None:
    if begun == "begun by two":
        assert [path.name for path in checkpoints(world / begun / "checkpoints")] == [f"step-{STOP:08d}"]
        run(tree(world, begun), resume=True)  # as ddp, which one process calls it by default
    same_run(world / begun, alone, 1e-5)


def test_the_student_is_whole_and_keeps_heads(world: Path, held: dict[str, Any]) -> None:
    student = shoulders.load(world / "two")
    assert student(torch.rand(1, 3, 32, 32)).latent.grid == (4, 4)
    assert student.predict("classifier", torch.rand(2, 3, 32, 32))
    inside = student.encoder.base.state_dict()
    base = transformers.AutoModel.from_pretrained(world / "dinov2").state_dict()
    assert all(torch.equal(inside[name], weight) for name, weight in base.items())


def test_teachers_that_a_rank_has_no_image_for_hold_up_nobody(world: Path, held: dict[str, Any]) -> None:
    same_run(world / "two of few", run(of_few(world, "one of few")), 1e-5)


# Muon rounds to bfloat16 inside, so that sums in another order lead a little elsewhere
@pytest.mark.parametrize("kind", BASES)
def test_every_kind_of_base_and_adapter_is_cut(kind: str, world: Path, held: dict[str, Any]) -> None:
    same_run(world / f"two {kind}", run(of_base(world, kind, f"one {kind}", optimizer="muon")), 1e-2)


def test_what_does_not_go_in_parts_is_refused(world: Path) -> None:
    recipe = check_recipe(tree(world, "refused", parallel="fsdp", compile=True))
    with pytest.raises(RecipeError, match=r"train.compile: .* set parallel=ddp"):
        check_run(recipe, {}, DistContext(1, 2, torch.device("cpu")), resume=False)
    with pytest.raises(RecipeError, match=r"train.parallel: Input should be 'ddp' or 'fsdp' \(got 'zero'\)"):
        check_recipe(tree(world, "refused", parallel="zero"))

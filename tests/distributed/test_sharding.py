"""A run on two ranks with sharded weights equals a run on one; its checkpoints resume on any number of ranks."""

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

import shoulders
from shoulders.config.recipe import check_recipe
from shoulders.distillation import distill
from shoulders.distributed.context import DistContext
from shoulders.errors import Interrupted, RecipeError
from shoulders.training.checkpoint import checkpoints
from shoulders.training.preflight import check_run
from shoulders.training.step import TrainStep
from tests.tiny import (
    ADAPTERS,
    metric_rows,
    save_base,
    save_convnext,
    save_images,
    save_segformer,
    student_weights,
    tiny_tree,
)

pytestmark = pytest.mark.timeout(600)  # one fixture does nearly all of the work, and the cores may be busy

STEPS, STOP = 24, 8
BASES = {"dinov2": 2, "dinov3_vit": 1, "siglip_vision_model": 0, "vit": 3}  # the index of its adapter in ADAPTERS

# The program of a rank: several runs, each given as a recipe, whether to resume, and the step at which to stop.
RANK = """
import importlib, json, os, signal, sys
from contextlib import nullcontext
from pathlib import Path
from shoulders.errors import Interrupted
from shoulders.distributed.context import init_distributed
from shoulders.config.recipe import check_recipe
from shoulders.training.step import TrainStep
from torch.distributed.tensor import DTensor

distillation = importlib.import_module("shoulders.distillation")
numel, stop_at, out = {}, None, ""


def count_numbers(step):
    parameters = [*step.module.parameters(), *step.teachers.parameters()]
    assert all(isinstance(p, DTensor) or not p.ndim for p in parameters)
    on_this_rank = sum(p.to_local().numel() if isinstance(p, DTensor) else 1 for p in parameters)
    return on_this_rank, sum(p.numel() for p in parameters)


def call(step, number, batch, original=TrainStep.__call__):
    if number == 2:
        numel[out] = count_numbers(step)
    if number == stop_at and step.dist.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # one rank gets the signal, all of them stop
    return original(step, number, batch)


TrainStep.__call__ = call
with init_distributed() as dist:
    distillation.init_distributed = lambda: nullcontext(dist)
    for recipe, resume, stop_at in json.loads(Path(sys.argv[1]).read_text()):
        out = recipe["out"]
        try:
            distillation.distill(check_recipe(recipe), resume=resume)
        except Interrupted:
            assert stop_at
    Path(f"{sys.argv[1]}.{dist.rank}").write_text(json.dumps(numel))
"""


def torchrun(ranks: int, code: str, *args: object, timeout: float = 400) -> None:
    """Run Python code on some ranks, which use a free port."""
    # a rank that takes too long prints its stack and ends itself; a test cannot, as ranks have their own sessions
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
            output, _ = process.communicate(timeout=timeout + 30)
        finally:
            process.kill()
    assert process.returncode == 0, output[-6000:]


def save_classifier(folder: Path) -> Path:
    """The tiny ConvNeXt with a classification head."""
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


def tree_of(world: Path, out: str, **train: Any) -> dict[str, Any]:
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


def tree_of_base(world: Path, kind: str, out: str, **train: Any) -> dict[str, Any]:
    adapter = ADAPTERS[BASES[kind]] | ({"blocks": [0]} if ADAPTERS[BASES[kind]]["kind"] == "conv" else {})
    tree = tree_of(world, out, steps=3, **train) | {"keep_heads": []}
    tree["student"] = {"base": str(world / kind), "adapter": adapter}
    tree["transfer"] = {"calibration_images": 16, "layers": ["block0", "latent"], "t2s": "each"}
    return tree


def tree_of_few(world: Path, out: str, **train: Any) -> dict[str, Any]:
    """The segmenter learns from one image in twelve: a rank often has none of its images in a batch."""
    tree = tree_of(world, out, steps=6, **train)
    few = {"path": str(world / "few"), "share": 0.09}
    sources = {"many": {"path": str(world / "images")}, "few": few}
    tree["images"] |= {"path": None, "sources": sources, "holdout": 12}
    tree["teachers"]["segmenter"]["sources"] = ["few"]
    tree["transfer"]["calibration_images"] = 64
    return tree


def run(tree: dict[str, Any], resume: bool = False) -> Path:
    distill(check_recipe(tree), resume=resume)
    return Path(tree["out"])


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    """Compare losses, gradient norms, held-out measures and the weights of the student."""
    for kind, names in (("train", ("step", "loss", "gradient_norm")), ("evaluation", ("step", "fvu_spread"))):
        for name in names:
            values, expected = ([row[name] for row in metric_rows(out, kind)] for out in (one, other))
            assert values == pytest.approx(expected, rel=tolerance), name
    weights, expected_weights = student_weights(one), student_weights(other)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(weight, expected_weights[name], rtol=100 * tolerance, atol=10 * tolerance), name


@pytest.fixture(scope="module")
def numel(world: Path) -> dict[str, tuple[int, int]]:
    """All runs on two ranks, in one start; {out: (numbers on rank 0, numbers in total)} of each run."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(STOP, patch)
        with pytest.raises(Interrupted):
            run(tree_of(world, "started by one"))
    jobs = [
        (tree_of(world, "two", parallel="fsdp"), False, None),
        (tree_of(world, "started by two", parallel="fsdp"), False, STOP),
        (tree_of(world, "started by one", parallel="fsdp"), True, None),
        (tree_of_few(world, "two of few", parallel="fsdp"), False, None),
        *((tree_of_base(world, kind, f"two {kind}", parallel="fsdp", optimizer="muon"), False, 2) for kind in BASES),
        *((tree_of_base(world, kind, f"two {kind}", parallel="fsdp", optimizer="muon"), True, None) for kind in BASES),
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
def single(world: Path) -> Path:
    """The uninterrupted run of one process, for which ``fsdp`` makes no difference."""
    return run(tree_of(world, "one", parallel="fsdp"))


def test_two_ranks_with_sharded_weights_equal_one_process(world: Path, single: Path, numel: dict[str, Any]) -> None:
    assert_same_run(world / "two", single, 1e-5)
    norms = [row["gradient_norm"] for row in metric_rows(single)]
    assert max(norms) > 0.2  # some of them are clipped


def test_a_rank_holds_half_of_every_model(numel: dict[str, tuple[int, int]]) -> None:
    for on_rank_0, total in numel.values():
        assert on_rank_0 == pytest.approx(total / 2, rel=0.02)


@pytest.mark.parametrize("out", ["started by one", "started by two"])
def test_a_checkpoint_resumes_on_any_number_of_ranks(
    out: str, world: Path, single: Path, numel: dict[str, Any]
) -> None:
    if out == "started by two":
        assert [path.name for path in checkpoints(world / out / "checkpoints")] == [f"step-{STOP:08d}"]
        run(tree_of(world, out), resume=True)  # with ddp, the default
    assert_same_run(world / out, single, 1e-5)


def test_the_student_is_saved_unsharded_with_its_heads(world: Path, numel: dict[str, Any]) -> None:
    student = shoulders.load(world / "two")
    assert student(torch.rand(1, 3, 32, 32)).latent.grid == (4, 4)
    assert student.predict("classifier", torch.rand(2, 3, 32, 32))
    saved = student.encoder.base.state_dict()
    base = transformers.AutoModel.from_pretrained(world / "dinov2").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in base.items())


def test_a_rank_without_images_of_a_teacher_does_not_block_the_others(world: Path, numel: dict[str, Any]) -> None:
    assert_same_run(world / "two of few", run(tree_of_few(world, "one of few")), 1e-5)


# Muon rounds to bfloat16 inside, so another order of sums leads to slightly different weights
@pytest.mark.parametrize("kind", BASES)
def test_every_kind_of_base_and_adapter_can_be_sharded(kind: str, world: Path, numel: dict[str, Any]) -> None:
    assert_same_run(world / f"two {kind}", run(tree_of_base(world, kind, f"one {kind}", optimizer="muon")), 1e-2)


def test_settings_that_do_not_work_with_fsdp_are_refused(world: Path) -> None:
    recipe = check_recipe(tree_of(world, "refused", parallel="fsdp", compile=True))
    with pytest.raises(RecipeError, match=r"train.compile: .* set parallel=ddp"):
        check_run(recipe, {}, DistContext(1, 2, torch.device("cpu")), resume=False)
    with pytest.raises(RecipeError, match=r"train.parallel: Input should be 'ddp' or 'fsdp' \(got 'zero'\)"):
        check_recipe(tree_of(world, "refused", parallel="zero"))

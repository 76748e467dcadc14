"""The baseline from scratch: its FLOPs equal those counted by hand, nothing is inherited, and a seed determines it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import shoulders
from shoulders.errors import RecipeError
from shoulders.evaluation.finetune_models import init_from_scratch
from shoulders.model import load
from shoulders.tasks import TASKS, FinetuneTask
from shoulders.training.supervised_baseline import TrainingFlops, train_supervised_baseline, training_flops
from tests.evaluation.test_evaluate import world  # noqa: F401
from tests.tiny import ADAPTERS

SIZE = (32, 32)


def semantic_task(path: Path) -> FinetuneTask:
    return TASKS["semantic"].finetune(TASKS["semantic"].find_splits(path, "image"))


def test_equal_steps_have_the_flops_of_the_distillation() -> None:
    assert TrainingFlops(distillation=1000, supervised=2).equal_steps(batch=5) == 100
    assert TrainingFlops(distillation=1049, supervised=2).equal_steps(batch=5) == 105
    assert TrainingFlops(distillation=1, supervised=2).equal_steps(batch=5) == 1


def test_the_flops_of_a_supervised_image_are_those_of_its_matrices(world: Path) -> None:  # noqa: F811
    task = semantic_task(world / "masks")
    flops = training_flops(world / "run", task, SIZE)
    one_image = replace(task.splits, train=task.splits.train.take(np.array([0])))
    # whatever the number of images in a step
    assert training_flops(world / "run", TASKS["semantic"].finetune(one_image), SIZE).supervised == flops.supervised
    tokens, patches, d, hidden, rank, layers, k = 17, 16, 32, 128, 2, 2, 3
    embedding = 2 * patches * (3 * 8 * 8) * d
    linears = [(d, d)] * 4 + [(d, hidden), (hidden, d)]  # query, key, value, output, MLP
    block = sum(2 * tokens * a * b + 2 * tokens * rank * (a + b) for a, b in linears)  # each with its LoRA
    attention = 2 * 2 * tokens * tokens * d
    head = 2 * patches * d * k
    # forward, gradients of weights and of inputs; pixels need none
    assert flops.supervised == 2 * embedding + 3 * (layers * (block + attention) + head)


def test_the_flops_of_the_distillation_grow_with_its_steps_and_batch(world: Path, tmp_path: Path) -> None:  # noqa: F811
    task = semantic_task(world / "masks")
    once = training_flops(world / "run", task, SIZE)
    shutil.copytree(world / "run", tmp_path / "run")
    recipe = yaml.safe_load((world / "run" / "recipe.yaml").read_text())
    recipe["train"] |= {"steps": 6, "batch": 8}  # of 2 and 4
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    more = training_flops(tmp_path / "run", task, SIZE)
    assert (more.distillation, more.supervised) == (6 * once.distillation, once.supervised)
    # base, teachers, student and projectors take more than the training of the student alone
    assert once.distillation > 8 * once.supervised
    del recipe["teachers"]["segmenter"]
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="its recipe lacks segmenter, whose FLOPs count; give --scratch-steps"):
        training_flops(tmp_path / "run", task, SIZE)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda kind: kind["kind"])
def test_all_weights_are_random_and_trainable(adapter: dict[str, Any], world: Path) -> None:  # noqa: F811
    config = load(world / "run").config
    config.adapter = adapter
    model = init_from_scratch(config, semantic_task(world / "masks"), 5, torch.device("cpu"))
    base = dict(load(world / "run").encoder.base.named_parameters())
    weights = {name: p for name, p in model.encoder.named_parameters() if p.ndim > 1 and name.startswith("base.")}
    assert not any(torch.equal(p, base[name.removeprefix("base.")]) for name, p in weights.items() if p.std() > 0)
    for p in model.trainable_parameters():  # behind weights of zero, gradients would be zero
        nn.init.normal_(p, std=0.1)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = model.features_of(pixels)
    (model.head(features.to_map()).square().sum() + features.summary.square().sum()).backward()  # type: ignore[union-attr]
    untrained = {name for name, p in model.encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert untrained <= {"base.embeddings.mask_token"}


def test_a_seed_determines_the_rows(world: Path) -> None:  # noqa: F811
    splits = TASKS["classification"].find_splits(world / "labelled", "image")

    def values() -> list[float]:
        rows = train_supervised_baseline(world / "run", "classification", splits, 6, batch=4, seed=1)
        return [row["value"] for row in rows]

    state = torch.get_rng_state()
    assert values() == values()
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_evaluated_like_the_other_models(world: Path) -> None:  # noqa: F811
    models: list[str] = []
    settings: dict[str, Any] = {"workers": 0, "on_model": models.append, "step_fraction": 0.02}
    rows = shoulders.evaluate(world / "run", "semantic", world / "masks", ["scratch", "base"], **settings)
    assert models == ["base", "scratch"]
    (row,) = [row for row in rows if (row["model"], row["metric"]) == ("scratch", "mIoU")]
    described = row["settings"]
    flops = TrainingFlops(described["distillation_flops"], described["flops_per_image"])
    assert described["steps"] == flops.equal_steps(described["batch"])


def test_without_a_recipe_its_steps_have_to_be_given(world: Path) -> None:  # noqa: F811
    student, data = world / "run/student", world / "labelled"
    rows = shoulders.evaluate(student, "classification", data, ["scratch"], workers=0, scratch_steps=3)
    assert [(row["model"], row["metric"]) for row in rows] == [("scratch", "top1")]
    assert rows[0]["settings"]["steps"] == 3 and "flops_per_image" not in rows[0]["settings"]
    with pytest.raises(RecipeError, match="no recipe.yaml, .*; give --scratch-steps"):
        shoulders.evaluate(student, "classification", data, ["scratch"], workers=0)


def test_weights_of_two_seeds_differ(world: Path) -> None:  # noqa: F811
    config, task = load(world / "run").config, semantic_task(world / "masks")
    one, same, other = (init_from_scratch(config, task, seed, torch.device("cpu")) for seed in (0, 0, 1))
    pairs = [list(model.encoder.parameters()) + list(model.head.parameters()) for model in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[2], strict=True))

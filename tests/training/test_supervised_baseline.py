"""The data-centric baseline: its FLOPs are those counted by hand, it starts from nothing, and a seed says it all."""

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

from shoulders.errors import RecipeError
from shoulders.evaluation.finetune_models import init_from_scratch
from shoulders.model import load
from shoulders.tasks import TASKS
from shoulders.training.supervised_baseline import (
    Equal,
    equal_flops,
    evaluate_with_baseline,
    train_supervised_baseline,
)
from tests.evaluation.test_evaluate import world  # noqa: F401
from tests.tiny import ADAPTERS

SIZE = (32, 32)


def test_equal_steps_cost_what_the_distillation_cost() -> None:
    assert Equal(distillation=1000, supervised=2).steps(batch=5) == 100
    assert Equal(distillation=1049, supervised=2).steps(batch=5) == 105
    assert Equal(distillation=1, supervised=2).steps(batch=5) == 1


def test_an_image_of_supervised_training_costs_what_its_matrices_say(world: Path) -> None:  # noqa: F811
    goal = TASKS["semantic"].finetune(TASKS["semantic"].find_splits(world / "masks", "image"))
    told = equal_flops(world / "run", goal, SIZE)
    splits = replace(goal.splits, train=goal.splits.train.take(np.array([0])))
    one = equal_flops(world / "run", TASKS["semantic"].finetune(splits), SIZE)
    assert one.supervised == told.supervised  # however many images a step has
    tokens, places, d, hidden, rank, layers, k = 17, 16, 32, 128, 2, 2, 3
    patches = 2 * places * (3 * 8 * 8) * d
    linears = [(d, d)] * 4 + [(d, hidden), (hidden, d)]  # query, key, value, output, MLP
    block = sum(2 * tokens * a * b + 2 * tokens * rank * (a + b) for a, b in linears)  # each with its LoRA
    attention = 2 * 2 * tokens * tokens * d
    head = 2 * places * d * k
    # all three ways, but nothing goes back into the pixels
    assert told.supervised == 2 * patches + 3 * (layers * (block + attention) + head)


def test_the_distillation_is_counted_over_its_steps(world: Path, tmp_path: Path) -> None:  # noqa: F811
    goal = TASKS["semantic"].finetune(TASKS["semantic"].find_splits(world / "masks", "image"))
    once = equal_flops(world / "run", goal, SIZE)
    shutil.copytree(world / "run", tmp_path / "run")
    recipe = yaml.safe_load((world / "run" / "recipe.yaml").read_text())
    recipe["train"] |= {"steps": 6, "batch": 8}  # of 2 and 4
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    more = equal_flops(tmp_path / "run", goal, SIZE)
    assert (more.distillation, more.supervised) == (6 * once.distillation, once.supervised)
    # base, teachers, student and projectors cost more than to train the student by itself
    assert once.distillation > 8 * once.supervised
    del recipe["teachers"]["segmenter"]
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="its recipe lacks segmenter, whose cost counts; give --scratch-steps"):
        equal_flops(tmp_path / "run", goal, SIZE)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda kind: kind["kind"])
def test_it_starts_from_nothing_and_everything_in_it_learns(adapter: dict[str, Any], world: Path) -> None:  # noqa: F811
    config = load(world / "run").config
    config.adapter = adapter
    goal = TASKS["semantic"].finetune(TASKS["semantic"].find_splits(world / "masks", "image"))
    who = init_from_scratch(config, goal, 5, torch.device("cpu"))
    inherited = dict(load(world / "run").encoder.base.named_parameters())
    weights = {name: p for name, p in who.encoder.named_parameters() if p.ndim > 1 and name.startswith("base.")}
    assert not any(torch.equal(p, inherited[name.removeprefix("base.")]) for name, p in weights.items() if p.std() > 0)
    for p in who.trainable_parameters():  # what is zero at birth would hide what lies behind it
        nn.init.normal_(p, std=0.1)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = who.features_of(pixels)
    (who.head(seen.to_map()).square().sum() + seen.summary.square().sum()).backward()  # type: ignore[union-attr]
    idle = {name for name, p in who.encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle <= {"base.embeddings.mask_token"}


def test_a_seed_says_it_all_and_the_rows_are_kept(world: Path) -> None:  # noqa: F811
    splits = TASKS["classification"].find_splits(world / "labelled", "image")

    def values(seed: int) -> list[float]:
        return [
            row["value"]
            for row in train_supervised_baseline(world / "run", "classification", splits, 6, batch=4, seed=seed)
        ]

    state = torch.get_rng_state()
    assert values(1) == values(1)
    assert torch.equal(state, torch.get_rng_state())
    asked: list[str] = []
    rows = evaluate_with_baseline(world / "run", "classification", world / "labelled", workers=0, on_model=asked.append)
    assert asked == ["scratch"]
    assert [(row["model"], row["metric"]) for row in rows] == [("scratch", "top1")]
    told = rows[0]["settings"]
    equal = Equal(told["distillation_flops"], told["flops_per_image"])
    assert told["steps"] == equal.steps(told["batch"])
    few = evaluate_with_baseline(world / "run/student", "classification", world / "labelled", workers=0, steps=3)
    assert few[0]["settings"]["steps"] == 3 and "flops_per_image" not in few[0]["settings"]
    with pytest.raises(RecipeError, match="no recipe.yaml to tell what the distillation cost; give --scratch-steps"):
        evaluate_with_baseline(world / "run/student", "classification", world / "labelled", workers=0)


def test_weights_of_two_seeds_differ(world: Path) -> None:  # noqa: F811
    config = load(world / "run").config
    goal = TASKS["semantic"].finetune(TASKS["semantic"].find_splits(world / "masks", "image"))
    one, same, other = (init_from_scratch(config, goal, seed, torch.device("cpu")) for seed in (0, 0, 1))
    pairs = [list(who.encoder.parameters()) + list(who.head.parameters()) for who in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[2], strict=True))

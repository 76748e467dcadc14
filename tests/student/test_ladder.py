"""The side adapter in training: no gradient and no activations of the base, which runs once in a step at most."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from shoulders.config.student import Student
from shoulders.distillation import Trainer, prepare
from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError
from shoulders.features import Batch, Features
from shoulders.student.base import base_layers_needed, check_base
from shoulders.student.encoder import Encoder
from shoulders.teachers import AnyTeachers, Tap, Teacher
from shoulders.training.optimizers import Optimizers
from tests.tiny import BASE_CONFIGS, MEAN, STD, save_base, save_convnext, save_images, tiny_recipe


def build(layers: int = 2, blocks: int = 2) -> Encoder:
    torch.manual_seed(0)
    config = BASE_CONFIGS["dinov2"]()
    config.num_hidden_layers = layers
    base = AutoModel.from_config(config)
    encoder = Encoder(base, {"kind": "side", "width": 16, "blocks": blocks}, MEAN, STD)
    with torch.no_grad():
        for p in encoder.adapter.parameters():
            p.normal_()
    return encoder


def saved_bytes(encoder: Encoder, pixels: Tensor) -> int:
    """Bytes that a forward pass saves for the backward pass, without weights."""
    weights = {p.data_ptr() for p in encoder.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        encoder.train()(pixels)["latent"].spatial.sum().backward()
    return sum(saved.values())


def trainer_of(tmp_path: Path, adapter: dict[str, Any], **transfer: Any) -> Trainer:
    save_base(tmp_path / "base")
    save_images(tmp_path / "images", 80)
    recipe = tiny_recipe(
        tmp_path,
        student__adapter=adapter,
        teachers={"convnext": {"model": str(save_convnext(tmp_path / "convnext"))}},
        images__holdout=None,
        transfer=transfer,
        train={"batch": 4, "steps": 10, "precision": "fp32"},
    )
    return prepare(recipe, {}, DistContext(0, 1, torch.device("cpu")))


def batch() -> Batch:
    torch.manual_seed(1)
    return Batch(torch.arange(4), {(32, 32): torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)})


@pytest.mark.parametrize("blocks", [3, [2], [0, 5]])
def test_input_layers_that_the_base_does_not_have_are_refused(tmp_path: Path, blocks: Any) -> None:
    spec = Student(base=str(save_base(tmp_path)), adapter={"kind": "side", "blocks": blocks})
    with pytest.raises(
        RecipeError, match=r"^student\.adapter\.blocks: an adapter beside a base of 2 blocks takes 1 to 2 layers"
    ):
        check_base(spec, (32, 32))


def test_the_memory_of_the_backward_pass_does_not_grow_with_the_base() -> None:
    pixels = torch.rand(2, 3, 32, 32)
    shallow, deep = (saved_bytes(build(layers, blocks=1), pixels) for layers in (1, 6))
    assert 0 < shallow == deep


def test_no_gradient_reaches_the_base() -> None:
    encoder = build().train()
    encoder.base.requires_grad_(True)  # even if the base is trainable by mistake
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    encoder(pixels)["latent"].spatial.sum().backward()
    assert pixels.grad is None and all(p.grad is None for p in encoder.base.parameters())
    assert any(p.grad is not None for p in encoder.adapter.parameters())


@torch.no_grad()
def test_base_features_from_elsewhere_give_the_same_student_features() -> None:
    encoder = build()
    pixels = torch.rand(2, 3, 32, 32)
    layers = ("latent", "block1")
    base = encoder.base_features(pixels, tuple(dict.fromkeys((*encoder.adapter.input_layers, *layers))))
    live, adapted = encoder(pixels, layers), encoder.adapt(base, pixels, layers)
    assert all(equal(live[layer], adapted[layer]) for layer in layers)
    assert not equal(base["latent"], live["latent"])
    assert equal(base["block1"], live["block1"])


def equal(one: Features, other: Features) -> bool:
    """Whether summary and spatial features are the same bits."""
    return all(torch.equal(a, b) for a, b in zip(one.components().values(), other.components().values(), strict=True))


@pytest.mark.parametrize("preserve", [0.0, 1.0])
@pytest.mark.parametrize("adapter", [{"kind": "side", "width": 16, "blocks": 2}, {"kind": "bottleneck", "width": 4}])
def test_the_layers_needed_of_the_base_are_known_without_its_weights(
    tmp_path: Path, adapter: dict[str, Any], preserve: float
) -> None:
    trainer = trainer_of(tmp_path, adapter, preserve=preserve, layers=["block1", "latent"])
    recipe = trainer.recipe
    assert base_layers_needed(recipe.student, recipe.transfer.layers, preserve > 0) == trainer.student.base_layers


class FixedTeachers(AnyTeachers):
    """Teachers whose features exist already, as those of a cache do."""

    def __init__(self, features: dict[str, Features]) -> None:
        super().__init__(bf16=False, sources=None)
        self.features = features

    @property
    def taps(self) -> dict[str, Tap]:
        return {}

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return []

    @property
    def render_sizes(self) -> list[tuple[int, int]]:
        return []

    def preprocessing(self) -> dict[str, list[list[float]]]:
        return {}

    def provenance(self) -> dict[str, dict[str, str | None]]:
        return {}

    def forward(self, batch: Batch) -> dict[str, Features]:
        return dict(self.features)

    def __getitem__(self, name: str) -> Teacher:
        raise KeyError(name)


def test_a_step_runs_the_base_once_and_not_at_all_with_cached_features(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {"kind": "side", "width": 16, "blocks": 2}, preserve=1.0)
    base_runs: list[int] = []
    trainer.student.encoder.base.register_forward_hook(lambda *_: base_runs.append(1))
    before = copy.deepcopy(trainer.module.state_dict())
    live = trainer.step(1, batch())
    assert len(base_runs) == 1

    features = FixedTeachers(trainer.step.teacher_features(batch()))
    trainer.module.load_state_dict(before)
    base_runs.clear()
    optimizers = Optimizers(trainer.module, trainer.recipe.train)
    again = replace(trainer.step, teachers=features, optimizers=optimizers)(1, batch())
    assert not base_runs and torch.equal(live.loss, again.loss)

"""The side adapter: what it reads, that nothing of the base is kept for it, and that the base is asked once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from shoulders.config.recipe import Student, check_recipe
from shoulders.distillation import Run, prepare
from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError
from shoulders.features import Batch, Features
from shoulders.student.base import asked_of_base, check_base
from shoulders.student.convolutions import Convolutions
from shoulders.student.encoder import Encoder
from shoulders.student.kinds import places_read
from tests.tiny import BASE_CONFIGS, MEAN, STD, save_base, save_convnext, save_images


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


def kept_bytes(encoder: Encoder, pixels: Tensor) -> int:
    """What a forward pass keeps for the backward one, weights aside."""
    weights = {p.data_ptr() for p in encoder.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        encoder.train()(pixels)["latent"].parts()["spatial"].sum().backward()
    return sum(kept.values())


def run(tmp_path: Path, adapter: dict[str, Any], **transfer: Any) -> Run:
    save_images(tmp_path / "images", 80)
    recipe = check_recipe(
        {
            "student": {"base": str(save_base(tmp_path / "base")), "adapter": adapter},
            "teachers": {"convnext": {"model": str(save_convnext(tmp_path / "convnext"))}},
            "images": {"path": str(tmp_path / "images"), "size": 32, "workers": 0},
            "transfer": transfer,
            "train": {"batch": 4, "steps": 10, "precision": "fp32"},
            "out": str(tmp_path / "run"),
        }
    )
    return prepare(recipe, {}, DistContext(0, 1, torch.device("cpu")))


def batch() -> Batch:
    torch.manual_seed(1)
    return Batch(torch.arange(4), {(32, 32): torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)})


def test_places_are_evenly_spaced_or_as_named() -> None:
    assert places_read(12, 4) == ("block2", "block5", "block8", "latent")
    assert places_read(6, 6) == ("block0", "block1", "block2", "block3", "block4", "latent")
    assert places_read(12, 1) == ("latent",)
    assert places_read(12, [0, 11]) == ("block0", "block11", "latent")


@pytest.mark.parametrize("blocks", [3, [2], [0, 5]])
def test_places_that_the_base_does_not_have_are_refused(tmp_path: Path, blocks: Any) -> None:
    spec = Student(base=str(save_base(tmp_path)), adapter={"kind": "side", "blocks": blocks})
    with pytest.raises(RecipeError, match=r"^student\.adapter\.blocks: a base of 2 blocks is read at 1 to 2 places"):
        check_base(spec, (32, 32))


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_base() -> None:
    pixels = torch.rand(2, 3, 32, 32)
    shallow, deep = (kept_bytes(build(layers, blocks=1), pixels) for layers in (1, 6))
    assert 0 < shallow == deep


def test_no_gradient_reaches_the_base() -> None:
    encoder = build().train()
    encoder.base.requires_grad_(True)  # even where somebody forgot that it is frozen
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    encoder(pixels)["latent"].parts()["spatial"].sum().backward()
    assert pixels.grad is None and all(p.grad is None for p in encoder.base.parameters())
    assert any(p.grad is not None for p in encoder.adapter.parameters())


@torch.no_grad()
def test_fed_with_what_the_base_said_it_says_the_same() -> None:
    encoder = build()
    pixels = torch.rand(2, 3, 32, 32)
    places = ("latent", "block1")
    said = encoder.own(pixels, tuple(dict.fromkeys((*encoder.adapter.input_layers, *places))))
    live, fed = encoder(pixels, places), encoder.refine(said, pixels, places)
    for place in places:
        for part, x in live[place].parts().items():
            assert torch.equal(x, fed[place].parts()[part])
    assert not torch.equal(said["latent"].parts()["summary"], live["latent"].parts()["summary"])
    assert torch.equal(said["block1"].parts()["spatial"], live["block1"].parts()["spatial"])


@pytest.mark.parametrize("preserve", [0.0, 1.0])
@pytest.mark.parametrize("adapter", [{"kind": "side", "width": 16, "blocks": 2}, {"kind": "bottleneck", "width": 4}])
def test_what_is_asked_of_the_base_is_known_before_its_weights(
    tmp_path: Path, adapter: dict[str, Any], preserve: float
) -> None:
    going = run(tmp_path, adapter, preserve=preserve, layers=["block1", "latent"])
    how = going.recipe
    assert asked_of_base(how.student, how.transfer.layers, preserve > 0) == going.student.asks


def test_a_step_asks_the_base_once_and_not_at_all_where_somebody_else_did(tmp_path: Path) -> None:
    going = run(tmp_path, {"kind": "side", "width": 16, "blocks": 2}, preserve=1.0)
    asked: list[int] = []
    going.student.encoder.base.register_forward_hook(lambda *_: asked.append(1))
    before = copy.deepcopy(going.learner.state_dict())
    live = going.step(1, batch())
    assert len(asked) == 1

    told = going.teach(batch())
    going.learner.load_state_dict(before)
    going.optimization = type(going.optimization)(going.learner, going.recipe.train)
    going.teachers.forward = lambda images, asked: dict(told)  # type: ignore[method-assign, assignment, misc]
    asked.clear()
    again = going.step(1, batch())
    assert not asked and torch.equal(live[0], again[0])


def test_maps_of_any_base_are_refined_in_bf16_too() -> None:
    beside = Convolutions(("latent",), 8, 32, 1)
    said = {"latent": Features(torch.zeros(2, 8), torch.zeros(2, 16, 8), (4, 4))}  # patches of 16 px, the stem has 8
    with torch.autocast("cpu", torch.bfloat16):
        latent = beside.refine(said, torch.rand(2, 3, 64, 64))["latent"]
    assert latent.grid == (4, 4)

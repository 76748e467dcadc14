"""The encoder: features of every base family, with each kind of adapter on and off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from shoulders.student.encoder import Encoder
from shoulders.student.families import BASES
from tests.tiny import ADAPTERS, BASE_CONFIGS, MEAN, STD


def build(kind: str, adapter: dict[str, Any]) -> tuple[Encoder, Any]:
    """An encoder, and a separate copy of its base."""
    torch.manual_seed(0)
    config = BASE_CONFIGS[kind]()
    # frozen like the base of the encoder: attention layers of torch take another code path for trainable weights
    base = AutoModel.from_config(config, **BASES[kind].build).eval().requires_grad_(False)
    return Encoder(copy.deepcopy(base), adapter, MEAN, STD).eval(), base


def run_transformers(base: Any, pixels: Tensor) -> Any:
    """The output of the base by transformers alone, with hidden states."""
    normalised = (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    return base(normalised, output_hidden_states=True, **BASES[base.config.model_type].forward)


def reference_summary(kind: str, output: Any) -> Tensor:
    """The pooled output of transformers; the base of a ViT has no pooler."""
    return output.last_hidden_state[:, 0] if kind == "vit" else output.pooler_output


def randomize(encoder: Encoder) -> None:
    """Give the adapter random weights."""
    with torch.no_grad():
        for p in encoder.adapter.parameters():
            p.normal_()


def test_every_base_family_is_tested() -> None:
    assert set(BASE_CONFIGS) == set(BASES)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter["kind"])
@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_the_student_equals_its_base_when_untrained_and_when_the_adapter_is_off(
    kind: str, adapter: dict[str, Any]
) -> None:
    encoder, base = build(kind, adapter)
    pixels = torch.rand(2, 3, 32, 48)
    output = run_transformers(base, pixels)
    patches, summary = output.last_hidden_state[:, encoder.prefix :], reference_summary(kind, output)
    for untrained in (True, False):
        latent = encoder(pixels)["latent"]
        assert latent.grid == (4, 6)
        assert torch.equal(latent.spatial, patches) == untrained
        assert torch.equal(latent.summary, summary) == untrained
        with encoder.adapters_disabled():
            latent = encoder(pixels)["latent"]
        assert torch.equal(latent.spatial, patches) and torch.equal(latent.summary, summary)
        randomize(encoder)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter["kind"])
def test_adapters_are_on_again_after_the_context(adapter: dict[str, Any]) -> None:
    encoder, _ = build("dinov2", adapter)
    randomize(encoder)
    pixels = torch.rand(1, 3, 32, 32)
    before = encoder(pixels)["latent"]
    with encoder.adapters_disabled(), encoder.adapters_disabled():
        pass
    assert torch.equal(encoder(pixels)["latent"].spatial, before.spatial)
    with pytest.raises(KeyError), encoder.adapters_disabled():
        raise KeyError
    assert torch.equal(encoder(pixels)["latent"].spatial, before.spatial)


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_block_features_are_the_hidden_states_of_the_base(kind: str) -> None:
    encoder, base = build(kind, ADAPTERS[0])
    pixels = torch.rand(2, 3, 32, 32)
    features = encoder(pixels, ["block0", "latent", "block1"])
    assert list(features) == ["block0", "latent", "block1"]
    hidden = run_transformers(base, pixels).hidden_states
    for block in (0, 1):
        tokens = hidden[block + 1]  # (B, prefix + N, D)
        assert torch.equal(features[f"block{block}"].spatial, tokens[:, encoder.prefix :])
        # SigLIP has no CLS token: the mean of its tokens stands for the image
        summary = tokens.mean(1) if kind == "siglip_vision_model" else tokens[:, 0]
        assert torch.equal(features[f"block{block}"].summary, summary)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter["kind"])
def test_only_the_adapter_is_trained(adapter: dict[str, Any]) -> None:
    encoder, _ = build("dinov2", adapter)
    before = copy.deepcopy(encoder.base.state_dict())
    trainable = [p for p in encoder.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in encoder.adapter.parameters()}
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    for _ in range(3):
        encoder.train()(torch.rand(2, 3, 32, 32))["latent"].spatial.sin().sum().backward()
        optimizer.step()
    assert encoder.adapter.training and not encoder.base.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.base.state_dict().items())


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter["kind"])
def test_base_features_are_those_with_the_adapter_off(adapter: dict[str, Any]) -> None:
    encoder, _ = build("dinov2", adapter)
    randomize(encoder)
    pixels = torch.rand(1, 3, 32, 32)
    layers = ("block0", "latent")
    alone: dict[str, Any] = encoder.base_features(pixels, layers)
    with encoder.adapters_disabled():
        off = encoder(pixels, layers)
    for layer in layers:
        assert torch.equal(alone[layer].spatial, off[layer].spatial)
        assert torch.equal(alone[layer].summary, off[layer].summary)
        assert not alone[layer].spatial.requires_grad


def test_a_copy_has_its_own_adapter() -> None:
    encoder, _ = build("vit", ADAPTERS[1])
    twin = copy.deepcopy(encoder)
    pixels = torch.rand(1, 3, 32, 32)
    before = twin(pixels)["latent"].spatial
    randomize(encoder)
    assert torch.equal(twin(pixels)["latent"].spatial, before)


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (0, 32)])
def test_an_illegal_input_size_is_refused_with_the_nearest_legal_one(size: tuple[int, int]) -> None:
    encoder, _ = build("dinov2", ADAPTERS[0])
    nearest = tuple(32 if side else 8 for side in size)
    with pytest.raises(ValueError) as error:
        encoder.grid(size)
    assert str(error.value) == f"input size {size} is not a multiple of the patch size 8: the nearest is {nearest}"


@pytest.mark.parametrize("layer", ["block2", "block7", "stem", "block-1"])
def test_an_unknown_layer_is_refused(layer: str) -> None:
    encoder, _ = build("dinov2", ADAPTERS[0])
    with pytest.raises(ValueError, match=f"layer '{layer}' is not one of latent, block0 .. block1"):
        encoder(torch.rand(1, 3, 32, 32), [layer])

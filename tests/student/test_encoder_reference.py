"""The encoder's parts between pixels and features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from shoulders.features import Features
from shoulders.student.convolutions import Convolutions
from shoulders.student.encoder import Encoder
from tests.tiny import ADAPTERS, BASE_CONFIGS, MEAN, STD


def build(kind: str, adapter: dict[str, Any], **changes: int) -> Encoder:
    """An encoder with a random adapter."""
    torch.manual_seed(0)
    config = BASE_CONFIGS[kind]()
    config.update(changes)
    encoder = Encoder(AutoModel.from_config(config), adapter, MEAN, STD)
    with torch.no_grad():
        for p in encoder.adapter.parameters():
            p.normal_(std=0.3)
    return encoder


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("registers", [0, 3])
def test_cls_and_register_tokens_stand_before_the_patch_tokens(kind: str, registers: int) -> None:
    encoder = build(kind, ADAPTERS[0], num_register_tokens=registers)
    assert encoder.prefix == 1 + registers
    latent = encoder(torch.rand(1, 3, 32, 48))["latent"]
    assert latent.grid == (4, 6) and latent.components()["spatial"].shape[1] == 24


def test_the_mode_is_that_of_the_adapter() -> None:
    encoder = build("dinov2", ADAPTERS[0])
    for mode in (False, True):
        assert encoder.train(mode) is encoder
        assert encoder.adapter.training == mode and not encoder.base.training


@torch.no_grad()
def test_an_adapter_of_convolutions_takes_normalised_pixels() -> None:
    encoder = build("dinov2", ADAPTERS[3])
    pixels = torch.rand(2, 3, 32, 32)
    normalised = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    base_features = encoder.base_features(pixels, ("block0", "latent"))
    expected = encoder.adapter.adapt(base_features, normalised)["latent"]
    result = encoder.adapt(base_features, pixels)["latent"]
    assert result.spatial is not None and torch.allclose(result.spatial, expected.components()["spatial"], atol=1e-5)
    raw = encoder.adapter.adapt(base_features, pixels)["latent"]
    assert not torch.allclose(result.spatial, raw.components()["spatial"], atol=1e-2)


def test_base_features_have_no_gradient() -> None:
    encoder = build("dinov2", ADAPTERS[0])
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not encoder.base_features(pixels)["latent"].components()["spatial"].requires_grad
    assert encoder(pixels)["latent"].components()["spatial"].requires_grad


@torch.no_grad()
def test_an_adapter_beside_the_base_takes_all_of_its_input_layers() -> None:
    encoder = build("dinov2", {"kind": "conv", "width": 32, "depth": 1, "blocks": [0]})
    assert encoder.adapter.input_layers == ("block0", "latent")
    pixels = torch.rand(1, 3, 32, 32)
    expected = encoder.adapt(encoder.base_features(pixels, ("block0", "latent")), pixels)["latent"]
    assert torch.equal(encoder(pixels)["latent"].components()["spatial"], expected.components()["spatial"])


@torch.no_grad()
def test_the_stem_halves_the_pixels_three_times_and_its_map_is_averaged_down_to_the_grid() -> None:
    adapter = Convolutions(("latent",), 8, 64, 1)
    convolutions = [module for module in adapter.stem if isinstance(module, torch.nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels, conv.stride) for conv in convolutions] == [
        (3, 16, (2, 2)),
        (16, 32, (2, 2)),
        (32, 64, (2, 2)),
    ]
    for parameter in adapter.parameters():
        parameter.normal_(std=0.3)
    pixels = torch.randn(2, 3, 64, 64)  # a map of 8 x 8, a grid of 4 x 4
    base = Features(torch.randn(2, 8), torch.randn(2, 16, 8), (4, 4))
    image = adapter.stem(pixels)
    result = adapter.adapt({"latent": base}, pixels)["latent"].components()["spatial"]
    for antialias in (True, False):
        resized = F.interpolate(image, (4, 4), mode="bilinear", antialias=antialias)
        expected = adapter.rungs["latent"](resized, base)[1].components()["spatial"]
        assert torch.allclose(result, expected, atol=1e-4) == antialias

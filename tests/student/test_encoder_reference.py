"""The encoder's parts between pixels and features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel

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

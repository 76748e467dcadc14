from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModel

from shoulders.student.encoder import BASES, Encoder
from tests.tiny import ADAPTERS, BASE_CONFIGS, MEAN, STD


def build(kind: str, adapter: dict[str, Any]) -> tuple[Encoder, Any]:
    torch.manual_seed(0)
    config = BASE_CONFIGS[kind]()
    # frozen like the one inside: attention layers of torch choose another path for weights that could learn
    base = AutoModel.from_config(config, **BASES[kind].build).eval().requires_grad_(False)
    return Encoder(copy.deepcopy(base), adapter, MEAN, STD).eval(), base


def raw(base: Any, pixels: torch.Tensor) -> Any:
    normalised = (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    return base(normalised, output_hidden_states=True, **BASES[base.config.model_type].forward)


def shake(encoder: Encoder) -> None:
    with torch.no_grad():
        for p in encoder.adapter.parameters():
            p.normal_()


def test_every_base_family_is_tested() -> None:
    assert set(BASE_CONFIGS) == set(BASES)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a["kind"])
@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_it_is_the_base_at_birth_and_whenever_the_adapter_is_off(kind: str, adapter: dict[str, Any]) -> None:
    encoder, base = build(kind, adapter)
    pixels = torch.rand(2, 3, 32, 48)
    out = raw(base, pixels)
    for born in (True, False):
        latent = encoder(pixels)["latent"]
        assert latent.grid == (4, 6)
        assert torch.equal(latent.parts()["spatial"], out.last_hidden_state[:, encoder.prefix :]) == born
        assert torch.equal(latent.parts()["summary"], summary_of(kind, out)) == born
        with encoder.adapters_disabled():
            latent = encoder(pixels)["latent"]
        assert torch.equal(latent.parts()["spatial"], out.last_hidden_state[:, encoder.prefix :])
        assert torch.equal(latent.parts()["summary"], summary_of(kind, out))
        shake(encoder)


def summary_of(kind: str, out: Any) -> torch.Tensor:
    """What transformers itself calls the vector of the whole image; ViT's pooler is not part of the base."""
    return out.last_hidden_state[:, 0] if kind == "vit" else out.pooler_output


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_blocks_are_the_bases_hidden_states(kind: str) -> None:
    encoder, base = build(kind, ADAPTERS[0])
    pixels = torch.rand(1, 3, 32, 32)
    seen = encoder(pixels, ["block0", "latent", "block1"])
    assert list(seen) == ["block0", "latent", "block1"]
    hidden = raw(base, pixels).hidden_states
    for block in (0, 1):
        assert torch.equal(seen[f"block{block}"].parts()["spatial"], hidden[block + 1][:, encoder.prefix :])


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a["kind"])
def test_only_the_adapter_learns_and_the_base_stays_as_it_is(adapter: dict[str, Any]) -> None:
    encoder, base = build("dinov2", adapter)
    before = copy.deepcopy(encoder.base.state_dict())
    learns = [p for p in encoder.parameters() if p.requires_grad]
    assert {id(p) for p in learns} == {id(p) for p in encoder.adapter.parameters()}
    optimizer = torch.optim.AdamW(learns, lr=0.1)
    for _ in range(3):
        encoder.train()(torch.rand(2, 3, 32, 32))["latent"].parts()["spatial"].sin().sum().backward()
        optimizer.step()
    assert not encoder.base.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.base.state_dict().items())


def test_a_copy_has_its_own_adapter() -> None:
    encoder, _ = build("vit", ADAPTERS[1])
    twin = copy.deepcopy(encoder)
    pixels = torch.rand(1, 3, 32, 32)
    before = twin(pixels)["latent"].parts()["spatial"]
    shake(encoder)
    assert torch.equal(twin(pixels)["latent"].parts()["spatial"], before)


def test_lora_reaches_every_linear_layer_of_the_blocks_and_nothing_else() -> None:
    encoder, base = build("dinov3_vit", {"kind": "lora", "rank": 2, "alpha": 2.0})
    blocks = base.get_submodule("model.layer")
    expected = {name.replace(".", "-") for name, m in blocks.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(encoder.adapter.get_submodule("parts")._modules) == expected
    assert len(expected) == 12  # q, k, v, o, up, down in each of two blocks


def test_bad_sizes_and_places_are_named_with_the_nearest_legal_ones() -> None:
    encoder, _ = build("dinov2", ADAPTERS[0])
    with pytest.raises(
        ValueError, match=r"\(30, 32\) is not a multiple of the patch size 8: the nearest is \(32, 32\)"
    ):
        encoder(torch.rand(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"'block7' is not one of latent, block0 .. block1"):
        encoder(torch.rand(1, 3, 32, 32), ["block7"])

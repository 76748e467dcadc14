"""Adapters: their arithmetic against references written here, and the names of their weights, which files depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from shoulders.features import Features
from shoulders.student.adapters import Bottleneck, LowRank
from shoulders.student.convolutions import Convolutions, ConvStage, Residual
from shoulders.student.encoder import Encoder
from shoulders.student.kinds import build_adapter, select_input_layers
from shoulders.student.ladder import Ladder, SelfAttention
from tests.tiny import ADAPTERS, BASE_CONFIGS, MEAN, STD

WEIGHT_BIAS = ("weight", "bias")
# names within the adapter that a saved student depends on: a change would make all saved students unreadable
LADDER_BLOCK = [
    "gate",
    *(f"{name}.{kind}" for name in ("down", "mixing.norm", "mixing.qkv", "mixing.out") for kind in WEIGHT_BIAS),
    *(f"mlp.{i}.{kind}" for i in (0, 1, 3) for kind in WEIGHT_BIAS),
]
CONV_STAGE = [
    f"{name}.{kind}"
    for name in ("down", "norm", "up.summary", "up.spatial", *(f"mix.0.layers.{i}" for i in (0, 2, 3, 5)))
    for kind in WEIGHT_BIAS
]
CONV_STEM = [f"{i}.{kind}" for i in (0, 1, 3, *(f"4.layers.{i}" for i in (0, 2, 3, 5)), 5, 7) for kind in WEIGHT_BIAS]
LINEARS = [*(f"attention-{name}_proj" for name in "qkvo"), "mlp-fc1", "mlp-fc2"]
STATE_KEYS = {
    "bottleneck": [
        f"parts.{block}-mlp.{name}"
        for block in (0, 1)
        for name in ("scale", *(f"{layer}.{kind}" for layer in ("down", "up") for kind in WEIGHT_BIAS))
    ],
    "lora": [f"parts.{block}-{linear}.{name}.weight" for block in (0, 1) for linear in LINEARS for name in "ab"],
    "side": [
        *(f"rungs.{layer}.{name}" for layer in ("block0", "latent") for name in LADDER_BLOCK),
        *(f"{name}.{kind}" for name in ("norm", "up") for kind in WEIGHT_BIAS),
    ],
    "conv": [*(f"stem.{name}" for name in CONV_STEM), *(f"rungs.latent.{name}" for name in CONV_STAGE)],
}


def randomize(module: nn.Module) -> None:
    """Random weights, so that nothing is zero or one by initialisation."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)


def features(batch: int, grid: tuple[int, int], width: int) -> Features:
    """Random features."""
    torch.manual_seed(2)
    return Features(torch.randn(batch, width), torch.randn(batch, grid[0] * grid[1], width), grid)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter["kind"])
def test_the_names_of_saved_weights_do_not_change(adapter: dict[str, Any]) -> None:
    encoder = Encoder(AutoModel.from_config(BASE_CONFIGS["dinov2"]()), adapter, MEAN, STD)
    assert set(encoder.adapter.state_dict()) == set(STATE_KEYS[adapter["kind"]])
    assert {name.split(".")[0] for name in encoder.state_dict()} == {"base", "adapter", "mean", "std"}


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="adapter kind 'prefix' is not one of bottleneck, lora, side, conv"):
        build_adapter("prefix", nn.ModuleList(), 8)


def test_bottleneck_adds_scaled_up_gelu_down_to_the_output_of_the_mlp() -> None:
    mlp = nn.Linear(6, 6)
    adapter = Bottleneck(mlp, 6, 3)
    x = torch.randn(2, 5, 6)
    plain = F.linear(x, mlp.weight, mlp.bias)
    assert adapter.scale == 1 and torch.equal(mlp(x), plain)
    randomize(adapter)
    hidden = F.gelu(x @ adapter.down.weight.T + adapter.down.bias)  # (B, N, 3)
    update = hidden @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(mlp(x), plain + adapter.scale * update)


def test_lora_adds_alpha_over_rank_times_b_a_x() -> None:
    linear = nn.Linear(6, 4)
    adapter = LowRank(linear, rank=2, alpha=6.0)
    x = torch.randn(3, 6)
    plain = F.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear(x), plain)
    randomize(adapter)
    merged = linear.weight + 6.0 / 2 * adapter.b.weight @ adapter.a.weight  # (4, 6)
    torch.testing.assert_close(linear(x), x @ merged.T + linear.bias)


def test_lora_is_at_every_linear_layer_of_the_blocks_and_nowhere_else() -> None:
    base = AutoModel.from_config(BASE_CONFIGS["dinov3_vit"]())
    encoder = Encoder(base, {"kind": "lora", "rank": 2, "alpha": 2.0}, MEAN, STD)
    blocks = base.get_submodule("model.layer")
    expected = {name.replace(".", "-") for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, _ in encoder.adapter.get_submodule("parts").named_children()} == expected
    assert len(expected) == 12  # q, k, v, o, up, down in each of two blocks


def reference_attention(module: SelfAttention, x: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention, head by head."""
    q, k, v = module.qkv(module.norm(x)).chunk(3, -1)
    width = q.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5  # (B, 1 + N, 1 + N)
        outputs.append(scores.softmax(-1) @ v[..., part])
    return x + module.out(torch.cat(outputs, -1))


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (128, 2)])
@torch.no_grad()
def test_the_ladder_is_gated_attention_and_mlp_added_to_the_latent(width: int, heads: int) -> None:
    ladder = Ladder(("block0", "latent"), 8, width)
    randomize(ladder)
    base: dict[str, Any] = {"block0": features(2, (2, 3), 8), "latent": features(2, (2, 3), 8).map(lambda x: 3 * x + 1)}
    x: Any = 0.0
    block: Any
    for layer, block in ladder.rungs.items():
        tokens = torch.cat([base[layer].summary[:, None], base[layer].spatial], 1)
        mean, var = tokens.mean(-1, keepdim=True), tokens.var(-1, correction=0, keepdim=True)
        x = x + block.gate * block.down((tokens - mean) / (var + 1e-5).sqrt())
        x = reference_attention(block.mixing, x, heads)
        norm, first, _, second = block.mlp
        x = x + second(F.gelu(first(norm(x))))
    update = ladder.up(ladder.norm(x))
    result = ladder.adapt(base, torch.zeros(2, 3, 8, 8))
    torch.testing.assert_close(result["latent"].summary, base["latent"].summary + update[:, 0])
    torch.testing.assert_close(result["latent"].spatial, base["latent"].spatial + update[:, 1:])
    assert result["block0"] is base["block0"]


@torch.no_grad()
def test_a_residual_block_is_x_plus_two_normed_convolutions() -> None:
    block = Residual(16)
    randomize(block)
    x = torch.randn(2, 16, 5, 4)
    norm1: Any
    conv1: Any
    norm2: Any
    conv2: Any
    norm1, _, conv1, norm2, _, conv2 = block.layers
    inner = F.conv2d(F.gelu(F.group_norm(x, 8, norm1.weight, norm1.bias)), conv1.weight, conv1.bias, padding=1)
    inner = F.conv2d(F.gelu(F.group_norm(inner, 8, norm2.weight, norm2.bias)), conv2.weight, conv2.bias, padding=1)
    torch.testing.assert_close(block(x), x + inner)


@torch.no_grad()
def test_a_stage_of_convolutions_adds_its_map_to_summary_and_spatial() -> None:
    stage = ConvStage(6, 16, depth=1)
    randomize(stage)
    base = features(2, (3, 4), 6)
    assert base.spatial is not None and base.summary is not None
    x = torch.randn(2, 16, 3, 4)
    mean, var = base.spatial.mean(-1, keepdim=True), base.spatial.var(-1, correction=0, keepdim=True)
    tokens = stage.down((base.spatial - mean) / (var + 1e-5).sqrt())  # (B, N, W)
    image = stage.mix(x + tokens.transpose(1, 2).reshape(2, 16, 3, 4))
    update = stage.norm(image.flatten(2).transpose(1, 2))
    following, student = stage(x, base)
    torch.testing.assert_close(following, image)
    torch.testing.assert_close(student.spatial, base.spatial + stage.up["spatial"](update))
    torch.testing.assert_close(student.summary, base.summary + stage.up["summary"](update.mean(1)))


@torch.no_grad()
def test_stages_follow_each_other_on_the_map_of_the_pixels() -> None:
    adapter = Convolutions(("block0", "latent"), 6, 32, 1)
    randomize(adapter)
    pixels = torch.randn(2, 3, 32, 48)
    base = {"block0": features(2, (4, 6), 6), "latent": features(2, (4, 6), 6).map(lambda x: 2 * x)}
    x = adapter.stem(pixels)
    assert x.shape == (2, 32, 4, 6)
    x, first = adapter.rungs["block0"](x, base["block0"])
    _, second = adapter.rungs["latent"](x, base["latent"])
    result = adapter.adapt(base, pixels)
    torch.testing.assert_close(result["block0"].spatial, first.spatial)
    torch.testing.assert_close(result["latent"].spatial, second.spatial)


def test_maps_are_resized_to_the_grid_of_the_base_in_bf16_too() -> None:
    adapter = Convolutions(("latent",), 8, 32, 1)
    base = {"latent": Features(torch.zeros(2, 8), torch.zeros(2, 16, 8), (4, 4))}  # patches of 16 px; the stem has 8
    with torch.autocast("cpu", torch.bfloat16):
        latent = adapter.adapt(base, torch.rand(2, 3, 64, 64))["latent"]
    assert latent.grid == (4, 4)


def test_input_layers_are_evenly_spaced_or_named() -> None:
    assert select_input_layers(12, 4) == ("block2", "block5", "block8", "latent")
    assert select_input_layers(6, 6) == ("block0", "block1", "block2", "block3", "block4", "latent")
    assert select_input_layers(12, 1) == ("latent",)
    assert select_input_layers(12, [0, 11]) == ("block0", "block11", "latent")


@pytest.mark.parametrize("blocks", [3, [2], [-1], [1, 0], [0, 0]])
def test_input_layers_that_the_base_does_not_have_are_refused(blocks: Any) -> None:
    with pytest.raises(ValueError, match="a base of 2 blocks takes 1 to 2 layers, or blocks from 0 to 1"):
        select_input_layers(2, blocks)

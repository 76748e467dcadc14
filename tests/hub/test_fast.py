"""Faster inference gives the same results: each optimization against the code that it replaces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shoulders.hub.fast import (
    ATTENTION_NAME,
    HAS_INT8_LINEAR,
    MAX_PRODUCT_TOKENS,
    Int8Linear,
    PackedLinear,
    attention,
    optimize_for_inference,
    to_int8,
)
from tests.tiny import BASE_CONFIGS


class AttentionLayer(nn.Module):
    is_causal = False


def random_qkv(n_tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value (2, 3, N, 16), with the strides that they have in models."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n_tokens, 3, 16).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    return q, k, v


def gradient(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad.float()


def uses_kernel(n_tokens: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> bool:
    with torch.profiler.profile() as profile:
        attention(AttentionLayer(), *random_qkv(n_tokens, dtype), **options)
    return any(event.key == "aten::scaled_dot_product_attention" for event in profile.key_averages())


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_two_products_equal_the_kernel_up_to_the_rounding_of_bf16(scaling: float | None) -> None:
    inputs, kernel_inputs = random_qkv(50), random_qkv(50)
    q, k, v = exact = tuple(x.detach().float().requires_grad_() for x in inputs)
    ours, weights = attention(AttentionLayer(), *inputs, scaling=scaling)
    kernel = F.scaled_dot_product_attention(*kernel_inputs, scale=scaling).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    assert weights is None and ours.shape == (2, 50, 3, 16) and ours.is_contiguous() and ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, kernel, atol=2e-2, rtol=2e-2)
    for output in (ours, kernel, expected):
        output.sin().sum().backward()
    for x, y, z in zip(inputs, kernel_inputs, exact, strict=True):
        error, kernel_error = ((gradient(one) - gradient(z)).norm() / gradient(z).norm() for one in (x, y))
        assert error < 2e-2 and error < 3 * kernel_error + 1e-3


def test_the_kernel_is_used_where_it_is_faster() -> None:
    assert not uses_kernel(50)
    assert uses_kernel(50, torch.float32)
    assert uses_kernel(MAX_PRODUCT_TOKENS + 1)
    assert uses_kernel(50, attention_mask=torch.zeros(2, 1, 50, 50, dtype=torch.bfloat16))
    assert uses_kernel(50, dropout=0.1) and uses_kernel(50, is_causal=True)


def test_in_fp32_attention_is_the_kernel_bit_for_bit() -> None:
    q, k, v = random_qkv(50, torch.float32)
    assert torch.equal(attention(AttentionLayer(), q, k, v)[0], F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


@pytest.mark.parametrize("kind", BASE_CONFIGS)
@torch.no_grad()
def test_an_optimized_model_gives_the_same_output(kind: str) -> None:
    torch.manual_seed(0)
    plain = transformers.AutoModel.from_config(BASE_CONFIGS[kind]()).eval()
    optimized = copy.deepcopy(plain)
    optimize_for_inference(optimized)
    assert optimized.config._attn_implementation == ATTENTION_NAME and plain.config._attn_implementation == "sdpa"
    assert optimized.config.to_dict() == plain.config.to_dict()  # a saved config does not change
    assert optimized.state_dict().keys() == plain.state_dict().keys()
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(optimized(pixels).last_hidden_state, plain(pixels).last_hidden_state)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            optimized(pixels).last_hidden_state, plain(pixels).last_hidden_state, atol=5e-2, rtol=0
        )


def test_a_model_without_attention_gives_the_same_output() -> None:
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(depths=[1], hidden_sizes=[8], num_stages=1, patch_size=4)
    pixels = torch.rand(1, 3, 32, 32)
    for model in (transformers.ConvNextModel(config).eval(), nn.Conv2d(3, 2, 1)):
        before = copy.deepcopy(model)(pixels)
        optimize_for_inference(model)
        after = model(pixels)
        assert torch.equal(getattr(after, "last_hidden_state", after), getattr(before, "last_hidden_state", before))


def packed_and_plain(bias: bool = True) -> tuple[nn.Sequential, nn.Linear]:
    """A packed linear layer, and the plain layer that it was made from."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    optimized = nn.Sequential(copy.deepcopy(plain))
    optimize_for_inference(optimized)
    assert type(optimized[0]) is PackedLinear
    return optimized, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 48), (2, 33, 48)])
def test_a_packed_layer_gives_the_same_bits(bias: bool, shape: tuple[int, ...]) -> None:
    optimized, plain = packed_and_plain(bias)
    x = torch.randn(shape, requires_grad=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for inputs in (x, x.bfloat16()):
            assert torch.equal(optimized(inputs), plain(inputs)) and optimized(inputs).dtype == torch.bfloat16
    assert torch.equal(optimized(x), plain(x))  # in fp32
    optimized(x).sum().backward()  # and with a gradient
    assert x.grad is not None


@torch.no_grad()
def test_a_packed_layer_uses_its_current_weight_and_can_be_copied() -> None:
    optimized, plain = packed_and_plain()
    x = torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        optimized(x)
        for weight in (optimized.get_parameter("0.weight"), plain.weight):
            weight.mul_(2)
        assert torch.equal(optimized(x), plain(x))
        assert torch.equal(copy.deepcopy(optimized)(x), plain(x))
        optimized.load_state_dict({"0.weight": torch.ones(80, 48), "0.bias": torch.zeros(80)})
        torch.testing.assert_close(optimized(x).float(), x.sum(1, keepdim=True).expand(5, 80), atol=0.2, rtol=0.02)


@pytest.mark.skipif(not HAS_INT8_LINEAR, reason="this torch has no products in int8")
@pytest.mark.parametrize("shift", [0.0, 3.0])
@torch.no_grad()
def test_int8_is_close_to_float32(shift: float) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 64)
    x = torch.randn(2, 40, 96) + shift
    model = nn.Sequential(copy.deepcopy(plain))
    to_int8(model)
    assert isinstance(model[0], Int8Linear) and model(x).shape == (2, 40, 64)
    expected = plain(x)
    assert float((model(x) - expected).norm() / (expected - expected.mean(0)).norm()) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert torch.equal(model(torch.zeros(3, 96)), plain.bias.expand(3, 64))
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        "0.weight": torch.int8,
        "0.scale": torch.float32,
        "0.bias": torch.float32,
    }


@torch.no_grad()
def test_torchs_flop_counter_counts_every_product() -> None:
    optimized, plain = packed_and_plain()
    int8 = nn.Sequential(copy.deepcopy(plain))
    to_int8(int8)
    x = torch.randn(2, 5, 48)
    for model in (plain, optimized, int8):
        with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 2 * 10 * 48 * 80

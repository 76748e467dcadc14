"""Faster must mean the same: each short cut against what it replaces."""

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


class Plain(nn.Module):
    is_causal = False


def draw(places: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value (2, 3, places, 16), with the strides that models give them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, places, 3, 16).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    return q, k, v


def gradient(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad.float()


def kernel_runs(places: int, dtype: torch.dtype = torch.bfloat16, **how: Any) -> bool:
    with torch.profiler.profile() as seen:
        attention(Plain(), *draw(places, dtype), **how)
    return any(event.key == "aten::scaled_dot_product_attention" for event in seen.key_averages())


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_two_products_are_the_kernel_within_the_rounding_of_bf16(scaling: float | None) -> None:
    ours, theirs = draw(50), draw(50)
    q, k, v = exact = tuple(x.detach().float().requires_grad_() for x in ours)
    out, weights = attention(Plain(), *ours, scaling=scaling)
    kernel = F.scaled_dot_product_attention(*theirs, scale=scaling).transpose(1, 2)
    truth = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    assert weights is None and out.shape == (2, 50, 3, 16) and out.is_contiguous() and out.dtype == torch.bfloat16
    torch.testing.assert_close(out, kernel, atol=2e-2, rtol=2e-2)
    for answer in (out, kernel, truth):
        answer.sin().sum().backward()
    for one, other, true in zip(ours, theirs, exact, strict=True):
        off = [float((gradient(x) - gradient(true)).norm() / gradient(true).norm()) for x in (one, other)]
        assert off[0] < 2e-2 and off[0] < 3 * off[1] + 1e-3


def test_the_kernel_stays_where_it_is_the_better_one() -> None:
    assert not kernel_runs(50)
    assert kernel_runs(50, torch.float32)
    assert kernel_runs(MAX_PRODUCT_TOKENS + 1)
    assert kernel_runs(50, attention_mask=torch.zeros(2, 1, 50, 50, dtype=torch.bfloat16))
    assert kernel_runs(50, dropout=0.1) and kernel_runs(50, is_causal=True)


def test_in_fp32_it_is_the_kernel_bit_for_bit() -> None:
    q, k, v = draw(50, torch.float32)
    assert torch.equal(attention(Plain(), q, k, v)[0], F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


@pytest.mark.parametrize("kind", BASE_CONFIGS)
@torch.no_grad()
def test_a_quick_model_says_the_same(kind: str) -> None:
    torch.manual_seed(0)
    slow = transformers.AutoModel.from_config(BASE_CONFIGS[kind]()).eval()
    quick = copy.deepcopy(slow)
    optimize_for_inference(quick)
    assert quick.config._attn_implementation == ATTENTION_NAME and slow.config._attn_implementation == "sdpa"
    assert quick.config.to_dict() == slow.config.to_dict()  # nothing of it is saved
    assert quick.state_dict().keys() == slow.state_dict().keys()
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(quick(pixels).last_hidden_state, slow(pixels).last_hidden_state)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(quick(pixels).last_hidden_state, slow(pixels).last_hidden_state, atol=5e-2, rtol=0)


def test_what_has_no_such_attention_still_answers_the_same() -> None:
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(depths=[1], hidden_sizes=[8], num_stages=1, patch_size=4)
    pixels = torch.rand(1, 3, 32, 32)
    for model in (transformers.ConvNextModel(config).eval(), nn.Conv2d(3, 2, 1)):
        before = copy.deepcopy(model)(pixels)
        optimize_for_inference(model)
        after = model(pixels)
        assert torch.equal(getattr(after, "last_hidden_state", after), getattr(before, "last_hidden_state", before))


def packed(bias: bool = True) -> tuple[nn.Sequential, nn.Linear]:
    """A quick layer and the plain one that it was."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    quick = nn.Sequential(copy.deepcopy(plain))
    optimize_for_inference(quick)
    assert type(quick[0]) is PackedLinear
    return quick, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 48), (2, 33, 48)])
def test_a_packed_layer_says_the_same_bits(bias: bool, shape: tuple[int, ...]) -> None:
    quick, plain = packed(bias)
    x = torch.randn(shape, requires_grad=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            assert torch.equal(quick(given), plain(given)) and quick(given).dtype == torch.bfloat16
    assert torch.equal(quick(x), plain(x))  # in fp32
    quick(x).sum().backward()  # and with a gradient
    assert x.grad is not None


@torch.no_grad()
def test_a_packed_layer_follows_its_weight_and_can_be_copied() -> None:
    quick, plain = packed()
    x = torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        quick(x)
        for weight in (quick.get_parameter("0.weight"), plain.weight):
            weight.mul_(2)
        assert torch.equal(quick(x), plain(x))
        assert torch.equal(copy.deepcopy(quick)(x), plain(x))
        quick.load_state_dict({"0.weight": torch.ones(80, 48), "0.bias": torch.zeros(80)})
        torch.testing.assert_close(quick(x).float(), x.sum(1, keepdim=True).expand(5, 80), atol=0.2, rtol=0.02)


@pytest.mark.skipif(not HAS_INT8_LINEAR, reason="this torch has no products in int8")
@pytest.mark.parametrize("shift", [0.0, 3.0])
@torch.no_grad()
def test_int8_is_near(shift: float) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 64)
    x = torch.randn(2, 40, 96) + shift
    model = nn.Sequential(copy.deepcopy(plain))
    to_int8(model)
    assert isinstance(model[0], Int8Linear) and model(x).shape == (2, 40, 64)
    truth = plain(x)
    assert float((model(x) - truth).norm() / (truth - truth.mean(0)).norm()) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert torch.equal(model(torch.zeros(3, 96)), plain.bias.expand(3, 64))
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        "0.weight": torch.int8,
        "0.scale": torch.float32,
        "0.bias": torch.float32,
    }


@torch.no_grad()
def test_torchs_counter_sees_every_product() -> None:
    quick, plain = packed()
    eight = nn.Sequential(copy.deepcopy(plain))
    to_int8(eight)
    x = torch.randn(2, 5, 48)
    for model in (plain, quick, eight):
        with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 2 * 10 * 48 * 80

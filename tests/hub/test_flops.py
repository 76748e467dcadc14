"""Counted FLOPs are those of the matrix products."""

from __future__ import annotations

import torch
from torch import nn

from shoulders.hub.flops import count_flops


def test_flops_of_a_linear_layer_and_of_its_gradients() -> None:
    x, linear = torch.randn(6, 5, requires_grad=True), nn.Linear(5, 7)
    product = 2 * 6 * 5 * 7
    assert count_flops(lambda: linear(x)) == product
    assert count_flops(lambda: linear(x.detach()).sum().backward()) == 2 * product  # forward, gradient of the weight
    assert count_flops(lambda: linear(x).sum().backward()) == 3 * product  # and of the input


def test_flops_of_attention() -> None:
    q = torch.randn(2, 3, 10, 4, requires_grad=True)  # (B, heads, N, C / heads)

    def attend() -> None:
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    # two products forward, and for each of them two backward
    assert count_flops(attend) == 3 * 2 * (2 * 2 * 3 * 10 * 10 * 4)

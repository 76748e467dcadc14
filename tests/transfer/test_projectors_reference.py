"""Projectors against loops over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoulders.transfer.projectors import ProjectorMLP


@pytest.mark.parametrize(
    ("hidden", "factor", "expected"), [(12, 1, 12), (12, 2, 6), (12, 3, 4), (13, 2, 6), (3, 2, 1), (1, 3, 1)]
)
def test_the_hidden_width_is_divided_by_the_upsampling_factor(hidden: int, factor: int, expected: int) -> None:
    """Each token then has factor x factor hidden vectors: the cost grows with the factor, not with its square."""
    mlp = ProjectorMLP(5, ["latent"], hidden, 7, factor)
    assert [tuple(p.shape) for p in mlp.parameters()] == [
        (expected * factor**2, 5),
        (expected * factor**2,),
        (7, expected),
        (7,),
    ]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_each_token_gives_its_own_square_of_the_finer_grid(factor: int) -> None:
    torch.manual_seed(0)
    h, w, layers = 2, 3, ("block0", "latent")
    mlp = ProjectorMLP(5, layers, 12, 4, factor)
    features = {layer: torch.randn(2, h * w, 5) for layer in layers}
    output = mlp(features, (h, w)).view(2, h * factor, w * factor, 4)
    hidden_width = 12 // factor
    for token in range(h * w):
        products = [features[layer][:, token] @ mlp.get_parameter(f"first.{layer}.weight").T for layer in layers]
        sums = products[0] + products[1] + mlp.get_parameter("first.block0.bias")  # one bias for the sum
        for i in range(factor):
            for j in range(factor):
                start = (i * factor + j) * hidden_width
                expected = mlp.last(F.gelu(sums[:, start : start + hidden_width]))
                row, column = token // w * factor + i, token % w * factor + j
                assert torch.allclose(output[:, row, column], expected, atol=1e-6)

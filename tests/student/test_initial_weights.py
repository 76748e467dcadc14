"""The distributions of an adapter's initial weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoulders.student.adapters import Bottleneck, LowRank
from shoulders.student.convolutions import ConvStage
from shoulders.student.ladder import Ladder


@torch.no_grad()
def test_lora_starts_with_a_uniform_in_1_over_the_root_of_the_inputs_and_b_zero() -> None:
    """As in LoRA's own code: Kaiming's uniform distribution with a = sqrt(5)."""
    torch.manual_seed(0)
    adapter = LowRank(nn.Linear(400, 10), 50, 8.0)
    assert 0.999 < float(adapter.a.weight.abs().max()) * 20 <= 1
    assert float(adapter.a.weight.std()) * 20 == pytest.approx(1 / 3**0.5, rel=0.02)
    assert not adapter.b.weight.any() and adapter.a.bias is None and adapter.b.bias is None


@torch.no_grad()
def test_a_bottleneck_starts_with_down_normal_and_all_else_zero() -> None:
    """Deviation sqrt(2 / inputs), as for a ReLU (arXiv 1502.01852)."""
    torch.manual_seed(0)
    adapter = Bottleneck(nn.Identity(), 200, 100)
    assert float(adapter.down.weight.std()) == pytest.approx(0.1, rel=0.02)
    assert float(adapter.down.weight.abs().max()) > 0.35  # a uniform distribution of this deviation ends at .173
    assert not adapter.down.bias.any() and not adapter.up.weight.any() and not adapter.up.bias.any()


@torch.no_grad()
def test_adapters_beside_the_base_start_with_an_output_of_zero() -> None:
    ladder, stage = Ladder(("block0", "latent"), 8, 16), ConvStage(8, 16, 1)
    for parameter in (*ladder.up.parameters(), *stage.up.parameters()):
        assert not parameter.any()
    assert all(bool((gate == 1).all()) for name, gate in ladder.named_parameters() if name.endswith("gate"))

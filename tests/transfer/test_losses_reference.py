"""The objective's joint t2s term in closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoulders.features import Features
from shoulders.transfer import balance
from shoulders.transfer.distances import distance
from shoulders.transfer.losses import Settings, kpu

B, N, D = 3, 4, 8
GRID = (2, 2)


def features(seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(B, D, generator=generator), torch.randn(B, N, D, generator=generator), GRID)


def test_joint_t2s_is_the_mean_over_summary_and_spatial() -> None:
    latent, prediction, target, joint = (features(seed) for seed in range(4))

    def loss(t2s: str) -> float:
        settings = Settings(preserve=1.0, t2s=t2s, t2s_weight=0.3, t2s_grad_to="both")
        return float(
            kpu(
                latent,
                {"one/last": prediction},
                {"one/last": target},
                lambda present: {"joint": joint},
                distance("mse"),
                balance.uniform,
                settings,
            )[0]
        )

    def mse(component: str) -> float:
        normalized = F.layer_norm(latent.components()[component], (D,))
        return float((normalized - joint.components()[component]).square().mean())

    assert loss("joint") - loss("none") == pytest.approx(0.3 * (mse("summary") + mse("spatial")) / 2, rel=1e-5)

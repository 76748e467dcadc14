"""The KPU loss where teachers have features of some images only, and the gradients of its weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from shoulders.features import Features
from shoulders.transfer import balance
from shoulders.transfer.distances import distance
from shoulders.transfer.losses import Settings, any_teacher_mask, kpu

B, D = 4, 3
ROWS = torch.tensor([3, 0])
# (teacher, images that it has features of)
TEACHERS = {"some": [3, 0], "all": [0, 1, 2, 3], "base": [0, 1, 2, 3]}


def summaries(seed: int, rows: Tensor | None = None) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(B if rows is None else len(rows), D, generator=generator), None, rows=rows)


def squared(one: Features, other: Features) -> list[float]:
    """The mean squared difference of each image."""
    a, b = one.components()["summary"], other.components()["summary"]
    return [float((x - y).square().mean()) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("t2s", ["none", "each"])
def test_an_image_counts_the_same_however_many_teachers_have_its_features(t2s: str) -> None:
    rows = {"some": ROWS, "all": None, "base": None}
    predictions = {f"{name}/x": summaries(seed, rows[name]) for seed, name in enumerate(rows)}
    targets = {f"{name}/x": summaries(10 + seed, rows[name]) for seed, name in enumerate(rows)}
    towards = {f"{name}/x": summaries(20 + seed, rows[name]) for seed, name in enumerate(rows)}
    latent = summaries(30)
    settings = Settings(preserve=0.5, t2s=t2s, t2s_weight=0.25, t2s_grad_to="both")
    loss, terms = kpu(latent, predictions, targets, lambda mask: towards, distance("mse"), balance.uniform, settings)

    centred = latent.components()["summary"] - latent.components()["summary"].mean(1, keepdim=True)
    normalised = Features(centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt(), None)
    expected = 0.0
    for name, images in TEACHERS.items():
        tap = f"{name}/x"
        s2t = squared(predictions[tap], targets[tap])
        latents = Features(normalised.components()["summary"][images], None)
        each = squared(latents, towards[tap])
        assert float(terms[f"s2t/{tap}/summary"]) == pytest.approx(sum(s2t) / len(images), rel=1e-5)
        for image, *values in zip(images, s2t, each, strict=True):
            # images 1 and 2 have one teacher beside the base, which then has the weight of two
            weight = 0.5 if name == "base" else 1.0 if image in TEACHERS["some"] else 2.0
            expected += weight * (values[0] + (0.25 * values[1] if t2s == "each" else 0)) / B
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert not any(term.requires_grad for term in terms.values())


def test_weights_have_no_gradient() -> None:
    prediction = summaries(0).map(lambda x: x.clone().requires_grad_())
    target = summaries(1)
    settings = Settings(preserve=1.0, t2s="none", t2s_weight=0.0, t2s_grad_to="both")
    loss, terms = kpu(
        summaries(2),
        {"one/x": prediction},
        {"one/x": target},
        lambda mask: {},
        distance("mse"),
        lambda losses, mask: losses,  # each loss is its own weight
        settings,
    )
    loss.backward()
    assert not any(term.requires_grad for term in terms.values())
    x, y = prediction.components()["summary"], target.components()["summary"]
    gap = (x - y).detach()
    expected = gap.square().mean(1, keepdim=True) * 2 * gap / D / B  # as if the weight were a constant
    assert torch.allclose(x.grad, expected, atol=1e-6)  # type: ignore[arg-type]


def test_an_image_has_a_joint_latent_where_a_teacher_has_that_component() -> None:
    targets = {
        "one/x": Features(torch.zeros(3, 2), torch.zeros(3, 1, 2), (1, 1)),
        "two/x": Features(None, torch.zeros(3, 1, 2), (1, 1)),
    }
    mask: Mapping[str, Tensor] = {"one/x": torch.tensor([1.0, 0.0, 0.0]), "two/x": torch.tensor([0.0, 1.0, 0.0])}
    assert any_teacher_mask("t2s/joint/summary", targets, mask).tolist() == [1, 0, 0]
    assert any_teacher_mask("t2s/joint/spatial", targets, mask).tolist() == [1, 1, 0]

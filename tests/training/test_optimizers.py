"""The optimizer of a distillation: learning rate, clipping, averages and saved state, in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shoulders.config.sections import Train
from shoulders.errors import DataError
from shoulders.training.optimizers import Optimizers


class Learner(nn.Module):
    """A weight of 3 x 2, a bias of 3 and a statistic: what the optimizers use of a distillation module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.student = nn.Module()
        self.student.standardizers = nn.Module()
        self.student.standardizers.register_buffer("mean", torch.arange(4.0))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


def build(**train: float | str) -> tuple[Learner, Optimizers]:
    torch.manual_seed(0)
    learner = Learner()
    settings = {"steps": 100, "warmup": 0.0, "lr": 0.5, **train}
    return learner, Optimizers(learner, Train.model_validate(settings))  # type: ignore[arg-type]


def backward(learner: Learner, scale: float = 1.0) -> None:
    """Gradients of scale x (1 .. 9) for the nine weights."""
    numbers = torch.arange(1.0, 10.0) * scale
    learner.linear.weight.grad, learner.linear.bias.grad = numbers[:6].view(3, 2), numbers[6:]


def test_the_learning_rate_warms_up_linearly_and_falls_by_half_a_cosine() -> None:
    _, optimizers = build(steps=124, warmup=4 / 124, lr=0.8)
    expected = {
        **{1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8},  # four steps of warm-up
        4 + 20: 0.4 * (1 + 3**0.5 / 2),  # cos(30 degrees); a line would give .8 x 5 / 6
        4 + 40: 0.4 * 1.5,  # cos(60 degrees); a line would give .8 x 2 / 3
        4 + 60: 0.4,
        4 + 80: 0.4 * 0.5,
        4 + 120: 0.0,
    }
    assert {step: optimizers.lr(step) for step in expected} == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_highest_rate() -> None:
    _, optimizers = build(steps=3, warmup=0.0, lr=0.8)
    assert [optimizers.lr(step) for step in (1, 2, 3)] == pytest.approx([0.8, 0.4, 0.0])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_has_the_rate_of_its_number_and_returns_the_norm_before_clipping(optimizer: str) -> None:
    learner, optimizers = build(optimizer=optimizer, clip=2.0, warmup=0.1, weight_decay=0.25)
    before = learner.linear.bias.detach().clone()
    weight = learner.linear.weight.detach().clone()
    backward(learner)
    assert float(optimizers.step(3)) == pytest.approx(math.sqrt(sum(n * n for n in range(1, 10))))
    # the first step of AdamW is the learning rate, 3 / 10 of .5, whatever the gradient; biases have no weight decay
    assert torch.allclose(learner.linear.bias, before - 0.15, atol=1e-5)
    decayed = weight * (1 - 0.15 * 0.25)
    if optimizer == "adamw":
        assert torch.allclose(learner.linear.weight, decayed - 0.15, atol=1e-5)
    else:
        assert not torch.allclose(learner.linear.weight, decayed - 0.15, atol=0.05)
    assert learner.linear.weight.grad is None and learner.linear.bias.grad is None


def test_gradients_are_scaled_down_to_the_norm_and_never_up() -> None:
    """AdamW's second moment after one step is (1 - beta2) x squared gradient."""
    for clip, expected in ((2.0, 2.0), (1000.0, 285**0.5)):  # 1 + 4 + .. + 81 = 285
        learner, optimizers = build(optimizer="adamw", clip=clip, betas=(0.9, 0.75))  # type: ignore[arg-type]
        backward(learner)
        optimizers.step(1)
        state = optimizers.tensors()
        squares = sum(float(state[f"exp_avg_sq.linear.{name}"].sum()) for name in ("weight", "bias")) / 0.25
        assert squares == pytest.approx(expected**2, rel=1e-4)


def test_averages_have_a_short_memory_at_first() -> None:
    """The decay of step n is (1 + n) / (10 + n), at most ``ema``."""
    learner, optimizers = build(optimizer="adamw", ema=0.5)
    assert not any(x.requires_grad for x in optimizers.ema.values())
    average = learner.linear.bias.detach().clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (8, 0.5), (20, 0.5)):
        backward(learner, scale=step)
        optimizers.step(step)
        average = decay * average + (1 - decay) * learner.linear.bias.detach()
        assert torch.allclose(optimizers.ema["linear.bias"], average, atol=1e-6)
    trained = learner.linear.bias.detach().clone()
    with optimizers.ema_weights():
        assert torch.equal(learner.linear.bias, optimizers.ema["linear.bias"])
    assert torch.equal(learner.linear.bias, trained)
    with pytest.raises(KeyError), optimizers.ema_weights():
        raise KeyError
    assert torch.equal(learner.linear.bias, trained)
    optimizers.load_ema()
    assert torch.equal(learner.linear.bias, optimizers.ema["linear.bias"])


def test_without_ema_no_average_is_kept() -> None:
    learner, optimizers = build()
    before = learner.linear.bias.detach().clone()
    assert not optimizers.ema
    with optimizers.ema_weights():
        assert torch.equal(learner.linear.bias, before)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_restored_optimizer_goes_on_to_the_same_bits(optimizer: str) -> None:
    learner, optimizers = build(optimizer=optimizer, ema=0.9)
    for step in (1, 2):
        backward(learner, scale=step)
        optimizers.step(step)
    saved = {name: tensor.detach().clone() for name, tensor in optimizers.tensors().items()}
    moments = ["exp_avg", "exp_avg_sq", "step"]
    expected = [f"{kind}.linear.{name}" for kind in ("model", "average") for name in ("weight", "bias")]
    expected += ["statistics.mean", *(f"{moment}.linear.bias" for moment in moments)]
    of_weight = ["momentum_buffer"] if optimizer == "muon" else moments
    assert set(saved) == {*expected, *(f"{moment}.linear.weight" for moment in of_weight)}

    twin, resumed = build(optimizer=optimizer, ema=0.9)
    twin.get_buffer("student.standardizers.mean").zero_()
    resumed.restore(saved)
    assert torch.equal(twin.get_buffer("student.standardizers.mean"), torch.arange(4.0))
    for one, optimizer_of_one in ((learner, optimizers), (twin, resumed)):
        backward(one, scale=0.5)
        optimizer_of_one.step(3)
    for name, tensor in optimizers.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_a_state_of_another_model_is_refused() -> None:
    learner, optimizers = build()
    backward(learner)
    optimizers.step(1)
    saved = dict(optimizers.tensors())
    for name, tensor in (
        ("model.linear.bias", None),
        ("model.more", torch.zeros(2)),
        ("statistics.mean", torch.ones(5)),
    ):
        changed = saved | {name: tensor} if tensor is not None else {n: t for n, t in saved.items() if n != name}
        with pytest.raises(DataError, match=f"differs in 1 tensors, such as {name}"):
            build()[1].restore(changed)

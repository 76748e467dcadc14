"""The schedule, the optimizers and the averaged weights, against closed forms and against torch's own optimizers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from shoulders.optimizers import MuonAdamW, ema_update, split_parameters, warmup_cosine


@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_the_schedule_rises_linearly_and_falls_by_half_a_cosine(ends_at_zero: bool) -> None:
    rates = [warmup_cosine(step, 24, 4, peak=3.0, ends_at_zero=ends_at_zero) for step in range(1, 25)]
    assert rates[:4] == [0.75, 1.5, 2.25, 3.0]
    shift = 0 if ends_at_zero else 1
    assert rates[4:] == [1.5 * (1 + math.cos(math.pi * (step - shift) / 20)) for step in range(1, 21)]
    assert (rates[-1] == 0.0) == ends_at_zero
    assert rates[4 + 10 - 1 + shift] == pytest.approx(1.5)  # half of the peak, half of the way down
    assert rates[4 + 5 - 1 + shift] == pytest.approx(1.5 + 1.5 / math.sqrt(2))  # a line would give 2.25


def test_a_schedule_without_room_for_a_cosine_is_all_warm_up() -> None:
    assert [warmup_cosine(step, 2, 2) for step in (1, 2)] == [0.5, 1.0]
    assert warmup_cosine(1, 1, 1) == 1.0
    assert [warmup_cosine(step, 2, 1) for step in (1, 2)] == [1.0, 0.0]  # by default the last step has rate 0
    assert [warmup_cosine(step, 3, 1, ends_at_zero=False) for step in (2, 3)] == [1.0, 0.5]


def test_parameters_are_split_by_their_dimensions() -> None:
    shapes = [(), (3,), (3, 2), (4, 3, 2, 2)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    matrices, others = split_parameters(iter(parameters))
    assert [p.shape for p in matrices] == [(3, 2), (4, 3, 2, 2)]
    assert [p.shape for p in others] == [(), (3,)]


def gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_every_parameter_is_updated_as_by_torch_itself() -> None:
    torch.manual_seed(0)
    kernel, matrix, bias = (nn.Parameter(torch.randn(shape)) for shape in ((6, 3, 2, 2), (5, 4), (7,)))
    ours = MuonAdamW([kernel], [matrix], [bias], lr=9.0, weight_decay=0.1, betas=(0.8, 0.95))
    as_matrix, *theirs = (nn.Parameter(p.detach().clone()) for p in (kernel.flatten(1), matrix, bias))
    adamw: Any = [
        torch.optim.AdamW([p], 0.01, (0.8, 0.95), weight_decay=decay, fused=True)
        for p, decay in zip(theirs, (0.1, 0.0), strict=True)
    ]
    muon = torch.optim.Muon([as_matrix], 0.01, 0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        gradients([kernel, matrix, bias], step)
        for p, source in zip((as_matrix, *theirs), (kernel, matrix, bias), strict=True):
            p.grad = source.grad.clone().view(p.shape) if source.grad is not None else None
        ours.step(0.01)
        for one in (muon, *adamw):
            one.step()
        assert all(p.grad is None for p in (kernel, matrix, bias))
    assert torch.equal(kernel.flatten(1), as_matrix)
    assert torch.equal(matrix, theirs[0]) and torch.equal(bias, theirs[1])


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2)) for _ in range(4)]
    before = [p.detach().clone() for p in parameters]
    optimizer = MuonAdamW(parameters[:2], parameters[2:], [], 0.1, 0.1)
    gradients(parameters[::2], 0)
    optimizer.step(0.1)
    assert [torch.equal(p, old) for p, old in zip(parameters, before, strict=True)] == [False, True, False, True]


def test_each_parameter_has_one_owner() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 4))
    matrices, others = split_parameters(model.parameters())
    one = MuonAdamW(matrices[:1], matrices[1:], others, 0.1, 0.0)
    gradients(list(model.parameters()), 0)
    one.step(0.1)
    owners = one.owners()
    assert set(owners) == set(model.parameters())
    assert [type(owners[p][0]).__name__ for p in (*matrices, *others)] == ["Muon", "AdamW", "AdamW", "AdamW"]
    assert all(optimizer.state[held] for optimizer, held in owners.values())
    assert owners[matrices[0]][1].shape == (4, 12)
    assert len(MuonAdamW([], matrices, others, 0.1, 0.0).optimizers) == 1


def test_averages_move_towards_the_values_by_one_minus_decay() -> None:
    torch.manual_seed(0)
    averages, values = ([torch.randn(shape) for shape in ((3, 2), (5,), ())] for _ in range(2))
    values[0].requires_grad_()
    before = copy.deepcopy(averages)
    ema_update(averages, values, 0.75)
    for average, old, value in zip(averages, before, values, strict=True):
        assert torch.allclose(average, 0.75 * old + 0.25 * value.detach())
        assert torch.equal(average, old.lerp(value.detach(), 0.25)) and not average.requires_grad
    with pytest.raises(ValueError, match="shorter"):
        ema_update(averages, values[:2], 0.75)


@pytest.mark.parametrize("bad", [0, 3])
def test_a_step_and_an_average_that_are_not_finite_change_nothing(bad: int) -> None:
    """As on a GPU, where nothing waits for the value: bit for bit as if that step had not been."""

    def trained(skip: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((6, 4), (3, 5), (7,))
        matrix, decayed, bias = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)
        optimizer = MuonAdamW([matrix], [decayed], [bias], 0.1, 0.1)
        averages = [p.detach().clone() for p in optimizer.parameters]
        for step in range(6):
            gradients = [torch.randn(p.shape, generator=generator) for p in optimizer.parameters]
            if step == bad and skip:
                continue
            for p, gradient in zip(optimizer.parameters, gradients, strict=True):
                p.grad = gradient * math.nan if step == bad else gradient
            finite = None if skip else torch.tensor(step != bad)
            optimizer.step(0.01 * (step + 1), finite)
            ema_update(averages, optimizer.parameters, 0.3 + 0.1 * step, finite)
        owners = optimizer.owners().values()
        states = [x for one, held in owners for x in one.state[held].values()]
        return [*(p.detach() for p in optimizer.parameters), *averages, *states]

    guarded, reference = trained(skip=False), trained(skip=True)
    assert len(guarded) == 3 + 3 + 1 + 3 + 3
    assert all(torch.equal(one, other) for one, other in zip(guarded, reference, strict=True))

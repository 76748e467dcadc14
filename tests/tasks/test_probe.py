"""The fit of a probe equals a reference loop written here; selection and refitting use the images they should."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from shoulders.errors import NumericError
from shoulders.tasks.data.masks import find_masks
from shoulders.tasks.feature_bank import FeatureBank, minibatches
from shoulders.tasks.probe import LARGER_PROBE_SETTINGS, ProbeSettings, SpatialProbe, fit_head, fit_probe
from tests.tasks.scenes import SIZE, colours, save_masks

SETTINGS = ProbeSettings(lrs=(0.1,), weight_decay=0.2, schedule="constant", warmup_steps=4, batch=3)


def squared_error(head: nn.Module, maps: Tensor, targets: Any) -> Tensor:
    return (head(maps).mean((1, 2, 3)) - torch.stack(list(targets))).square().mean()


def build_head(width: int, n_classes: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, 1, 1))


def probe(
    settings: ProbeSettings,
    values: Sequence[float | None] = (),
    build: Callable[[int, int], nn.Module] = build_head,
) -> SpatialProbe:
    """A probe of one number per image; its evaluations give ``values`` in turn, None: an evaluation without a value."""
    waiting = iter(values)

    def evaluate(head: nn.Module, bank: FeatureBank[Any], classes: tuple[str, ...]) -> dict[str, float]:
        value = next(waiting)
        return {} if value is None else {"value": value, "images": len(bank)}

    return SpatialProbe(
        task="toy",
        name="toy",
        metric="value",
        build=build,
        targets=lambda bank, n_classes: torch.arange(len(bank)).float(),
        loss=squared_error,
        evaluate=evaluate,
        settings=settings,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_masks(tmp_path_factory.mktemp("masks"), {"train": 10, "val": 4})


def lr_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """Of the step from 0."""
    if schedule != "cosine" and step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    start = 0 if schedule == "cosine" else warmup
    return 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


@pytest.mark.parametrize("schedule", ["cosine", "constant", "warmup_cosine"])
@pytest.mark.parametrize(("max_grad_norm", "ema"), [(None, None), (0.5, 0.6)])
def test_a_fit_equals_a_reference_loop(
    schedule: str, max_grad_norm: float | None, ema: float | None, data: Path
) -> None:
    steps, lr = 9, 0.1
    settings = replace(SETTINGS, schedule=schedule, max_grad_norm=max_grad_norm, ema=ema)
    bank = FeatureBank(colours, find_masks(data).train, [SIZE], 8, 0)
    targets = torch.arange(len(bank)).float()
    random_state = torch.get_rng_state()
    losses: list[float] = []
    fitted = fit_head(probe(settings), bank, targets, 2, lr, steps, seed=5, on_step=losses.append).head
    assert torch.equal(torch.get_rng_state(), random_state)  # a fit has a random state of its own

    torch.manual_seed(5)
    head = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
    average = copy.deepcopy(head)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.2)
    for step, indices in enumerate(minibatches(len(bank), 3, steps, torch.Generator().manual_seed(5))):
        optimizer.param_groups[0]["lr"] = lr * lr_factor(schedule, step, steps, 4)
        loss = squared_error(head, bank.maps(indices), targets[indices])
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(head.parameters(), max_grad_norm)
        optimizer.step()
        decay = min(ema or 0.0, (step + 1) / (step + 11))
        for mean, value in zip(average.parameters(), head.parameters(), strict=True):
            mean.data = decay * mean.data + (1 - decay) * value.data
    expected = dict(head.named_parameters()) if ema is None else dict(average.named_parameters())
    for name, value in fitted.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    assert len(losses) == steps
    # buffers are those of the head, not averages
    torch.testing.assert_close(fitted[0].running_mean, head[0].running_mean)
    assert not fitted.training


@pytest.mark.parametrize("ema", [None, 0.6])
def test_evaluations_on_the_way_do_not_change_a_fit(ema: float | None, data: Path) -> None:
    toy = probe(replace(SETTINGS, ema=ema, num_evals=3))
    bank = FeatureBank(colours, find_masks(data).train, [SIZE], 8, 0)
    scores: list[bool] = []  # whether each head is in evaluation mode; the later, the better

    def score(head: nn.Module) -> float:
        scores.append(not head.training)
        return len(scores)

    targets = torch.arange(len(bank)).float()
    evaluated = fit_head(toy, bank, targets, 2, 0.1, 9, 5, score)
    plain = fit_head(toy, bank, targets, 2, 0.1, 9, 5)
    assert scores == [True] * 3 and (evaluated.value, evaluated.steps) == (3, 9)
    for ours, theirs in zip(evaluated.head.state_dict().values(), plain.head.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_steps_are_epochs_within_their_limits() -> None:
    settings = replace(SETTINGS, batch=10, epochs=20, min_steps=50, max_steps=1000)
    assert [settings.steps(images) for images in (1, 100, 10_000)] == [50, 200, 1000]
    assert settings.steps(100, fraction=0.1) == 20
    assert settings.steps(1, fraction=1e-9) == 1


def test_the_default_fit_has_20_epochs_of_16_images_and_400_to_20000_steps() -> None:
    settings = ProbeSettings(lrs=(0.1,), weight_decay=0.2, schedule="cosine")
    assert [settings.steps(images) for images in (319, 320, 800, 10**6)] == [400, 400, 1000, 20_000]
    assert settings.steps(336) == 420 and settings.warmup_steps == 0


def test_the_settings_of_larger_probes_are_those_of_the_published_rows() -> None:
    expected = ProbeSettings((5e-4,), 0.01, "warmup_cosine", 50, 16, 40, 1000, 20_000, 1.0, None, 1, False, True)
    assert expected == LARGER_PROBE_SETTINGS


@pytest.mark.parametrize("check_loss", [None, False, True])
def test_a_loss_that_is_not_finite_is_refused_where_it_is_checked(check_loss: bool | None, data: Path) -> None:
    settings = SETTINGS if check_loss is None else replace(SETTINGS, check_loss=check_loss)
    bank = FeatureBank(colours, find_masks(data).train, [SIZE], 8, 0)
    targets = torch.full((len(bank),), torch.inf)
    refused = pytest.raises(NumericError, match="the loss of Sequential is no longer finite; check the features")
    with refused if check_loss else nullcontext():
        fit_head(probe(settings), bank, targets, 2, 0.1, 2, seed=0)


def test_without_val_the_selected_fit_is_repeated_with_all_of_train(data: Path) -> None:
    settings = replace(SETTINGS, lrs=(0.1, 0.3, 0.2), min_steps=1, epochs=6)
    heads: list[nn.Module] = []
    values = [0.5, 0.9, 0.9, 0.4]  # of the three candidates, and on test
    (row, _) = fit_probe(probe(settings, values), colours, find_masks(data), [SIZE], seed=3, on_head=heads.append)
    assert (row["value"], row["settings"]["lr"], row["settings"]["train"]) == (0.4, 0.3, 10)
    assert row["settings"]["steps"] == 6 * 10 // 3
    bank = FeatureBank(colours, find_masks(data).train, [SIZE], 8, 0)
    expected = fit_head(probe(settings), bank, torch.arange(10).float(), 2, 0.3, 20, seed=3).head
    for ours, theirs in zip(heads[0].parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("values", "steps"), [((0.9, 0.5), 8), ((0.5, 0.9), 16), ((0.9, 0.9), 16)])
def test_without_val_a_selected_number_of_steps_is_repeated(
    values: tuple[float, float], steps: int, data: Path
) -> None:
    settings = replace(SETTINGS, min_steps=1, epochs=6, num_evals=2)  # evaluated after 8 and 16 steps on 8 images
    (row, _) = fit_probe(probe(settings, [*values, 0.4]), colours, find_masks(data), [SIZE])
    assert (row["value"], row["settings"]["steps"]) == (0.4, steps)


def test_with_val_the_selected_fit_is_the_result(tmp_path: Path) -> None:
    splits = find_masks(save_masks(tmp_path, {"train": 6, "val": 3, "test": 4}))
    settings = replace(SETTINGS, lrs=(0.1, 0.2), min_steps=4, epochs=0, num_evals=2)
    values = [None, 0.3, 0.8, 0.2, 0.4]  # of each candidate after 2 and 4 steps, and on test
    build, started_at = Mock(side_effect=build_head), time.perf_counter()
    rows = fit_probe(probe(settings, values, build), colours, splits, [SIZE])
    assert build.call_count == 2  # nothing is fitted again
    seconds = [rows[0]["seconds"], float(rows[0]["settings"]["features_seconds"])]
    assert min(seconds) > 0 and sum(seconds) <= time.perf_counter() - started_at
    assert [(row["metric"], row["value"]) for row in rows] == [("value", 0.4), ("images", 4)]
    described = rows[0]["settings"]
    assert (described["lr"], described["steps"], described["selected_on"]) == (0.2, 2, "val")
    assert described["seed"] == 0


def test_a_candidate_without_a_value_counts_as_0(data: Path) -> None:
    settings = replace(SETTINGS, lrs=(0.1, 0.2), min_steps=1, epochs=1)
    rows = fit_probe(probe(settings, [None, 0.3, 0.4]), colours, find_masks(data), [SIZE])
    assert (rows[0]["value"], rows[0]["settings"]["lr"]) == (0.4, 0.2)


def test_without_selection_val_is_not_used(tmp_path: Path) -> None:
    splits = find_masks(save_masks(tmp_path, {"train": 6, "val": 3, "test": 4}))
    for file in (tmp_path / "images/val").iterdir():
        file.unlink()
    settings = replace(SETTINGS, min_steps=4, epochs=0, select=False)
    build = Mock(side_effect=build_head)
    rows = fit_probe(probe(settings, [0.7], build), colours, splits, [SIZE])
    assert build.call_count == 1
    described = rows[0]["settings"]
    assert (rows[0]["value"], described["train"], described["skipped"]) == (0.7, 6, 0)
    assert described["selected_on"] == "nothing: the settings are fixed" and described["parameters"] == 3 + 1 + 2 * 3

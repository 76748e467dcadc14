"""The KPU loss against a reference with loops instead of tensors, term by term."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.config.recipe import Recipe
from shoulders.features import Features, align, align_pair
from shoulders.transfer import balance
from shoulders.transfer.distances import distance
from shoulders.transfer.losses import METHODS, LatentTargets, Settings, kpu
from shoulders.transfer.projectors import FeatureDims, JointToStudent, TeacherToStudent, teacher_name

B, D = 3, 8
GRID = (4, 4)  # of the student
Scene = tuple[Features, dict[str, Features], dict[str, Features]]  # latent, predictions, targets


def random_features(summary: int | None, spatial: int | None, grid: tuple[int, int], seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        None if summary is None else torch.randn(B, summary, generator=generator),
        None if spatial is None else torch.randn(B, grid[0] * grid[1], spatial, generator=generator),
        grid if spatial else (0, 0),
    )


def dims(features: Features) -> FeatureDims:
    """The channels of both components."""
    by_component = {name: x.shape[-1] for name, x in features.components().items()}
    return FeatureDims(by_component.get("summary"), by_component.get("spatial"))


def reference_distance(prediction: Tensor, target: Tensor, a: float) -> float:
    """Mean over the vectors of one image of a (1 - cos) + (1 - a) smooth-L1."""
    vectors = list(zip(prediction.reshape(-1, prediction.shape[-1]), target.reshape(-1, target.shape[-1]), strict=True))
    total = 0.0
    for x, y in vectors:
        cos = float((x * y).sum() / (x.norm() * y.norm()))
        gaps = [abs(float(g)) for g in x - y]
        smooth = sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / len(gaps)
        total += a * (1 - cos) + (1 - a) * smooth
    return total / len(vectors)


@pytest.fixture
def scene() -> Scene:
    latent = random_features(D, D, GRID, 0)
    targets = {
        "one/last": random_features(5, 6, (2, 2), 1),
        "two/stage0": random_features(None, 4, (8, 8), 2),
        "two/stage1": random_features(None, 7, (4, 2), 3),
        "base/latent": random_features(D, D, GRID, 4),
    }
    predictions = {tap: random_features(*dims(f), GRID, 10 + i) for i, (tap, f) in enumerate(targets.items())}
    return latent, predictions, targets


def kpu_loss(
    scene: Scene,
    latent_targets: LatentTargets = lambda teacher_mask: {},
    a: float = 0.9,
    weights: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its terms; ``weights`` (B, T) in place of those of `balance.uniform`."""
    defaults: dict[str, Any] = {"preserve": 0.7, "t2s": "none", "t2s_weight": 0.3, "t2s_grad_to": "both"}
    balanced = balance.uniform if weights is None else lambda losses, teacher_mask: weights
    how = Settings(**(defaults | settings))
    return kpu(*scene, latent_targets, distance("cosine_smooth_l1", a), balanced, how)


def reference_tap_loss(predictions: Features, targets: Features, a: float, image: int) -> list[float]:
    """The distances of one tap for one image: summary and spatial where present, on the smaller grid."""
    values = []
    if targets.summary is not None and predictions.summary is not None:
        values.append(reference_distance(predictions.summary[image], targets.summary[image], a))
    prediction, target = predictions.to_map(), targets.to_map()
    grid = min(predictions.grid, targets.grid, key=lambda g: g[0] * g[1])
    prediction, target = (F.interpolate(m, grid, mode="bilinear", antialias=True) for m in (prediction, target))
    values.append(reference_distance(prediction[image].flatten(1).T, target[image].flatten(1).T, a))
    return values


@pytest.mark.parametrize("a", [0.9, 0.5, 1.0])
def test_s2t_is_the_weighted_sum_of_each_teachers_mean_distance(scene: Scene, a: float) -> None:
    _, predictions, targets = scene
    loss, terms = kpu_loss(scene, a=a)
    expected = 0.0
    for image in range(B):
        by_teacher: dict[str, list[float]] = {}
        for tap in targets:
            values = reference_tap_loss(predictions[tap], targets[tap], a, image)
            by_teacher.setdefault(teacher_name(tap), []).extend(values)
        mean = {teacher: sum(values) / len(values) for teacher, values in by_teacher.items()}
        expected += (mean["one"] + mean["two"] + 0.7 * mean["base"]) / B
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert set(terms) == {
        "s2t/one/last/summary",
        "s2t/one/last/spatial",
        "s2t/two/stage0/spatial",
        "s2t/two/stage1/spatial",
        "s2t/base/latent/summary",
        "s2t/base/latent/spatial",
    }


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_t2s_each_adds_each_teachers_distance_to_the_normalised_latent(scene: Scene) -> None:
    latent, _, targets = scene
    torch.manual_seed(0)
    to_student = TeacherToStudent(D, {tap: dims(f) for tap, f in targets.items()}, 16)
    without, with_t2s = (
        kpu_loss(scene, lambda teacher_mask: to_student(targets, GRID), t2s=kind)[0] for kind in ("none", "each")
    )
    expected = 0.0
    for image in range(B):
        by_teacher: dict[str, list[float]] = {}
        for tap, f in targets.items():
            values = by_teacher.setdefault(teacher_name(tap), [])
            for component, x in align(f, GRID).components().items():
                first, _, second = to_student.taps[tap.replace("/", "-")][component]  # type: ignore[index]
                hidden = x[image] @ first.weight.T + first.bias
                hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
                output = hidden @ second.weight.T + second.bias
                normalised = layer_norm(latent.components()[component][image])
                values.append(reference_distance(normalised, output.detach(), 0.9))
        mean = {teacher: sum(values) / len(values) for teacher, values in by_teacher.items()}
        expected += 0.3 * (mean["one"] + mean["two"] + 0.7 * mean["base"]) / B
    assert (with_t2s - without).item() == pytest.approx(expected, rel=1e-4)


def test_t2s_joint_adds_the_mean_of_its_two_distances(scene: Scene) -> None:
    latent = scene[0]
    joint = random_features(D, D, GRID, 5)
    without = kpu_loss(scene)[0]
    with_t2s, terms = kpu_loss(scene, lambda teacher_mask: {"joint": joint}, t2s="joint")
    expected = 0.0
    for component, x in joint.components().items():
        normalised = layer_norm(latent.components()[component])
        distances = [reference_distance(normalised[image], x[image], 0.9) for image in range(B)]
        assert terms[f"t2s/joint/{component}"].item() == pytest.approx(sum(distances) / B, rel=1e-4)
        expected += 0.3 * sum(distances) / B / 2  # the mean of summary and spatial
    assert (with_t2s - without).item() == pytest.approx(expected, rel=1e-4)


def test_joint_leaves_out_a_masked_teacher(scene: Scene) -> None:
    targets = {tap: scene[2][tap] for tap in ("one/last", "two/stage0")}
    torch.manual_seed(0)
    joint = JointToStudent(D, {tap: dims(f) for tap, f in targets.items()}, 16)
    every_image, not_image_1 = torch.ones(B), torch.tensor([1.0, 0.0, 1.0])
    both = joint(targets, GRID, {"one/last": every_image, "two/stage0": not_image_1})
    only_one = joint({"one/last": targets["one/last"]}, GRID, {"one/last": every_image})
    assert torch.allclose(both.components()["spatial"][1], only_one.components()["spatial"][1], atol=1e-6)
    assert not torch.allclose(both.components()["spatial"][0], only_one.components()["spatial"][0])
    assert torch.equal(both.components()["summary"], only_one.components()["summary"])  # two has no summary


def test_joint_counts_a_teacher_once_however_many_taps_it_has(scene: Scene) -> None:
    targets = {tap: Features(None, f.spatial, f.grid) for tap, f in scene[2].items()}
    torch.manual_seed(0)
    joint = JointToStudent(D, {tap: dims(f) for tap, f in targets.items()}, 16)
    projected = {
        tap: joint.taps[tap.replace("/", "-")]["spatial"](align(f, GRID).components()["spatial"])  # type: ignore[index]
        for tap, f in targets.items()
    }
    two = (projected["two/stage0"] + projected["two/stage1"]) / 2
    mean = (projected["one/last"] + two + projected["base/latent"]) / 3
    latent = joint(targets, GRID, {tap: torch.ones(B) for tap in targets}).components()["spatial"]
    assert torch.allclose(latent, joint.mlps["spatial"](joint.norms["spatial"](mean)), atol=1e-6)


def with_gradient(features: Features) -> Features:
    return features.map(lambda x: x.clone().requires_grad_())


def without_base(features: Mapping[str, Features]) -> dict[str, Features]:
    return {tap: f for tap, f in features.items() if not tap.startswith("base")}


def test_an_image_without_teachers_does_not_move_its_latent(scene: Scene) -> None:
    latent, predictions, targets = scene
    latent, joint = with_gradient(latent), random_features(D, D, GRID, 5)
    loss, _ = kpu_loss(
        (latent, without_base(predictions), without_base(targets)),
        lambda teacher_mask: {"joint": joint},
        weights=torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]),
        preserve=0.0,
        t2s="joint",
    )
    loss.backward()
    gradients = [float(x.grad[image].abs().sum()) for x in latent.components().values() for image in range(B)]  # type: ignore[index]
    assert [gradient > 0 for gradient in gradients] == [False, True, True] * 2


@pytest.mark.parametrize(
    ("grad_to", "latent_moves", "projector_moves"),
    [("both", True, True), ("student", True, False), ("projector", False, True)],
)
def test_t2s_moves_the_side_that_receives_the_gradient(
    scene: Scene, grad_to: str, latent_moves: bool, projector_moves: bool
) -> None:
    latent, predictions, targets = scene
    latent, joint = with_gradient(latent), with_gradient(random_features(D, D, GRID, 5))
    loss, _ = kpu_loss(
        (latent, predictions, targets), lambda teacher_mask: {"joint": joint}, t2s="joint", t2s_grad_to=grad_to
    )
    loss.backward()
    for moves, features in ((latent_moves, latent), (projector_moves, joint)):
        for x in features.components().values():
            assert (x.grad is not None and bool(x.grad.abs().sum() > 0)) == moves


def test_dropping_keeps_the_worst_teacher_and_the_weight_of_the_image() -> None:
    losses = torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.4, 0.3]])
    drop_uniforms = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.9, 0.9]])
    # image 0: teacher 1 is the worst, and the number of teacher 2 is low; image 1: the worst alone, teacher 0
    expected = torch.tensor([[0.0, 1.5, 1.5], [3.0, 0.0, 0.0]])
    assert torch.equal(balance.dropping(losses, torch.ones(2, 3), drop_uniforms), expected)


def test_dropping_keeps_a_teacher_with_probability_one_half() -> None:
    losses = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    drop_uniforms = torch.tensor([[0.9, 0.39, 0.41, 0.49, 0.5]])
    kept = balance.dropping(losses, torch.ones(1, 5), drop_uniforms) > 0
    assert kept.tolist() == [[True, True, True, True, False]]


def test_the_joint_latent_is_predicted_from_the_teachers_that_are_not_dropped(scene: Scene) -> None:
    masks: dict[str, Tensor] = {}

    def latent_targets(teacher_mask: Mapping[str, Tensor]) -> dict[str, Features]:
        masks.update(teacher_mask)
        return {"joint": random_features(D, D, GRID, 5)}

    kpu_loss(scene, latent_targets, weights=torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), t2s="joint")
    assert masks["one/last"].tolist() == [1, 0, 1]
    assert masks["two/stage0"].tolist() == masks["two/stage1"].tolist() == [0, 1, 1]
    assert masks["base/latent"].tolist() == [1, 1, 1]


def test_fixed_weights_scale_their_teacher() -> None:
    assert balance.fixed(torch.zeros(2, 3), torch.ones(2, 3), [1.0, 0.5, 0.0]).tolist() == [[1.0, 0.5, 0.0]] * 2


def test_align_pair_uses_the_grid_with_fewer_tokens() -> None:
    one, other = align_pair(random_features(None, 3, (4, 4), 0), random_features(None, 3, (2, 5), 1))
    assert one.grid == other.grid == (2, 5)
    same = random_features(None, 3, (4, 4), 0)
    assert align(same, (4, 4)) is same


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1", "mse", "cosine_smooth_l1"])
def test_distances_are_zero_at_equality_and_one_number_per_image(kind: str) -> None:
    x = torch.randn(4, 5, 6)
    assert distance(kind)(x, x).abs().max() < 1e-6
    assert distance(kind)(x, x + 1).shape == (4,)
    with pytest.raises(ValueError, match="is not one of"):
        distance("l3")


def test_every_method_is_a_choice_of_the_recipe() -> None:
    schema = Recipe.model_json_schema()["properties"]["method"]
    assert set(METHODS) == set(schema.get("enum", [schema.get("const")]))

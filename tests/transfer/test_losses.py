"""The KPU objective against a reference written out here, term by term, with loops instead of tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.features import Features, align, align_pair
from shoulders.transfer import balance
from shoulders.transfer.distances import distance
from shoulders.transfer.losses import Settings, kpu
from shoulders.transfer.projectors import FeatureDims, JointToStudent, TeacherToStudent

B, D = 3, 8


def features(width: int | None, spatial: int | None, grid: tuple[int, int], seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    places = grid[0] * grid[1]
    return Features(
        None if width is None else torch.randn(B, width, generator=generator),
        None if spatial is None else torch.randn(B, places, spatial, generator=generator),
        grid if spatial else (0, 0),
    )


def reference_distance(ours: Tensor, theirs: Tensor, a: float) -> float:
    """Mean over the vectors of one image of a (1 - cos) + (1 - a) smooth-L1."""
    vectors = list(zip(ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1]), strict=True))
    total = 0.0
    for x, y in vectors:
        cos = float((x * y).sum() / (x.norm() * y.norm()))
        gaps = [abs(float(g)) for g in x - y]
        smooth = sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / len(gaps)
        total += a * (1 - cos) + (1 - a) * smooth
    return total / len(vectors)


@pytest.fixture
def scene() -> tuple[Features, dict[str, Features], dict[str, Features]]:
    latent = features(D, D, (4, 4), 0)
    taught = {
        "one/last": features(5, 6, (2, 2), 1),
        "two/stage0": features(None, 4, (8, 8), 2),
        "two/stage1": features(None, 7, (4, 2), 3),
        "base/latent": features(D, D, (4, 4), 4),
    }
    told = {
        tap: features(
            f.parts().get("summary", torch.zeros(1, 0)).shape[-1] or None,
            f.parts()["spatial"].shape[-1],
            (4, 4),
            10 + i,
        )
        for i, (tap, f) in enumerate(taught.items())
    }
    return latent, told, taught


def reference_tap_loss(told: Features, taught: Features, a: float, image: int) -> list[float]:
    """The distances of one tap for one image: summary and spatial where present, on the smaller grid."""
    found = []
    if taught.summary is not None and told.summary is not None:
        found.append(reference_distance(told.summary[image], taught.summary[image], a))
    ours, theirs = told.to_map(), taught.to_map()
    grid = min(told.grid, taught.grid, key=lambda g: g[0] * g[1])
    ours, theirs = (F.interpolate(m, grid, mode="bilinear", antialias=True) for m in (ours, theirs))
    found.append(reference_distance(ours[image].flatten(1).T, theirs[image].flatten(1).T, a))
    return found


@pytest.mark.parametrize("a", [0.9, 0.5, 1.0])
def test_s2t_is_the_weighted_sum_of_each_teachers_mean_distance(scene, a: float) -> None:
    latent, told, taught = scene
    settings = Settings(preserve=0.7, t2s="none", t2s_weight=1.0, t2s_grad_to="both")
    loss, terms = kpu(
        latent, told, taught, lambda present: {}, distance("cosine_smooth_l1", a), balance.uniform, settings
    )
    expected = 0.0
    for image in range(B):
        by_teacher: dict[str, list[float]] = {}
        for tap in taught:
            by_teacher.setdefault(tap.split("/")[0], []).extend(reference_tap_loss(told[tap], taught[tap], a, image))
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


def test_t2s_each_adds_every_teachers_guess_of_the_normalised_latent(scene) -> None:
    latent, told, taught = scene
    torch.manual_seed(0)
    widths = {
        tap: FeatureDims(f.parts().get("summary", torch.zeros(1, 0)).shape[-1] or None, f.parts()["spatial"].shape[-1])
        for tap, f in taught.items()
    }
    guess = TeacherToStudent(D, widths, 16)
    both = [Settings(preserve=0.7, t2s=kind, t2s_weight=0.3, t2s_grad_to="both") for kind in ("none", "each")]
    losses = [
        kpu(
            latent,
            told,
            taught,
            lambda present: guess(taught, (4, 4)),
            distance("cosine_smooth_l1", 0.9),
            balance.uniform,
            s,
        )[0]
        for s in both
    ]
    expected = 0.0
    for image in range(B):
        by_teacher: dict[str, list[float]] = {}
        for tap, f in taught.items():
            mine = by_teacher.setdefault(tap.split("/")[0], [])
            for part, x in align(f, (4, 4)).parts().items():
                first, _, second = guess.taps[tap.replace("/", "-")][part]  # type: ignore[index]
                hidden = x[image] @ first.weight.T + first.bias
                hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
                out = hidden @ second.weight.T + second.bias
                mine.append(reference_distance(layer_norm(latent.parts()[part][image]), out.detach(), 0.9))
        mean = {teacher: sum(values) / len(values) for teacher, values in by_teacher.items()}
        expected += 0.3 * (mean["one"] + mean["two"] + 0.7 * mean["base"]) / B
    assert (losses[1] - losses[0]).item() == pytest.approx(expected, rel=1e-4)


def test_joint_leaves_out_whoever_is_absent(scene) -> None:
    _, _, taught = scene
    torch.manual_seed(0)
    joint = JointToStudent(D, {"one/last": FeatureDims(5, 6), "two/stage0": FeatureDims(None, 4)}, 16)
    two = {tap: taught[tap] for tap in ("one/last", "two/stage0")}
    here, gone = torch.ones(B), torch.tensor([1.0, 0.0, 1.0])
    full = joint(two, (4, 4), {"one/last": here, "two/stage0": gone})
    alone = joint({"one/last": taught["one/last"]}, (4, 4), {"one/last": here})
    # image 1 lost teacher two: what is unified is what teacher one says alone; image 0 has both
    assert torch.allclose(full.parts()["spatial"][1], alone.parts()["spatial"][1], atol=1e-6)
    assert not torch.allclose(full.parts()["spatial"][0], alone.parts()["spatial"][0])
    assert torch.equal(full.parts()["summary"], alone.parts()["summary"])  # two has no summary


def test_a_teacher_with_many_taps_has_one_voice(scene) -> None:
    _, _, taught = scene
    torch.manual_seed(0)
    joint = JointToStudent(D, {tap: FeatureDims(None, f.parts()["spatial"].shape[-1]) for tap, f in taught.items()}, 16)
    said = {
        tap: joint.taps[tap.replace("/", "-")]["spatial"](align(f, (4, 4)).parts()["spatial"])  # type: ignore[index]
        for tap, f in taught.items()
    }
    two = (said["two/stage0"] + said["two/stage1"]) / 2
    mean = (said["one/last"] + two + said["base/latent"]) / 3
    only_spatial = {tap: Features(None, f.spatial, f.grid) for tap, f in taught.items()}
    guess = joint(only_spatial, (4, 4), {tap: torch.ones(B) for tap in taught})
    assert torch.allclose(guess.parts()["spatial"], joint.mlps["spatial"](joint.norms["spatial"](mean)), atol=1e-6)


def test_an_image_that_nobody_speaks_of_is_not_pulled_anywhere(scene) -> None:
    latent, told, taught = scene
    told, taught = ({tap: f for tap, f in all_.items() if not tap.startswith("base")} for all_ in (told, taught))
    weights = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    latent = latent.map(lambda x: x.clone().requires_grad_())
    settings = Settings(preserve=0.0, t2s="joint", t2s_weight=1.0, t2s_grad_to="both")
    guess = {"joint": features(D, D, (4, 4), 5)}
    loss, _ = kpu(
        latent,
        told,
        taught,
        lambda present: guess,
        distance("cosine_smooth_l1"),
        lambda losses, asked: weights,
        settings,
    )
    loss.backward()
    pulled = [float(x.grad[i].abs().sum()) for x in latent.parts().values() for i in range(B)]
    assert [p > 0 for p in pulled] == [False, True, True] * 2


@pytest.mark.parametrize(
    ("gradient", "latent_moves", "guess_moves"),
    [("both", True, True), ("student", True, False), ("projector", False, True)],
)
def test_t2s_gradient_goes_where_it_is_told(scene, gradient: str, latent_moves: bool, guess_moves: bool) -> None:
    latent, told, taught = scene
    latent = latent.map(lambda x: x.clone().requires_grad_())
    guess = features(D, D, (4, 4), 5).map(lambda x: x.clone().requires_grad_())
    settings = Settings(preserve=1.0, t2s="joint", t2s_weight=1.0, t2s_grad_to=gradient)
    loss, _ = kpu(
        latent, told, taught, lambda present: {"joint": guess}, distance("cosine_smooth_l1"), balance.uniform, settings
    )
    loss.backward()
    for moved, parts in ((latent_moves, latent.parts()), (guess_moves, guess.parts())):
        assert all((x.grad is not None and bool(x.grad.abs().sum() > 0)) == moved for x in parts.values())


def test_dropping_keeps_the_worst_teacher_and_the_weight_of_the_image() -> None:
    losses = torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.4, 0.3]])
    coins = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.9, 0.9]])
    # image 0: teacher 1 is worst, teacher 2's coin keeps it; image 1: only the worst, teacher 0, stays
    expected = torch.tensor([[0.0, 1.5, 1.5], [3.0, 0.0, 0.0]])
    assert torch.equal(balance.dropping(losses, torch.ones(2, 3), coins), expected)


def test_dropped_teachers_are_absent_from_the_joint_guess(scene) -> None:
    latent, told, taught = scene
    seen: dict[str, Tensor] = {}

    def unify(present: dict[str, Tensor]) -> dict[str, Features]:
        seen.update(present)
        return {"joint": features(D, D, (4, 4), 5)}

    settings = Settings(preserve=1.0, t2s="joint", t2s_weight=1.0, t2s_grad_to="both")
    weights = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    kpu(latent, told, taught, unify, distance("cosine_smooth_l1"), lambda losses, asked: weights, settings)  # type: ignore[arg-type]
    assert seen["one/last"].tolist() == [1, 0, 1]
    assert seen["two/stage0"].tolist() == seen["two/stage1"].tolist() == [0, 1, 1]
    assert seen["base/latent"].tolist() == [1, 1, 1]


def test_fixed_weights_scale_their_teacher() -> None:
    assert balance.fixed(torch.zeros(2, 3), torch.ones(2, 3), [1.0, 0.5, 0.0]).tolist() == [[1.0, 0.5, 0.0]] * 2


def test_align_goes_to_the_grid_with_fewer_places() -> None:
    one, other = align_pair(features(None, 3, (4, 4), 0), features(None, 3, (2, 5), 1))
    assert one.grid == other.grid == (2, 5)
    same = features(None, 3, (4, 4), 0)
    assert align(same, (4, 4)) is same


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1", "mse", "cosine_smooth_l1"])
def test_distances_are_zero_at_equality_and_one_number_per_image(kind: str) -> None:
    x = torch.randn(4, 5, 6)
    assert distance(kind)(x, x).abs().max() < 1e-6
    assert distance(kind)(x, x + 1).shape == (4,)
    with pytest.raises(ValueError, match="is not one of"):
        distance("l3")

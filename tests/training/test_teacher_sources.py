"""Teachers that are asked about some sources alone: what they are not asked about has no part in anything."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoulders.config.recipe import check_recipe
from shoulders.distillation import distill, prepare
from shoulders.distributed.context import DistContext
from shoulders.errors import DataError, RecipeError
from shoulders.feature_cache import build_cache, estimate_cache, verify_cache
from shoulders.features import Batch, Features
from shoulders.images import ImageSet, open_source
from shoulders.training.preflight import check_training
from shoulders.training.supervised_baseline import _distillation, counted_flops
from shoulders.transfer import balance
from shoulders.transfer.distances import distance
from shoulders.transfer.losses import Settings, kpu
from shoulders.transfer.projectors import FeatureDims, JointToStudent, TeacherToStudent
from tests.feature_cache.toy import HERE, contents, few_records
from tests.test_distillation import metrics, same, weights
from tests.tiny import save_base, save_convnext, save_images, save_segformer

B, D, GRID = 5, 8, (2, 2)
STEPS = 6


def features(images: int, width: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(images, width, generator=generator), torch.randn(images, 4, width, generator=generator), GRID
    )


WIDTHS = {"one/last": 5, "two/last": 7, "base/latent": D}


ASKED = {"one": torch.tensor([0, 3]), "two": torch.tensor([1, 3])}  # 3: both, 2 and 4: neither


def said(first_seed: int) -> dict[str, Features]:
    return {tap: features(B, width, first_seed + i) for i, (tap, width) in enumerate(WIDTHS.items())}


def of_asked(said: dict[str, Features]) -> dict[str, Features]:
    return {tap: features.take(ASKED.get(tap.split("/")[0])) for tap, features in said.items()}


@pytest.mark.parametrize("kind", ["none", "each"])
def test_the_loss_is_that_of_images_taken_one_by_one_with_those_who_were_asked(kind: str) -> None:
    latent, told, taught = features(B, D, 0), said(1), said(11)
    torch.manual_seed(0)
    each = TeacherToStudent(D, {tap: FeatureDims(width, width) for tap, width in WIDTHS.items()}, 16)
    settings = Settings(preserve=0.7, t2s=kind, t2s_weight=0.3, t2s_grad_to="both")

    def loss(latent: Features, told: Any, taught: dict[str, Features], asked: dict[str, Tensor]) -> float:
        unify = partial(lambda taught, present: each(taught, GRID), taught)
        return kpu(latent, told, taught, unify, distance("cosine_smooth_l1"), balance.uniform, settings, asked)[
            0
        ].item()

    expected = 0.0
    for image in range(B):
        row = torch.tensor([image])
        here = [tap for tap in WIDTHS if image in ASKED.get(tap.split("/")[0], range(B))]
        for tap in here:
            weight = 1 if tap == "base/latent" else 2 / (len(here) - 1)  # those asked speak for the two that there are
            expected += weight * loss(latent.take(row), {tap: told[tap].take(row)}, {tap: taught[tap].take(row)}, {})
    assert loss(latent, of_asked(told), of_asked(taught), ASKED) == pytest.approx(expected / B, rel=1e-5)


def test_the_latent_is_called_for_by_those_who_were_asked() -> None:
    taught = said(11)
    torch.manual_seed(0)
    joint = JointToStudent(D, {tap: FeatureDims(width, width) for tap, width in WIDTHS.items()}, 16)
    present = {tap: torch.zeros(B).index_fill(0, ASKED.get(tap.split("/")[0], torch.arange(B)), 1) for tap in WIDTHS}
    told = joint(of_asked(taught), GRID, present, ASKED)
    for image in range(B):
        here = {tap: taught[tap].take(torch.tensor([image])) for tap in WIDTHS if present[tap][image]}
        alone = joint(here, GRID, dict.fromkeys(here, torch.ones(1)))
        for part, x in told.parts().items():
            assert torch.allclose(x[image], alone.parts()[part][0], atol=1e-6)


def test_an_image_that_nobody_was_asked_about_teaches_nothing_but_the_base() -> None:
    latent, told = features(B, D, 0), {"one/last": features(0, 5, 1)}
    told["one/last"].summary.requires_grad_()  # type: ignore[union-attr]
    settings = Settings(preserve=0.0, t2s="none", t2s_weight=0.3, t2s_grad_to="both")
    loss, terms = kpu(
        latent,
        told,
        {"one/last": features(0, 5, 2)},
        lambda present: {},
        distance("cosine_smooth_l1"),
        balance.uniform,
        settings,
        {"one": torch.arange(0)},
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.stack(list(terms.values())).isnan().all()


SPOKE = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]])  # (B, T)


def test_an_image_counts_as_much_however_many_speak_of_it() -> None:
    shared = torch.tensor([[1.5, 1.5, 0], [3, 0, 0], [0, 0, 3], [1, 1, 1], [0, 0, 0]])
    assert torch.equal(balance.uniform(torch.rand(5, 3), SPOKE), shared)
    dropped = balance.dropping(torch.rand(5, 3) * SPOKE, SPOKE, torch.rand(5, 3))
    assert torch.allclose(dropped.sum(1), torch.tensor([3.0, 3, 3, 3, 0]))
    assert not (dropped * (1 - SPOKE)).any()


def test_chosen_weights_count_also_where_teachers_have_images_of_their_own() -> None:
    weights = balance.fixed(torch.rand(5, 3), SPOKE, [10.0, 1.0, 0.1])
    assert weights[1, 0] == 10 * 3
    assert weights[2, 2] == pytest.approx(0.1 * 3)
    assert weights[3].tolist() == pytest.approx([10, 1, 0.1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two teachers, and two sources of 40 images."""
    root = tmp_path_factory.mktemp("homes")
    save_base(root / "base")
    save_convnext(root / "classifier")
    save_segformer(root / "segmenter")
    save_images(root / "photos", 40)
    save_images(root / "streets", 40)
    return root


def recipe(world: Path, out: Path, sources: list[str] | None, **changes: Any) -> Any:
    tree: dict[str, Any] = {
        "student": {"base": str(world / "base"), "adapter": {"kind": "bottleneck", "width": 8}},
        "teachers": {
            "classifier": {"model": str(world / "classifier")},
            "segmenter": {"model": str(world / "segmenter"), "taps": ["stage0", "stage1"], "sources": sources},
        },
        "images": {
            "sources": {name: {"path": str(world / name)} for name in ("photos", "streets")},
            "size": 32,
            "holdout": 16,
            "workers": 0,
        },
        "transfer": {"calibration_images": 16},
        "train": {
            "steps": STEPS,
            "batch": 8,
            "lr": 5e-3,
            "precision": "fp32",
            "log_every": 1,
            "save_every": 3,
            "evaluate_every": 3,
        },
        "out": str(out),
    }
    return check_recipe(tree | {key: tree.get(key, {}) | value for key, value in changes.items()})


@pytest.fixture(scope="module")
def streets_only(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose segmenter is asked about streets."""
    out = tmp_path_factory.mktemp("run") / "run"
    distill(recipe(world, out, ["streets"]))
    return out


def test_a_teacher_is_asked_about_its_own_sources_alone(world: Path, tmp_path: Path) -> None:
    run = prepare(recipe(world, tmp_path / "run", ["streets"]), {}, HERE)
    (batch,) = run._batches(0, 1, 0, 1)
    names = [run.images.collection.name_of_id(int(identity)) for identity in batch.ids]
    streets = [row for row, name in enumerate(names) if name.startswith("streets/")]
    assert 0 < len(streets) < len(batch)
    assert run.asked(batch)["segmenter"].tolist() == streets
    said = run.teach(batch, run.asked(batch))
    assert len(said["segmenter/stage0"].spatial) == len(streets)  # type: ignore[arg-type]
    assert len(said["classifier/stage1"].spatial) == len(batch)  # type: ignore[arg-type]
    everything = run.teach(batch)["segmenter/stage0"].take(torch.tensor(streets))
    assert torch.allclose(said["segmenter/stage0"].spatial, everything.spatial, atol=1e-5)  # type: ignore[arg-type]


def test_a_run_learns_from_them_and_measures_each_on_its_own(world: Path, streets_only: Path) -> None:
    assert "fvu/segmenter" in metrics(streets_only, "evaluation")[-1]
    rows = metrics(streets_only)
    assert sum(row["loss"] for row in rows[-2:]) < 0.97 * sum(row["loss"] for row in rows[:2])
    assert all("s2t/classifier/stage1/spatial" in row for row in rows)
    assert any("s2t/segmenter/stage0/spatial" in row for row in rows)


def test_it_goes_on_bit_for_bit_where_it_was_stopped(world: Path, streets_only: Path, tmp_path: Path) -> None:
    shutil.copytree(streets_only, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:09d}", ignore_errors=True)
    for left in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(left)
    shutil.rmtree(tmp_path / "run" / "student")
    distill(recipe(world, tmp_path / "run", ["streets"]), resume=True)
    assert same(weights(tmp_path / "run"), weights(streets_only))


def test_a_source_that_teaches_nothing_is_refused(world: Path, tmp_path: Path) -> None:
    both = {"teachers": {"classifier": {"model": str(world / "classifier"), "sources": ["streets"]}}}
    with pytest.raises(RecipeError, match="no teacher is asked about photos, and transfer.preserve is 0"):
        distill(recipe(world, tmp_path / "run", ["streets"], **both, transfer={"preserve": 0.0}))


def test_sources_inside_each_other_are_told(world: Path, tmp_path: Path) -> None:
    nested = {"sources": {"all": {"path": str(world)}, "streets": {"path": str(world / "streets")}}}
    with pytest.warns(UserWarning, match="streets lies in all: .* held-out measures are too good"):
        check_training(recipe(world, tmp_path / "run", ["streets"], images=nested), {}, HERE)


def test_statistics_are_of_enough_images_not_of_enough_places(world: Path, tmp_path: Path) -> None:
    maps = {"segmenter": {"model": str(world / "segmenter"), "taps": ["stage0"], "sources": ["streets"]}}
    shares = {"photos": 0.97, "streets": 0.03}
    sources = {name: {"path": str(world / name), "share": share} for name, share in shares.items()}
    changes = {"teachers": maps, "images": {"sources": sources}}
    with pytest.raises(DataError, match=r"teachers.segmenter.sources: (none|1|2|3) of the 16 images"):
        distill(recipe(world, tmp_path / "run", ["streets"], **changes))


def test_naming_all_sources_is_naming_none(world: Path, tmp_path: Path) -> None:
    short = {"train": {"steps": 2}}
    distill(recipe(world, tmp_path / "all", ["photos", "streets"], **short))
    distill(recipe(world, tmp_path / "none", None, **short))
    one, other = weights(tmp_path / "all"), weights(tmp_path / "none")
    # gradients of a place are added in another order
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in other)


def test_a_cache_gives_the_same_student(world: Path, streets_only: Path, tmp_path: Path) -> None:
    changes = {"images": {"views": 2}, "cache": {"path": str(tmp_path / "cache"), "dtype": "float32"}}
    cached = recipe(world, tmp_path / "cached", ["streets"], **changes)
    build_cache(cached)
    distill(cached)
    live = {"images": {"views": 2}}
    distill(recipe(world, tmp_path / "live", ["streets"], **live))
    assert same(weights(tmp_path / "cached"), weights(tmp_path / "live"))


def test_a_cache_holds_what_is_asked(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_records(monkeypatch)
    save_images(tmp_path / "streets", 6)
    bad = sorted((tmp_path / "streets").iterdir())[3]
    bad.write_bytes(b"no image")
    sources = {name: {"path": str(folder / name)} for name, folder in (("photos", world), ("streets", tmp_path))}
    tree = {
        "images": {"sources": sources, "size": 32, "holdout": 16, "workers": 0, "views": 2, "max_unreadable": 0.1},
        "cache": {"path": str(tmp_path / "cache"), "mode": "require"},
    }
    one = recipe(world, tmp_path / "run", ["streets"], **tree)
    planned = {row["teacher"]: row["views"] for row in estimate_cache(one)["teachers"]}
    assert planned["segmenter"] == 2 * 3 + 3  # half of so few are held out
    assert planned["classifier"] == planned["base"] > 6 * planned["segmenter"]
    told = {row["teacher"]: row for row in build_cache(one)["teachers"]}
    assert {name: row["views"] for name, row in told.items()} == planned
    assert [row["undecodable"] in (1, 2) for row in told.values()] == [True] * 3  # held out, or in two views
    assert told["segmenter"]["bytes"] == planned["segmenter"] * told["segmenter"]["bytes_per_view"]
    before = contents(tmp_path / "cache")
    shards = [name for name in before if name.startswith("segmenter/shard")]
    assert 0 < len(shards) == told["segmenter"]["shards"] < told["classifier"]["shards"]

    for name in shards:
        (tmp_path / "cache" / name).unlink()
        with pytest.raises(DataError, match="missing, or of another size"):
            verify_cache(one)
        build_cache(one)
        assert contents(tmp_path / "cache") == before
    verify_cache(one)

    with pytest.raises(DataError, match=r"sources was streets, is \['photos', 'streets'\]"):
        build_cache(recipe(world, tmp_path / "run", ["streets", "photos"], **tree))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler imports what torch warns of
def test_compiled_once_it_learns_the_same(world: Path, streets_only: Path, tmp_path: Path) -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    distill(recipe(world, tmp_path / "compiled", ["streets"], train={"compile": True, "evaluate_every": 1000}))
    plain, compiled = ([row["loss"] for row in metrics(one)] for one in (streets_only, tmp_path / "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    # in steps, and in held-out measures: of no gradients, and of their last images, which are fewer
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def test_a_teacher_that_is_asked_less_costs_less(world: Path, streets_only: Path, tmp_path: Path) -> None:
    run = prepare(recipe(world, tmp_path / "run", None), {}, DistContext(0, 1, torch.device("cpu")))
    blank = Batch(torch.arange(4), {size: torch.zeros(4, 3, *size, dtype=torch.uint8) for size in run.sizes})

    def flops(**asked: Tensor) -> float:
        def step() -> None:
            taught = run.teach(blank, asked)
            run.learner(blank.pixels(run.size), taught, torch.zeros(4, 2), asked)[0].backward()

        return counted_flops(step) / 4

    half, everything = flops(segmenter=torch.tensor([0, 2])), flops()
    counted = _distillation(streets_only, recipe(world, streets_only, ["streets"]))
    assert counted == pytest.approx(half, rel=1e-6)  # both sources have the same share
    assert half < 0.9 * everything


def test_every_source_gives_its_share_of_held_out_images(world: Path) -> None:
    sources = {"many": open_source(world / "photos", "image"), "few": open_source(world / "streets", "image")}
    images = ImageSet(sources, {"many": 0.75, "few": 0.25}, 0, 12)
    heldout = images.collection.ids[images.heldout]
    owners = [len(images.collection.indices_from([source], heldout)) for source in ("many", "few")]
    assert owners == [8, 8]  # some in any case
    assert (np.diff(images.collection.ids[images.heldout]) > 0).all()
    trained = np.concatenate(list(images.training.values()))
    assert sorted([*trained.tolist(), *images.heldout.tolist()]) == list(range(80))


def test_a_teacher_whose_images_are_not_among_the_first_is_named(world: Path, tmp_path: Path) -> None:
    often = {"path": str(world / "photos"), "share": 0.97}
    rare = {"sources": {"photos": often, "streets": {"path": str(world / "streets")}}}
    with pytest.raises(
        DataError, match=r"teachers.segmenter.sources: none of the 16 images .* raise transfer.calibration_images"
    ):
        distill(recipe(world, tmp_path / "run", ["streets"], images=rare))


def test_an_unknown_source_is_refused_with_those_that_there_are(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"teachers.segmenter.sources: roads not in images.sources: photos, streets"):
        recipe(world, tmp_path / "run", ["roads"])

"""Teachers that learn from some image sources alone: the other images have no part in their terms."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoulders.config.recipe import check_recipe
from shoulders.distillation import distill, prepare
from shoulders.errors import DataError, RecipeError
from shoulders.feature_cache import build_cache, estimate_cache, verify_cache
from shoulders.features import Batch, Features, align
from shoulders.hub.flops import count_flops
from shoulders.images import ImageSet, open_source
from shoulders.model import load
from shoulders.teachers import Teachers
from shoulders.training.flops import distillation_flops
from shoulders.training.preflight import check_training
from shoulders.transfer import balance
from shoulders.transfer.distances import distance
from shoulders.transfer.losses import Settings, kpu
from shoulders.transfer.projectors import FeatureDims, JointToStudent, TeacherToStudent, teacher_name
from tests.feature_cache.toy import SINGLE_PROCESS, SMALL_SHARDS, contents
from tests.tiny import (
    metric_rows,
    same_tensors,
    save_base,
    save_convnext,
    save_images,
    save_segformer,
    student_weights,
    tiny_tree,
)

B, D, GRID = 5, 8, (2, 2)
STEPS = 6
WIDTHS = {"one/last": 5, "two/last": 7, "base/latent": D}
ROWS = {"one": torch.tensor([0, 3]), "two": torch.tensor([1, 3])}  # image 3: both; images 2 and 4: neither


def random_features(images: int, width: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(images, width, generator=generator), torch.randn(images, 4, width, generator=generator), GRID
    )


def random_taps(first_seed: int) -> dict[str, Features]:
    return {tap: random_features(B, width, first_seed + i) for i, (tap, width) in enumerate(WIDTHS.items())}


def of_their_rows(features: dict[str, Features]) -> dict[str, Features]:
    """The features of each teacher's own images."""
    return {tap: one.take(ROWS.get(teacher_name(tap))) for tap, one in features.items()}


def of_one_image(features: Features, image: int) -> Features:
    """A batch of one image."""
    return features.map(lambda x: x[image : image + 1])


@pytest.mark.parametrize("kind", ["none", "each"])
def test_the_loss_is_that_of_each_image_with_the_teachers_that_it_has(kind: str) -> None:
    latent, predictions, targets = random_features(B, D, 0), random_taps(1), random_taps(11)
    torch.manual_seed(0)
    each = TeacherToStudent(D, {tap: FeatureDims(width, width) for tap, width in WIDTHS.items()}, 16)
    settings = Settings(preserve=0.7, t2s=kind, t2s_weight=0.3, t2s_grad_to="both")

    def loss(latent: Features, predictions: dict[str, Features], targets: dict[str, Features]) -> float:
        def latent_targets(teacher_mask: Mapping[str, Tensor]) -> dict[str, Features]:
            return each(targets, GRID)

        compare = distance("cosine_smooth_l1")
        return kpu(latent, predictions, targets, latent_targets, compare, balance.uniform, settings)[0].item()

    expected = 0.0
    for image in range(B):
        taps = [tap for tap in WIDTHS if image in ROWS.get(teacher_name(tap), range(B))]
        for tap in taps:
            weight = 1 if tap == "base/latent" else 2 / (len(taps) - 1)  # the share of a missing teacher goes to others
            one = ({tap: of_one_image(features[tap], image)} for features in (predictions, targets))
            expected += weight * loss(of_one_image(latent, image), *one)
    actual = loss(latent, of_their_rows(predictions), of_their_rows(targets))
    assert actual == pytest.approx(expected / B, rel=1e-5)


def test_the_joint_latent_is_predicted_from_the_teachers_that_an_image_has() -> None:
    targets = random_taps(11)
    torch.manual_seed(0)
    joint = JointToStudent(D, {tap: FeatureDims(width, width) for tap, width in WIDTHS.items()}, 16)
    mask = {tap: torch.zeros(B).index_fill(0, ROWS.get(teacher_name(tap), torch.arange(B)), 1) for tap in WIDTHS}
    together = joint(of_their_rows(targets), GRID, mask)
    for image in range(B):
        present = {tap: of_one_image(targets[tap], image) for tap in WIDTHS if mask[tap][image]}
        alone = joint(present, GRID, dict.fromkeys(present, torch.ones(1)))
        for component, x in together.components().items():
            assert torch.allclose(x[image], alone.components()[component][0], atol=1e-6)


def test_a_batch_without_images_of_any_teacher_has_no_loss() -> None:
    rows = torch.arange(0)
    prediction, target = (replace(random_features(0, 5, seed), rows=rows) for seed in (1, 2))
    prediction.summary.requires_grad_()  # type: ignore[union-attr]
    settings = Settings(preserve=0.0, t2s="none", t2s_weight=0.3, t2s_grad_to="both")
    loss, terms = kpu(
        random_features(B, D, 0),
        {"one/last": prediction},
        {"one/last": target},
        lambda teacher_mask: {},
        distance("cosine_smooth_l1"),
        balance.uniform,
        settings,
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.stack(list(terms.values())).isnan().all()


def test_features_take_rows_of_a_batch_once() -> None:
    features = random_features(B, 3, 0)
    some = features.take(torch.tensor([4, 1]))
    assert some.rows is not None and some.rows.tolist() == [4, 1] and some.batch_size == 2
    assert torch.equal(some.components()["summary"], features.components()["summary"][[4, 1]])
    assert some.map(torch.neg).rows is some.rows and align(some, (1, 1)).rows is some.rows
    assert features.take(None) is features
    with pytest.raises(ValueError, match="of some images of a batch already"):
        some.take(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"rows must be \(5,\), one for each image"):
        replace(features, rows=torch.tensor([0]))


def test_a_batch_knows_which_of_its_images_come_from_a_source() -> None:
    pixels = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2)
    batch = Batch(torch.arange(4), {(2, 2): pixels}, sources=torch.tensor([1, 0, 2, 1]))
    assert batch.rows_of(None) is None
    assert [batch.rows_of(sources).tolist() for sources in ([1], [0, 2], [3], [])] == [[0, 3], [1, 2], [], []]  # type: ignore[union-attr]
    rows = batch.rows_of([1])
    assert rows is not None
    some = batch.take(rows)
    assert some.sources is not None and some.sources.tolist() == [1, 1] and some.ids.tolist() == [0, 3]
    assert some.rendered[2, 2][:, 0, 0, 0].tolist() == [0, 3]
    with pytest.raises(ValueError, match="does not record the sources of its images"):
        Batch(torch.arange(4), {(2, 2): pixels}).rows_of([1])


TEACHER_MASK = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]])  # (B, T)


def test_an_image_counts_as_much_however_many_teachers_it_has() -> None:
    shared = torch.tensor([[1.5, 1.5, 0], [3, 0, 0], [0, 0, 3], [1, 1, 1], [0, 0, 0]])
    assert torch.equal(balance.uniform(torch.rand(5, 3), TEACHER_MASK), shared)
    dropped = balance.dropping(torch.rand(5, 3) * TEACHER_MASK, TEACHER_MASK, torch.rand(5, 3))
    assert torch.allclose(dropped.sum(1), torch.tensor([3.0, 3, 3, 3, 0]))
    assert not (dropped * (1 - TEACHER_MASK)).any()


def test_fixed_weights_count_also_where_teachers_lack_images() -> None:
    weights = balance.fixed(torch.rand(5, 3), TEACHER_MASK, [10.0, 1.0, 0.1])
    assert weights[1, 0] == 10 * 3
    assert weights[2, 2] == pytest.approx(0.1 * 3)
    assert weights[3].tolist() == pytest.approx([10, 1, 0.1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two teachers, and two sources of 40 images."""
    root = tmp_path_factory.mktemp("sources")
    save_base(root / "base")
    save_convnext(root / "classifier")
    save_segformer(root / "segmenter")
    save_images(root / "photos", 40)
    save_images(root / "streets", 40)
    return root


def recipe(world: Path, out: Path, sources: list[str] | None, **changes: Any) -> Any:
    tree = tiny_tree(
        world,
        out,
        teachers__segmenter__sources=sources,
        images__path=None,
        images__sources={name: {"path": str(world / name)} for name in ("photos", "streets")},
        images__holdout=16,
        train__steps=STEPS,
        train__save_every=3,
        train__evaluate_every=3,
    )
    return check_recipe(tree | {key: tree.get(key, {}) | value for key, value in changes.items()})


@pytest.fixture(scope="module")
def streets_only(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose segmenter learns from streets."""
    out = tmp_path_factory.mktemp("run") / "run"
    distill(recipe(world, out, ["streets"]))
    return out


def test_a_teacher_runs_on_images_of_its_own_sources_alone(world: Path, tmp_path: Path) -> None:
    run = prepare(recipe(world, tmp_path / "run", ["streets"]), {}, SINGLE_PROCESS)
    (batch,) = run.batches.training(0, 1)
    names = [run.images.collection.name_of_id(int(identity)) for identity in batch.ids]
    streets = [row for row, name in enumerate(names) if name.startswith("streets/")]
    assert 0 < len(streets) < len(batch)
    features = run.step.teacher_features(batch)
    some = features["segmenter/stage0"]
    assert some.rows is not None and some.rows.tolist() == streets and some.batch_size == len(streets)
    assert features["classifier/stage1"].rows is None and features["classifier/stage1"].batch_size == len(batch)
    every_image = Teachers({"segmenter": run.teachers["segmenter"]})(batch)["segmenter/stage0"]
    assert torch.allclose(some.spatial, every_image.take(some.rows).spatial, atol=1e-5)  # type: ignore[arg-type]


def test_training_reduces_the_loss_and_measures_each_teacher_on_its_own_images(world: Path, streets_only: Path) -> None:
    assert "fvu/segmenter" in metric_rows(streets_only, "evaluation")[-1]
    rows = metric_rows(streets_only)
    assert sum(row["loss"] for row in rows[-2:]) < 0.97 * sum(row["loss"] for row in rows[:2])
    assert all("s2t/classifier/stage1/spatial" in row for row in rows)
    assert any("s2t/segmenter/stage0/spatial" in row for row in rows)


def test_a_resumed_run_ends_with_the_same_bits(world: Path, streets_only: Path, tmp_path: Path) -> None:
    shutil.copytree(streets_only, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:09d}", ignore_errors=True)
    for left in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(left)
    shutil.rmtree(tmp_path / "run" / "student")
    distill(recipe(world, tmp_path / "run", ["streets"]), resume=True)
    assert same_tensors(student_weights(tmp_path / "run"), student_weights(streets_only))


def test_a_source_without_teachers_is_refused(world: Path, tmp_path: Path) -> None:
    both = {"teachers": {"classifier": {"model": str(world / "classifier"), "sources": ["streets"]}}}
    with pytest.raises(RecipeError, match="no teacher uses photos, and transfer.preserve is 0"):
        distill(recipe(world, tmp_path / "run", ["streets"], **both, transfer={"preserve": 0.0}))


def test_nested_sources_give_a_warning(world: Path, tmp_path: Path) -> None:
    nested = {"sources": {"all": {"path": str(world)}, "streets": {"path": str(world / "streets")}}}
    with pytest.warns(UserWarning, match="streets is inside all: .* held-out measures are too good"):
        check_training(recipe(world, tmp_path / "run", ["streets"], images=nested), {}, SINGLE_PROCESS)


def test_statistics_need_enough_images_not_enough_tokens(world: Path, tmp_path: Path) -> None:
    maps = {"segmenter": {"model": str(world / "segmenter"), "taps": ["stage0"], "sources": ["streets"]}}
    shares = {"photos": 0.97, "streets": 0.03}
    sources = {name: {"path": str(world / name), "share": share} for name, share in shares.items()}
    changes = {"teachers": maps, "images": {"sources": sources}}
    with pytest.raises(DataError, match=r"teachers.segmenter.sources: only [0-3] of the 16 images"):
        distill(recipe(world, tmp_path / "run", ["streets"], **changes))


def test_naming_all_sources_is_the_same_as_naming_none(world: Path, tmp_path: Path) -> None:
    short = {"train": {"steps": 2}}
    distill(recipe(world, tmp_path / "all", ["photos", "streets"], **short))
    distill(recipe(world, tmp_path / "none", None, **short))
    one, other = student_weights(tmp_path / "all"), student_weights(tmp_path / "none")
    # gradients of a token are added in another order
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in other)


def test_a_cache_gives_the_same_student(world: Path, streets_only: Path, tmp_path: Path) -> None:
    changes = {"images": {"views": 2}, "cache": {"path": str(tmp_path / "cache"), "dtype": "float32"}}
    cached = recipe(world, tmp_path / "cached", ["streets"], **changes)
    build_cache(cached)
    distill(cached)
    live = {"images": {"views": 2}}
    distill(recipe(world, tmp_path / "live", ["streets"], **live))
    assert same_tensors(student_weights(tmp_path / "cached"), student_weights(tmp_path / "live"))


def test_a_cache_holds_images_of_the_sources_alone(world: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "streets", 6)
    bad = sorted((tmp_path / "streets").iterdir())[3]
    bad.write_bytes(b"no image")
    sources = {name: {"path": str(folder / name)} for name, folder in (("photos", world), ("streets", tmp_path))}
    tree = {
        "images": {"sources": sources, "size": 32, "holdout": 16, "workers": 0, "views": 2, "max_unreadable": 0.1},
        "cache": {"path": str(tmp_path / "cache"), "mode": "require"},
    }
    one = recipe(world, tmp_path / "run", ["streets"], **tree)
    planned = {row["teacher"]: row["views"] for row in estimate_cache(one, settings=SMALL_SHARDS)["teachers"]}
    assert planned["segmenter"] == 2 * 3 + 3  # half of so few are held out
    assert planned["classifier"] == planned["base"] > 6 * planned["segmenter"]
    built = {row["teacher"]: row for row in build_cache(one, settings=SMALL_SHARDS)["teachers"]}
    assert {name: row["views"] for name, row in built.items()} == planned
    assert [row["undecodable"] in (1, 2) for row in built.values()] == [True] * 3  # held out, or in two views
    assert built["segmenter"]["bytes"] == planned["segmenter"] * built["segmenter"]["bytes_per_view"]
    before = contents(tmp_path / "cache")
    shards = [name for name in before if name.startswith("segmenter/shard")]
    assert 0 < len(shards) == built["segmenter"]["shards"] < built["classifier"]["shards"]

    for name in shards:
        (tmp_path / "cache" / name).unlink()
        with pytest.raises(DataError, match="missing, or of another size"):
            verify_cache(one)
        build_cache(one, settings=SMALL_SHARDS)
        assert contents(tmp_path / "cache") == before
    verify_cache(one)

    with pytest.raises(DataError, match=r"sources was streets, is \['photos', 'streets'\]"):
        build_cache(recipe(world, tmp_path / "run", ["streets", "photos"], **tree))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler imports what torch warns of
def test_a_compiled_run_has_the_same_losses_and_few_graphs(world: Path, streets_only: Path, tmp_path: Path) -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    distill(recipe(world, tmp_path / "compiled", ["streets"], train={"compile": True, "evaluate_every": 1000}))
    plain, compiled = ([row["loss"] for row in metric_rows(one)] for one in (streets_only, tmp_path / "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    # in steps, and in held-out measures: of no gradients, and of their last images, which are fewer
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def test_a_teacher_of_fewer_images_costs_fewer_flops(world: Path, streets_only: Path, tmp_path: Path) -> None:
    def flops(sources: list[str] | None) -> float:
        trainer = prepare(recipe(world, tmp_path / "run", sources), {}, SINGLE_PROCESS)
        sizes = trainer.batches.render_sizes
        blank = {size: torch.zeros(4, 3, *size, dtype=torch.uint8) for size in sizes}
        batch = Batch(torch.arange(4), blank, sources=torch.tensor([1, 0, 1, 0]))
        return count_flops(lambda: trainer.step.backward(1, batch)) / 4

    half, everything = flops(["streets"]), flops(None)
    counted = distillation_flops(load(streets_only), recipe(world, streets_only, ["streets"]))
    assert counted == pytest.approx(half, rel=1e-6)  # both sources have the same share
    assert half < 0.9 * everything


def test_every_source_holds_out_its_share_of_images(world: Path) -> None:
    sources = {"many": open_source(world / "photos", "image"), "few": open_source(world / "streets", "image")}
    images = ImageSet(sources, {"many": 0.75, "few": 0.25}, 0, 12)
    heldout = images.collection.ids[images.heldout]
    owners = [len(images.collection.indices_from([source], heldout)) for source in ("many", "few")]
    assert owners == [8, 8]  # some in any case
    assert (np.diff(images.collection.ids[images.heldout]) > 0).all()
    trained = np.concatenate(list(images.training.values()))
    assert sorted([*trained.tolist(), *images.heldout.tolist()]) == list(range(80))


def test_a_teacher_without_calibration_images_is_named(world: Path, tmp_path: Path) -> None:
    often = {"path": str(world / "photos"), "share": 0.97}
    rare = {"sources": {"photos": often, "streets": {"path": str(world / "streets")}}}
    with pytest.raises(
        DataError, match=r"teachers.segmenter.sources: only 0 of the 16 images .* raise transfer.calibration_images"
    ):
        distill(recipe(world, tmp_path / "run", ["streets"], images=rare))


def test_an_unknown_source_is_refused_with_the_known_ones(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"teachers.segmenter.sources: roads not in images.sources: photos, streets"):
        recipe(world, tmp_path / "run", ["roads"])

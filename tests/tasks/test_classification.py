"""The probes of classification equal references, separate what is separable, and stay at chance on noise."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from shoulders.errors import DataError, NumericError
from shoulders.features import Batch, Features, Skipped
from shoulders.tasks import Row, vector_probes
from shoulders.tasks.classification import fit_classification_probes
from shoulders.tasks.data.labelled import find_labelled
from shoulders.tasks.heads.linear import fit_logistic, linear_logits
from shoulders.tasks.skipped import max_unreadable
from shoulders.tasks.vector_probes import LabelledVectors


def clusters(n: int, n_classes: int, width: int, spread: float, seed: int) -> LabelledVectors:
    """Images of class k lie around the k-th of ``n_classes`` fixed centres."""
    centres = torch.randn(n_classes, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % n_classes
    x = centres[labels] + spread * torch.randn(n, width, generator=generator)
    return LabelledVectors(x, labels, torch.arange(n))


def batch_of(labels: list[int] | None, n: int, skipped: tuple[Skipped, ...] = ()) -> Batch:
    pixels = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
    return Batch(torch.arange(n), {(2, 2): pixels}, None if labels is None else torch.tensor(labels), skipped)


def by_metric(rows: list[Row]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


def test_the_vector_of_an_image_is_its_summary() -> None:
    features = Features(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 4, 2), (2, 2))
    vectors = vector_probes.extract_vectors(lambda batch: features, [batch_of([1, 0], 2), batch_of([1, 1], 2)])
    assert torch.equal(vectors.x, torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]))
    assert vectors.labels.tolist() == [1, 0, 1, 1]
    assert vectors.ids.tolist() == [0, 1, 0, 1]


def test_without_a_summary_the_vector_is_the_mean_over_the_tokens() -> None:
    spatial = torch.tensor([[[0.0, 8.0], [2.0, 0.0]]], dtype=torch.bfloat16)  # (1, 2, 2)
    vectors = vector_probes.extract_vectors(lambda batch: Features(None, spatial, (1, 2)), [batch_of([0], 1)])
    assert torch.equal(vectors.x, torch.tensor([[1.0, 4.0]]))
    assert vectors.x.dtype == torch.float32


def test_skipped_images_are_listed_and_not_counted() -> None:
    batches = [batch_of([], 0, (Skipped("a.jpg", "truncated"),)), batch_of([2, 0, 1], 3)]
    with max_unreadable(0.25):
        vectors = vector_probes.extract_vectors(lambda batch: Features(torch.ones(len(batch), 3), None), batches)
    assert len(vectors.x) == 3
    assert vectors.skipped == (Skipped("a.jpg", "truncated"),)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(DataError, match="needs labels"):
        vector_probes.extract_vectors(lambda batch: Features(torch.ones(1, 3), None), [batch_of(None, 1)])


def test_a_split_without_readable_images_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 1"):
        vector_probes.extract_vectors(lambda batch: Features(None, None), [batch_of([], 0, (Skipped("a", "b"),))])


def test_features_that_are_not_finite_are_refused() -> None:
    broken = Features(torch.tensor([[1.0], [float("nan")]]), None)
    with pytest.raises(NumericError, match="1 of 2 images"):
        vector_probes.extract_vectors(lambda batch: broken, [batch_of([0, 1], 2)])


@pytest.mark.parametrize("l2", [0.3, 0.01])
def test_logistic_regression_equals_that_of_scikit_learn(l2: float) -> None:
    train, test = clusters(300, 5, 12, 1.5, seed=1), clusters(200, 5, 12, 1.5, seed=2)
    reference = LogisticRegression(C=1 / (l2 * len(train.x)), tol=1e-8, max_iter=2000)
    reference.fit(train.x.double().numpy(), train.labels.numpy())
    weights = fit_logistic(train.x, train.labels, 5, l2)
    ours = linear_logits(weights, test.x).softmax(1)
    expected = torch.from_numpy(reference.predict_proba(test.x.double().numpy())).float()
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    agreement = reference.score(test.x.double().numpy(), test.labels.numpy())
    assert vector_probes.top1(ours.argmax(1), test.labels) == pytest.approx(agreement, abs=1e-3)


def test_a_warm_start_reaches_the_same_minimum() -> None:
    train = clusters(300, 5, 12, 1.5, seed=1)
    cold = fit_logistic(train.x, train.labels, 5, 0.01)
    warm = fit_logistic(train.x, train.labels, 5, 0.01, start=fit_logistic(train.x, train.labels, 5, 1.0))
    probabilities = [linear_logits(weights, train.x).softmax(1) for weights in (cold, warm)]
    torch.testing.assert_close(probabilities[0], probabilities[1], atol=1e-3, rtol=0)


def knn_reference(train: LabelledVectors, test: LabelledVectors, n_classes: int) -> list[int]:
    """The DINO protocol, one image after the other."""
    predicted = []
    for query in test.x.double():
        similarity = [F.cosine_similarity(query, image, dim=0).item() for image in train.x.double()]
        nearest = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:20]
        votes = [0.0] * n_classes
        for i in nearest:
            votes[int(train.labels[i])] += float(np.exp(similarity[i] / 0.07))
        predicted.append(int(np.argmax(votes)))
    return predicted


def test_knn_equals_a_brute_force_reference() -> None:
    train, test = clusters(150, 4, 6, 1.5, seed=1), clusters(60, 4, 6, 1.5, seed=2)
    expected = knn_reference(train, test, 4)
    value, settings = vector_probes.knn_top1(train, None, test, 4, seed=0)
    assert value == sum(a == b for a, b in zip(expected, test.labels.tolist(), strict=True)) / 60
    # with the predictions of the reference as labels, every prediction is correct
    relabelled = LabelledVectors(test.x, torch.tensor(expected), test.ids)
    assert vector_probes.knn_top1(train, None, relabelled, 4, seed=0)[0] == 1.0
    assert settings == {"k": 20, "temperature": 0.07}


def test_few_shot_is_the_nearest_mean_of_the_drawn_images() -> None:
    # two images per class: with two shots every draw is the same
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -3.0]])
    train = LabelledVectors(x, torch.tensor([0, 0, 1, 1]), torch.arange(4))
    test = LabelledVectors(torch.tensor([[5.0, 4.0], [1.0, -0.5]]), torch.tensor([0, 1]), torch.arange(2))
    # means of unit vectors: (.5, .5) and (-.5, -.5): the second image is nearer to class 0
    assert vector_probes.few_shot_top1(2, train, None, test, 2, seed=0) == (0.5, {"draws": 5, "std": 0.0})
    assert vector_probes.few_shot_top1(3, train, None, test, 2, seed=0) is None


def test_of_several_models_each_vector_counts_the_same() -> None:
    # two models side by side, the numbers of the second are a hundred times larger
    x = torch.tensor([[3.0, 4.0, 0.0, 600.0], [0.0, 5.0, 800.0, 600.0], [0.0, 0.0, 100.0, 0.0]])
    vectors = LabelledVectors(x, torch.tensor([0, 1, 1]), torch.arange(3), widths=(2, 2))
    half = 0.5**0.5
    expected = torch.tensor([[0.6, 0.8, 0.0, 1.0], [0.0, 1.0, 0.8, 0.6], [0.0, 0.0, half**-1, 0.0]]) * half
    torch.testing.assert_close(vectors.unit(), expected)  # the third has no direction in the first model
    first, second = (LabelledVectors(part, vectors.labels, vectors.ids).unit() for part in x.split(2, 1))
    cosines = (first @ first.T + second @ second.T) / 2
    torch.testing.assert_close((vectors.unit() @ vectors.unit().T)[:2, :2], cosines[:2, :2])


def test_nearest_neighbours_and_few_shots_of_several_models_compare_them_alike() -> None:
    def vectors(rows: list[list[float]], labels: list[int], widths: tuple[int, ...]) -> LabelledVectors:
        return LabelledVectors(torch.tensor(rows), torch.tensor(labels), torch.arange(len(rows)), widths=widths)

    # the first model is sure of class 0, the second prefers class 1 a little, with larger numbers
    train, test = [[1.0, 0.0, 60.0, 80.0], [0.0, 1.0, 80.0, 60.0]], [[1.0, 0.0, 80.0, 60.0]]
    for widths, expected in (((2, 2), 1.0), ((), 0.0)):
        fitted, tested = vectors(train, [0, 1], widths), vectors(test, [0], widths)
        assert vector_probes.knn_top1(fitted, None, tested, 2, seed=0)[0] == expected
        few_shot = vector_probes.few_shot_top1(1, fitted, None, tested, 2, seed=0)
        assert few_shot is not None and few_shot[0] == expected


@pytest.mark.parametrize("with_val", [True, False])
def test_separable_clusters_are_classified_perfectly(with_val: bool) -> None:
    train, test = clusters(120, 3, 16, 0.05, seed=1), clusters(60, 3, 16, 0.05, seed=2)
    val = clusters(60, 3, 16, 0.05, seed=3) if with_val else None
    rows = vector_probes.evaluate_vectors(train, val, test, 3, seed=0, task="classification")
    assert by_metric(rows) == dict.fromkeys(vector_probes.PROBES, 1.0)
    assert all(row["n"] == 60 and row["task"] == "classification" for row in rows)
    assert rows[1]["settings"]["selected_on"] == ("val" if with_val else "a tenth of train")


def test_random_labels_are_classified_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(n: int) -> LabelledVectors:
        x, labels = torch.randn(n, 8, generator=generator), torch.randint(0, 4, (n,), generator=generator)
        return LabelledVectors(x, labels, torch.arange(n))

    values = by_metric(vector_probes.evaluate_vectors(noise(400), None, noise(2000), 4, seed=0, task="classification"))
    assert all(abs(value - 0.25) < 0.05 for value in values.values()), values


def test_the_same_seed_gives_the_same_rows() -> None:
    train, test = clusters(200, 4, 8, 2.0, seed=1), clusters(100, 4, 8, 2.0, seed=2)

    def rows(seed: int) -> list[dict[str, object]]:
        every = vector_probes.evaluate_vectors(train, None, test, 4, seed, task="classification")
        return [{name: value for name, value in row.items() if name != "seconds"} for row in every]

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)  # the draws of the few-shot rows


def test_scale_and_shift_of_a_channel_do_not_change_the_linear_probe() -> None:
    train, test = clusters(200, 4, 8, 1.0, seed=1), clusters(100, 4, 8, 1.0, seed=2)
    scale, shift = torch.logspace(-3, 3, 8), torch.linspace(-5, 5, 8)

    def changed(split: LabelledVectors) -> LabelledVectors:
        constant = torch.full((len(split.x), 1), 3.0)
        return LabelledVectors(torch.cat([split.x * scale + shift, constant], 1), split.labels, split.ids)

    plain, _ = vector_probes.linear_top1(train, None, test, 4, seed=0)
    scaled, _ = vector_probes.linear_top1(changed(train), None, changed(test), 4, seed=0)
    assert scaled == pytest.approx(plain, abs=0.01)


def test_from_a_folder_of_images_to_rows(tmp_path: Path) -> None:
    for name, shade in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for index in range(20):
            Image.new("RGB", (8, 6), (shade + index, shade, shade)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "dark" / "broken.png").write_bytes(b"not an image")

    @torch.inference_mode()  # callers may use it; the probes still need gradients
    def colours(batch: Batch) -> Features:
        return Features.from_map(batch.pixels((4, 4)) - 0.5)

    with max_unreadable(0.1):
        rows = fit_classification_probes(colours, find_labelled(tmp_path), [(4, 4)], batch=7)
    assert by_metric(rows) == dict.fromkeys(vector_probes.PROBES, 1.0)
    settings = rows[0]["settings"]
    assert (settings["split"], settings["skipped"], settings["k"]) == ("80/20 by image id", 1, 20)
    assert rows[0]["n"] + int(settings["train"]) == 40


def small_pixels(parquet: Path, count: int) -> LabelledVectors:
    """The first images of CIFAR-10 as 4 x 4 colour means, (count, 48)."""
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow_parquet.read_table(parquet).slice(0, count)
    vectors: list[Tensor] = []
    for row in table.column("image").to_pylist():
        pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")).copy())
        vectors.append(F.avg_pool2d(pixels.permute(2, 0, 1).float(), 8).flatten())
    labels = torch.tensor(table.column("label").to_pylist())
    return LabelledVectors(torch.stack(vectors), labels, torch.arange(len(labels)))


def test_pixel_means_of_cifar10_are_weak_features(shared_data: Path) -> None:
    train = small_pixels(shared_data / "cifar10" / "train.parquet", 2000)
    test = small_pixels(shared_data / "cifar10" / "test.parquet", 1000)
    values = by_metric(vector_probes.evaluate_vectors(train, None, test, 10, seed=0, task="classification"))
    assert 0.2 < values["knn_top1"] < 0.45
    assert 0.25 < values["linear_top1"] < 0.45
    assert 0.1 < values["1shot_top1"] < values["10shot_top1"] < 0.35

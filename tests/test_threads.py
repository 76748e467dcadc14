"""A student, its heads and its teachers in several threads at once: each thread gets the output for its own images."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoulders.model import load
from shoulders.teachers import load_teacher
from shoulders.teachers.heads import TeacherHead, taps_of_teacher
from tests.student.test_encoder import ADAPTERS, build, randomize
from tests.teachers.heads.test_saved import run, save_teacher, to_lists  # noqa: F401
from tests.teachers.heads.test_zero_shot import load_both

THREADS = 6
CALLS = 60


def count_wrong(compute: Callable[[Tensor], Any], inputs: list[Tensor]) -> int:
    """How many outputs in threads differ from those in one thread."""
    expected = [compute(x) for x in inputs]
    with ThreadPoolExecutor(THREADS) as pool:
        outputs = list(pool.map(compute, [inputs[i % len(inputs)] for i in range(CALLS)]))
    return sum(output != expected[i % len(inputs)] for i, output in enumerate(outputs))


def run_within(module: nn.Module, other: Callable[[], object]) -> Callable[[], None]:
    """Run a function in another thread, once, whenever `module` starts its forward; returns how to stop that."""
    inside = threading.Lock()

    def start(*_: object) -> None:
        if inside.acquire(blocking=False):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            inside.release()

    return module.register_forward_pre_hook(start).remove


@pytest.mark.parametrize("name", ["rt_detr_v2", "segformer"])
def test_predictions_in_threads_are_those_in_one_thread(name: str, run: Path) -> None:  # noqa: F811
    student = load(run)
    inputs = [torch.rand(1, 3, 32, 32) for _ in range(6)]
    assert count_wrong(lambda x: to_lists(student.predict(name, x, threshold=0.0)), inputs) == 0


@torch.no_grad()
def test_a_head_keeps_the_features_of_each_thread_apart(run: Path) -> None:  # noqa: F811
    student = load(run)
    first, second = (
        taps_of_teacher("segformer", student.predict_teacher_features(torch.rand(1, 3, 32, 32))) for _ in range(2)
    )
    head = student.head("segformer")
    assert isinstance(head, TeacherHead)
    expected = head(first).logits
    stop = run_within(head.model, lambda: head(second))
    assert torch.equal(head(first).logits, expected)
    stop()
    assert not torch.equal(head(second).logits, expected)


@torch.no_grad()
def test_a_zero_shot_head_keeps_the_features_of_each_thread_apart(tmp_path: Path) -> None:
    _, teacher, head = load_both("clip", tmp_path)
    first, second = (teacher(torch.rand(1, 3, *teacher.size)) for _ in range(2))
    expected = head(first).logits
    run_within(head.model, lambda: head(second))
    assert torch.equal(head(first).logits, expected)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter["kind"])
@torch.no_grad()
def test_an_adapter_that_one_thread_disables_is_on_in_the_others(adapter: dict[str, Any]) -> None:
    encoder, _ = build("dinov2", adapter)
    randomize(encoder)
    pixels = torch.rand(1, 3, 32, 32)
    expected = encoder(pixels)["latent"].spatial
    with encoder.adapters_disabled(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: encoder(pixels)["latent"].spatial).result(), expected)
        assert not torch.equal(encoder(pixels)["latent"].spatial, expected)


@torch.no_grad()
def test_a_detector_as_a_teacher_runs_in_threads(tmp_path: Path) -> None:
    teacher = load_teacher("t", save_teacher("rt_detr_v2", tmp_path))
    inputs = [torch.rand(1, 3, 64, 64) for _ in range(4)]

    def compute(x: Tensor) -> list[Any]:
        return [
            features.spatial.flatten()[:5].tolist() for features in teacher(x).values() if features.spatial is not None
        ]

    assert count_wrong(compute, inputs) == 0


def test_threads_that_use_a_head_first_at_once_share_one_copy(run: Path) -> None:  # noqa: F811
    student = load(run)
    start = threading.Barrier(THREADS)

    def open_head(_: int) -> int:
        start.wait()
        return id(student.head("segformer"))

    with ThreadPoolExecutor(THREADS) as pool:
        assert len(set(pool.map(open_head, range(THREADS)))) == 1

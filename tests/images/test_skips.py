"""Each unreadable image is listed once, also in a resumed run, and too many of them stop the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoulders.errors import DataError
from shoulders.features import Skipped
from shoulders.images import SkipReport


def bad(*numbers: int, reason: str = "damaged: OSError") -> list[Skipped]:
    return [Skipped(f"{number}.jpg", reason) for number in numbers]


def listed(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text().splitlines()]


def test_each_image_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    report = SkipReport(path, 1000, 0.01)
    report.add([])
    assert not path.exists()
    report.add(bad(1, 2))
    report.add(bad(2, 3, 3))
    assert listed(path) == ["1.jpg", "2.jpg", "3.jpg"] and len(report) == 3


def test_a_resumed_run_continues_the_count(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    SkipReport(path, 1000, 0.01).add(bad(*range(9)))
    with path.open("a") as file:
        file.write('{"name": "half a li')  # killed while writing
    report = SkipReport(path, 1000, 0.01)
    assert len(report) == 9
    report.add(bad(8, 9))
    assert listed(path) == [f"{number}.jpg" for number in range(10)]
    with pytest.raises(DataError):
        report.add(bad(10))


def test_too_many_bad_images_stop_the_run_with_the_reasons(tmp_path: Path) -> None:
    report = SkipReport(tmp_path / "skipped.jsonl", 200, 0.01)
    report.add(bad(1, 2))
    with pytest.raises(DataError) as stop:
        report.add(bad(3, reason="not an image: html"))
    message = str(stop.value)
    assert "3 of 200 images cannot be used (2 damaged, 1 not an image)" in message
    assert (
        str(tmp_path / "skipped.jsonl") in message and "images.max_unreadable=0.03" in message and "\n" not in message
    )
    assert len(listed(tmp_path / "skipped.jsonl")) == 3  # the list is complete when the run stops


def test_names_with_control_characters_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    names = ["a\nb.jpg", "\x1b[31mred.jpg", "\udcff.jpg", '"quoted".jpg', "ä.jpg"]
    SkipReport(path, 1000, 1.0).add([Skipped(name, "empty file") for name in names])
    assert path.read_bytes().isascii() and b"\x1b" not in path.read_bytes()
    assert listed(path) == names
    assert len(SkipReport(path, 1000, 1.0)) == 5


def test_another_file_in_place_of_the_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    path.write_text("hello\n")
    with pytest.raises(DataError, match="move it out of the way"):
        SkipReport(path, 10, 1.0)

"""JSON that is nested too deeply is damaged JSON, wherever it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import shoulders
from shoulders.errors import DataError
from shoulders.report.page import count_parameters
from shoulders.report.record import read_run
from shoulders.storage.json_text import parse_json
from shoulders.storage.results import read_rows
from tests.tiny import tiny_tree

DEEP = '{"model_type": ' + "[" * 100_000


def test_json_is_parsed() -> None:
    assert parse_json('{"a": [1]}') == parse_json(b'{"a": [1]}') == {"a": [1]}
    for text in (DEEP, "{", ""):
        with pytest.raises(ValueError, match=r"nested too deeply|line 1"):
            parse_json(text)


READERS: dict[str, Callable[[Path], object]] = {
    "results.json": lambda folder: read_rows(folder / "results.json"),
    "config.json": shoulders.load,
    "student/config.json": read_run,
}


@pytest.mark.parametrize("name", READERS)
def test_a_deeply_nested_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    if name == "config.json":
        (tmp_path / "student").rmdir()
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(DataError, match=str(tmp_path)) as refused:
        READERS[name](tmp_path)
    assert "\n" not in str(refused.value)


def test_a_deeply_nested_line_of_a_log_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "kind": "train"}}\n{DEEP}\n')
    assert read_run(tmp_path).metrics == [{"step": 1, "kind": "train"}]


def test_a_hostile_header_of_weights_does_not_end_the_report(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    for data in (b"\xff" * 8, (10).to_bytes(8, "little") + b"[" * 10, (12).to_bytes(8, "little") + b'{"encoder."}'):
        (tmp_path / "student" / "model.safetensors").write_bytes(data)
        with pytest.raises(DataError, match="damaged weights"):
            count_parameters(tmp_path)

"""Code that comes with a model never runs unless a recipe trusts it at one commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModel

import shoulders
from shoulders.config.sections import TeacherSpec
from shoulders.config.student import Student
from shoulders.errors import ShouldersError
from shoulders.hub.card import write_card
from shoulders.student.base import load_base
from shoulders.student.files import finish_folder
from shoulders.teachers import load_teacher
from shoulders.teachers.heads.saved import open_head
from tests.hub.test_hostile_weights import write_head, write_student
from tests.tiny import save_base

CODE = "from pathlib import Path\nPath({canary!r}).write_text('ran')\nclass Config: ...\nclass Model: ...\n"
MAP = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoImageProcessor": "evil.Model"}


def add_code(folder: Path, canary: Path, **changes: str) -> None:
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    for name in ("config.json", "preprocessor_config.json"):
        settings = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(settings | changes | {"auto_map": MAP}))


def write_model(folder: Path) -> Path:
    return save_base(folder, "vit")


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "teacher": (write_model, lambda folder: load_teacher("t", TeacherSpec(model=str(folder)))),
    "base": (write_model, lambda folder: load_base(Student(base=str(folder)))),
    "head": (write_head, open_head),
    "student": (write_student, shoulders.load),
    "AutoModel": (write_student, AutoModel.from_pretrained),
}


@pytest.mark.parametrize("reader", READERS)
def test_code_beside_a_model_of_a_known_type_does_not_run(tmp_path: Path, reader: str) -> None:
    write, read = READERS[reader]
    folder = write(tmp_path / "model")
    add_code(folder, tmp_path / "canary")
    finish_folder(folder)
    if reader == "head":  # this one is of a model without a head
        with pytest.raises(ShouldersError, match="not a valid head"):
            read(folder)
    else:
        read(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "AutoModel"])
def test_code_of_a_model_of_an_unknown_type_does_not_run(tmp_path: Path, reader: str) -> None:
    write, read = READERS[reader]
    folder = write(tmp_path / "model")
    add_code(folder, tmp_path / "canary", model_type="unheard_of")
    finish_folder(folder)
    with pytest.raises(ShouldersError, match=r"unheard_of|not a valid head") as refused:
        read(folder)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "canary").exists()


def test_the_card_has_the_commit_of_every_teacher(tmp_path: Path) -> None:
    teachers: dict[str, dict[str, str | None]] = {
        "one": {"source": "someone/something", "revision": "0123456789" * 4, "license": "mit"},
        "two": {"source": "folder", "revision": None, "license": "unknown"},
    }
    write_card(tmp_path, (32, 32), 8, teachers)
    card = (tmp_path / "README.md").read_text()
    assert f"| one | someone/something | {'0123456789' * 4} | mit |\n| two | folder | - | unknown |\n" in card

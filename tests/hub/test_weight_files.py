"""Weights come from safetensors files in the model's own folder, whatever the other files of the folder name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import shoulders
from shoulders.config.sections import TeacherSpec
from shoulders.config.student import Student
from shoulders.errors import DataError, ShouldersError
from shoulders.hub import Pretrained, check_weight_files
from shoulders.model import ShouldersBackbone, ShouldersModel
from shoulders.student.base import check_base, load_base
from shoulders.student.files import finish_folder
from shoulders.teachers import check_teacher, load_teacher
from tests.test_model import make_student
from tests.tiny import save_base

INDEX = "model.safetensors.index.json"


class RunsCode:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (Path.write_text, (self.path, "ran"))  # type: ignore[return-value]


def save_model(folder: Path) -> Path:
    return save_base(folder, "vit")


def save_student(folder: Path) -> Path:
    make_student().save_pretrained(folder)
    return folder


# what reads the weights of a folder: the function that writes the folder, and the one that reads it
READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "check_teacher": (save_model, lambda folder: check_teacher("t", TeacherSpec(model=str(folder)))),
    "load_teacher": (save_model, lambda folder: load_teacher("t", TeacherSpec(model=str(folder)))),
    "check_base": (save_model, lambda folder: check_base(Student(base=str(folder)), (32, 32))),
    "load_base": (save_model, lambda folder: load_base(Student(base=str(folder)))),
    "load": (save_student, shoulders.load),
    "AutoModel": (save_student, lambda folder: AutoModel.from_pretrained(folder)),
    "by keyword": (save_student, lambda folder: AutoModel.from_pretrained(pretrained_model_name_or_path=folder)),
    "backbone": (save_student, ShouldersBackbone.from_pretrained),
}


def name_in_index(folder: Path, file: str) -> None:
    """Move the weights of a folder to where an index file then says that they are."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, file)}
    (folder / INDEX).write_text(json.dumps(index))
    if file.endswith(".safetensors"):
        save_file(weights, folder / file, {"format": "pt"})
    else:
        torch.save({**weights, "extra": RunsCode(folder / "ran")}, folder / file)
    finish_folder(folder)  # whoever changes a student also writes its manifest


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "../outside.safetensors", "{root}/other.safetensors"])
def test_an_index_that_names_a_pickle_or_a_path_outside_is_refused(tmp_path: Path, reader: str, name: str) -> None:
    write, read = READERS[reader]
    folder, name = write(tmp_path / "model"), name.format(root=tmp_path)
    read(folder)
    name_in_index(folder, name)
    with pytest.raises(ShouldersError, match="weight_map names") as refused:
        read(folder)
    assert repr(name) in str(refused.value) and "\n" not in str(refused.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("reader", ["load_teacher", "load_base", "load"])
def test_an_index_of_safetensors_in_the_folder_is_read(tmp_path: Path, reader: str) -> None:
    write, read = READERS[reader]
    folder = write(tmp_path / "model")
    name_in_index(folder, "model-00001-of-00001.safetensors")
    read(folder)


@pytest.mark.parametrize("reader", READERS)
def test_a_config_that_names_other_weights_is_refused(tmp_path: Path, reader: str) -> None:
    write, read = READERS[reader]
    folder = write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    save_file({name: x * 0 for name, x in weights.items()}, folder / "zeros.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "zeros.safetensors"}))
    finish_folder(folder)
    with pytest.raises(ShouldersError, match=r"transformers_weights names 'zeros\.safetensors'"):
        read(folder)


@pytest.mark.parametrize("reader", READERS)
def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path, reader: str) -> None:
    """Where peft is installed, transformers would add its weights, or those of the model that it names."""
    write, read = READERS[reader]
    folder = write(tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "another/model"}')
    with pytest.raises(ShouldersError, match=r"has an adapter_config\.json"):
        read(folder)


def test_a_student_with_nothing_but_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = save_student(tmp_path / "student")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "extra": RunsCode(folder / "ran")}, folder / "pytorch_model.bin")
    finish_folder(folder)
    for read in (shoulders.load, AutoModel.from_pretrained):
        with pytest.raises((ShouldersError, OSError), match=r"model\.safetensors"):
            read(folder)
    assert not (folder / "ran").exists()


def test_a_student_in_a_subfolder_is_checked_and_has_one_set_of_weights(tmp_path: Path) -> None:
    folder = save_student(tmp_path / "students" / "small")
    shutil.copy(folder / "model.safetensors", folder / "model.old.safetensors")
    finish_folder(folder)
    read = partial(ShouldersModel.from_pretrained, tmp_path / "students")
    read(subfolder="small")
    with pytest.raises(DataError, match="variant='old' names other weights; a student has one set"):
        read(subfolder="small", variant="old")
    with pytest.raises(DataError, match="no folder 'large' in it"):
        read(subfolder="large")
    with pytest.raises(DataError, match="no folder 'small' in it; of a hub model, download the folder"):
        ShouldersModel.from_pretrained("nobody/students", subfolder="small")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "another/model"}')
    with pytest.raises(DataError, match=r"has an adapter_config\.json"):
        read(subfolder="small")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "without a weight_map"),
        ('{"weight_map": ["a"]}', "without a weight_map"),
        ('{"weight_map": {"a": 1}}', "without a weight_map"),
        ('{"weight_map": {"a": "sub/../../b.safetensors"}}', "not in the folder"),
        ('{"weight_map": {"a": "C:\\\\b.safetensors"}}', "not in the folder"),
        ('{"weight_map": {"a": "..\\\\b.safetensors"}}', "not in the folder"),
        ('{"weight_map": {"a": "b.safetensors", "c": "d.pt"}}', "not a safetensors file"),
    ],
)
def test_what_an_index_may_hold(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / INDEX).write_text(index)
    pretrained = Pretrained("student.base", str(tmp_path), None)
    with pytest.raises(ShouldersError, match=f"^student.base: .*{message}"):
        check_weight_files(pretrained)
    (tmp_path / "model.safetensors").touch()  # transformers then never opens the index
    check_weight_files(pretrained)


def test_the_files_of_a_hub_model_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--something" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (snapshot / INDEX).write_text('{"weight_map": {"a": "weights.bin"}}')
    with pytest.raises(ShouldersError, match=r"'someone/something' has a .* names 'weights\.bin'"):
        check_weight_files(Pretrained("teachers.t.model", "someone/something", snapshot.name))

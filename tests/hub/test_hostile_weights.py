"""Weight files of strangers: none runs code, and each is refused in one line that says what to do."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shoulders
from shoulders.config.sections import TeacherSpec
from shoulders.config.student import Student
from shoulders.errors import DataError, ShouldersError
from shoulders.storage.manifest import write_manifest
from shoulders.storage.tensor_files import MAX_HEADER_BYTES, MAX_TENSORS, check_header, read_header, read_tensors
from shoulders.student.base import load_base
from shoulders.student.files import finish_folder
from shoulders.tasks.saved_probes import FILES as PROBE_FILES
from shoulders.tasks.saved_probes import open_probe
from shoulders.teachers import load_teacher
from shoulders.teachers.heads.saved import open_head
from shoulders.training.checkpoint import FILES as CHECKPOINT_FILES
from shoulders.training.checkpoint import load_checkpoint, save_checkpoint
from tests.test_model import make_student
from tests.tiny import save_base


class Runs:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def hostile_files(canary: Path) -> dict[str, bytes]:
    """{kind: content} of weight files, each of which creates ``canary`` for a careless reader."""
    write = f"__import__('pathlib').Path({str(canary)!r}).write_text('ran')"
    system = Runs(__import__("os").system, f"echo ran > '{canary}'")
    get_write = b"cbuiltins\ngetattr\n(cpathlib\nPath\nS'write_text'\ntR"  # opcodes of getattr(Path, "write_text")
    chain = get_write + f"(cpathlib\nPath\n(S{str(canary)!r}\ntRS'ran'\ntR.".encode()
    evil = pickle.dumps({"weight": Runs(eval, write)})
    legacy_tar, archive, bomb = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=legacy_tar, mode="w") as tar:
        member = tarfile.TarInfo("pickle")
        member.size = len(evil)
        tar.addfile(member, io.BytesIO(evil))
    with zipfile.ZipFile(archive, "w") as script:  # the layout of TorchScript
        script.writestr("model/data.pkl", evil)
        script.writestr("model/code/__torch__.py", write)
        script.writestr("model/constants.pkl", evil)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as many:
        many.writestr("archive/data.pkl", evil + bytes(20_000_000))
    return {
        "os.system": saved({"weight": system}),
        "eval": saved({"weight": Runs(eval, write)}),
        "getattr chain": chain,
        "legacy tar": legacy_tar.getvalue(),
        "legacy pickle": saved({"weight": Runs(exec, write)}, _use_new_zipfile_serialization=False),
        "npz": numpy_file(np.savez, weight=np.array([Runs(eval, write)], dtype=object)),
        "npy": numpy_file(np.save, np.array([Runs(eval, write)], dtype=object)),
        "DCP metadata": pickle.dumps({"state_dict_metadata": Runs(exec, write)}),
        "TorchScript": archive.getvalue(),
        "zip bomb": bomb.getvalue(),
        "nested pickle": saved({"weight": torch.ones(2), "extra": evil, "state": {"deep": [Runs(eval, write)]}}),
        "plain pickle": evil,
    }


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def numpy_file(save: Callable[..., None], *args: Any, **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, *args, **arrays)
    return file.getvalue()


def write_head(folder: Path) -> Path:
    save_base(folder, "vit")
    (folder / "head.json").write_text('{"taps": {"last": [null, 32, [4, 4]]}, "size": [32, 32]}')
    return folder


def write_student(folder: Path) -> Path:
    make_student().save_pretrained(folder)
    return folder


def write_probe(folder: Path) -> Path:
    probe = folder / "probes" / "student" / "semantic"
    probe.mkdir(parents=True)
    config = {"task": "semantic", "head": "linear", "width": 2, "classes": ["a"], "size": [8, 8], "finetuned": False}
    (probe / "config.json").write_text(json.dumps(config | {"model": "student"}))
    save_file({"head.x": torch.ones(1)}, probe / "model.safetensors")
    return probe


def write_checkpoint(folder: Path) -> Path:
    return save_checkpoint(folder, 1, {"x": torch.ones(1)}, {}, keep=1)


def read_probe(folder: Path) -> object:
    write_manifest(folder, PROBE_FILES)
    return open_probe(folder.parents[2], "student/semantic")


def read_checkpoint(folder: Path) -> object:
    write_manifest(folder, CHECKPOINT_FILES)
    return load_checkpoint(folder)


def read_student(folder: Path) -> object:
    finish_folder(folder)
    return shoulders.load(folder)


# whoever writes the weights of a folder also writes the manifest
READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "teacher": (lambda folder: save_base(folder, "vit"), lambda f: load_teacher("t", TeacherSpec(model=str(f)))),
    "base": (lambda folder: save_base(folder, "vit"), lambda f: load_base(Student(base=str(f)))),
    "student": (write_student, read_student),
    "head": (write_head, open_head),
    "probe": (write_probe, read_probe),
    "checkpoint": (write_checkpoint, read_checkpoint),
}


@pytest.mark.parametrize("reader", READERS)
def test_files_that_run_code_are_refused_under_the_name_of_safetensors(tmp_path: Path, reader: str) -> None:
    write, read = READERS[reader]
    folder, canary = write(tmp_path / "model"), tmp_path / "canary"
    (weights,) = folder.glob("*.safetensors")
    files = hostile_files(canary)
    assert len(files) == 12
    for kind, content in files.items():
        weights.write_bytes(content)
        with pytest.raises(ShouldersError) as refused:
            read(folder)
        assert "\n" not in str(refused.value), kind
        assert not canary.exists(), kind


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pt", "model.ckpt", "model.npz", "model.npy"])
def test_files_that_run_code_are_refused_under_their_own_name(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    files = hostile_files(canary)
    for reader in ("teacher", "base"):
        write, read = READERS[reader]
        folder = write(tmp_path / reader)
        (folder / "model.safetensors").unlink()
        for content in files.values():
            (folder / name).write_bytes(content)
            with pytest.raises(ShouldersError, match=rf"its weights only as {name}.* if you trust it, convert it once"):
                read(folder)
    assert not canary.exists()


def test_a_careless_reader_creates_the_canary(tmp_path: Path) -> None:
    """The files do what the names of their kinds say."""
    canary = tmp_path / "canary"
    files = hostile_files(canary)
    readers: dict[str, Callable[[bytes], object]]
    readers = dict.fromkeys(("os.system", "eval", "legacy pickle", "nested pickle"), load_pickles_of_torch)
    readers |= dict.fromkeys(("getattr chain", "DCP metadata", "plain pickle"), pickle.loads)
    readers |= {"npy": lambda data: np.load(io.BytesIO(data), allow_pickle=True)}
    for kind, read in readers.items():
        read(files[kind])
        canary.unlink()


def load_pickles_of_torch(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=False)


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def many_tensors(count: int) -> bytes:
    names = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(count))
    return file_of(b"{" + names + b"}")


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a header of 2^63 bytes": lambda: struct.pack("<Q", 2**63) + b"{}",
    "a header of 2^64 - 1 bytes": lambda: struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header of 99 MB": lambda: file_of(b'{"x":"' + b" " * 99_000_000 + b'"}'),
    "a million tensors": lambda: many_tensors(1_000_000),
    "too many tensors": lambda: many_tensors(MAX_TENSORS + 1),
    "overlapping tensors": lambda: file_of({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "a hole": lambda: file_of({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "data behind the tensors": lambda: file_of({"a": entry(0, 4, [1])}, bytes(1000)),
    "another size than the shape": lambda: file_of({"a": entry(0, 4, [1000])}, bytes(4)),
    "a shape that overflows": lambda: file_of({"a": entry(0, 4, [2**62, 2**62])}, bytes(4)),
    "a terabyte": lambda: file_of({"a": entry(0, 2**40, [2**38])}, bytes(4)),
    "offsets in reverse": lambda: file_of({"a": entry(4, 0, [1])}, bytes(4)),
    "an unknown type": lambda: file_of({"a": entry(0, 4, [1], "PICKLE")}, bytes(4)),
    "deeply nested JSON": lambda: file_of(b'{"a":' * 5_000 + b"1" + b"}" * 5_000),
    "deeply nested lists": lambda: file_of(b'{"a":' + b"[" * 1_000_000),
    "no JSON": lambda: file_of(b"\xff\xfe"),
    "half a header": lambda: struct.pack("<Q", 1000) + b'{"a"',
    "seven bytes": lambda: b"\0" * 7,
    "nothing": bytes,
    "a pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("reader", READERS)
def test_hostile_safetensors_are_refused_soon(tmp_path: Path, reader: str) -> None:
    """Within two seconds and 200 MB for each (times five for slow machines)."""
    write, read = READERS[reader]
    folder = write(tmp_path / "model")
    (weights,) = folder.glob("*.safetensors")
    kinds = HOSTILE if reader == "teacher" else dict(list(HOSTILE.items())[3:])
    for kind, make in kinds.items():
        if kind == "a million tensors" and reader != "teacher":
            continue
        weights.write_bytes(make())
        start = time.process_time()
        with pytest.raises(ShouldersError) as refused:
            read(folder)
        assert time.process_time() - start < 10, kind
        assert "\n" not in str(refused.value), kind
    weights.unlink()


def test_a_header_is_checked_without_parsing_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for kind in ("a header of 99 MB", "a million tensors", "too many tensors", "deeply nested lists"):
        path.write_bytes(HOSTILE[kind]())
        tracemalloc.start()
        if kind == "deeply nested lists":
            check_header(path)  # safetensors refuses it
        else:
            with pytest.raises(ValueError, match=rf"at most ({MAX_HEADER_BYTES}|{MAX_TENSORS})$"):
                check_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_HEADER_BYTES
        tracemalloc.stop()
    path.write_bytes(many_tensors(MAX_TENSORS))
    assert len(read_header(path)) == len(read_tensors(path)) == MAX_TENSORS


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    for reader in ("teacher", "base", "student"):
        write, read = READERS[reader]
        folder = write(tmp_path / reader)
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("query.weight"))
        weights[name][1, 2] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(DataError, match=r"weight holds values that are not finite"):
            read(folder)

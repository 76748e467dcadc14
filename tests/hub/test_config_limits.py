"""A config.json with absurd numbers, or the name of a kernel on the hub, is refused before anything is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

import shoulders
from shoulders.config.sections import TeacherSpec
from shoulders.config.student import Student
from shoulders.errors import ShouldersError
from shoulders.hub import IMAGENET_STATS, Preprocessing, why_refused
from shoulders.hub.preprocessing import parse_preprocessing
from shoulders.student.base import check_base
from shoulders.student.files import finish_folder
from shoulders.teachers import check_teacher
from shoulders.teachers.families import FAMILIES
from shoulders.teachers.heads.saved import open_head
from tests.hub.test_hostile_weights import write_head, write_student
from tests.tiny import save_base


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"depths": [1_000_000_000, 1]}, "depths is [1000000000, 1], at most 500"),
        ({"depths": [500] * 5}, "depths is [500, 500, 500, 500, 500], at most 2000 together"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, at most 500"),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers is 1000000000.0, at most 500"),
        ({"text_config": {"encoder_layers": 501}}, "text_config.encoder_layers is 501, at most 500"),
        ({"hidden_size": 2_000_000}, "hidden_size is 2000000, at most 65536"),
        ({"hidden_sizes": [8, 10**6]}, "hidden_sizes is [8, 1000000], at most 65536"),
        ({"backbone_config": {"embed_dim": 10**7}}, "backbone_config.embed_dim is 10000000, at most 65536"),
        ({"image_size": [10**6, 32]}, "image_size is [1000000, 32], at most 16384"),
        ({"image_size": {"height": 10**6}}, "image_size.height is 1000000, at most 16384"),
        ({"num_labels": 300_000_000}, "num_labels is 300000000, at most 100000"),
        ({"num_queries": 10**9}, "num_queries is 1000000000, at most 65536"),
        ({"intermediate_size": float("nan")}, "intermediate_size is nan, at most 65536"),
        ({"hidden_size": float("inf")}, "hidden_size is inf, at most 65536"),
        ({"hidden_size": -(10**9)}, "hidden_size is -1000000000, at most 65536"),
        ({"patch_size": 0}, "patch_size is 0, at least 1"),
        ({"base": {"patch_size": [16, 0]}}, "base.patch_size is [16, 0], at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, at least 1"),
        ({"adapter": {"kind": "bottleneck", "width": 10**9}}, "adapter.width is 1000000000, at most 65536"),
        ({"taps": {"a/b": {"spatial": 10**9}}}, "taps.a/b.spatial is 1000000000, at most 65536"),
        ({"upsample": {"a/b": 1000}}, "upsample.a/b is 1000, at most 64"),
        (
            {"attn_implementation": "a/kernel"},
            "attn_implementation is 'a/kernel', which would be a kernel from the hub",
        ),
        ({"vision_config": {"_attn_implementation": "a/b:c"}}, "vision_config._attn_implementation is 'a/b:c', which"),
        ({"_attn_implementation_internal": "a/b"}, "_attn_implementation_internal is 'a/b', which would"),
        ({"attn_implementation": {"": "sdpa", "text_config": "a/b"}}, "attn_implementation is {'': 'sdpa', 'text_c"),
        ({"attn_implementation": ["a/b"]}, "attn_implementation is ['a/b'], which would"),
        ({"experts_implementation": "a/b"}, "experts_implementation is 'a/b', which would be a kernel"),
    ],
)
def test_absurd_configs_are_refused(config: dict[str, Any], reason: str) -> None:
    assert why_refused(config).startswith(reason)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 48, "hidden_size": 6144, "intermediate_size": 24_576, "image_size": 1024},  # ViT-22B
        {"id2label": {str(number): f"{number} sizes" for number in range(21_843)}, "label2id": {"image_size": 10**9}},
        {"vocab_size": 256_000, "eos_token_id": 255_999, "image_token_index": 10**7, "rope_theta": 1e9, "seed": 2**40},
        {"window_block_indexes": [i for i in range(48) if i % 4], "use_layers": True, "layers": ["block0"]},
        {
            "attn_implementation": "sdpa",
            "_attn_implementation": "eager",
            "vision_config": {"_attn_implementation": None},
        },
        {"attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True, "hidden_act": "gelu"},
        {
            "projector_width": 0,
            "patch_size": 1,
            "max_depth": 80,
            "layer_norm_eps": 1e-6,
            "pretrained_window_sizes": [0],
        },
    ],
)
def test_configs_of_real_models_are_accepted(config: dict[str, Any]) -> None:
    assert why_refused(config) == ""


def test_every_family_is_within_the_limits() -> None:
    for name in FAMILIES:
        if name in CONFIG_MAPPING:  # some rows are for other classes of the same model type
            assert why_refused(AutoConfig.for_model(name).to_dict()) == "", name


def check_head(folder: Path) -> object:
    (folder / "head.json").write_text('{"taps": {}, "size": [32, 32]}')
    return open_head(folder)


def load_student(folder: Path) -> object:
    finish_folder(folder)
    return shoulders.load(folder)


def load_student_as_a_model(folder: Path) -> object:
    finish_folder(folder)
    return AutoModel.from_pretrained(folder)


def write_model(folder: Path) -> Path:
    return save_base(folder, "vit")


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "teacher": (write_model, lambda folder: check_teacher("t", TeacherSpec(model=str(folder)))),
    "base": (write_model, lambda folder: check_base(Student(base=str(folder)), (32, 32))),
    "head": (write_head, check_head),
    "student": (write_student, load_student),
    "AutoModel": (write_student, load_student_as_a_model),
}
CHANGES = (
    {"num_hidden_layers": 10**9},
    {"patch_size": 0},
    {"hidden_size": 10**7},
    {"image_size": 10**6},
    {"_attn_implementation": "nobody/kernel"},
)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_before_it_builds(tmp_path: Path, reader: str) -> None:
    write, read = READERS[reader]
    folder = write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change in CHANGES:
        changed = {"base": config["base"] | change} if "base" in config else change
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ShouldersError, match=rf"{next(iter(change))} is .*, (at most|at least|which would be)"):
            read(folder)


@pytest.mark.parametrize("size", [0, -1, 10**9, [10**9, 32], {"height": 32, "width": 0}, {"shortest_edge": 10**6}])
def test_absurd_sizes_of_images_are_refused(size: Any) -> None:
    settings = {"size": size} if size else {"size": {"height": 0, "width": 0}}
    with pytest.raises(ValueError, match=r"px; a side has 1 to 16384 px"):
        parse_preprocessing(settings, Preprocessing((32, 32), *IMAGENET_STATS))

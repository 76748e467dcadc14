"""The student as a transformers model: saved and loaded, as a backbone, and refused where it is damaged."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import shoulders
from shoulders.errors import DataError
from shoulders.features import Features
from shoulders.model import ShouldersBackbone, ShouldersConfig, ShouldersModel, build_student
from shoulders.student.families import BASES
from shoulders.student.files import finish_folder
from tests.tiny import ADAPTERS, BASE_CONFIGS, MEAN, STD, save_base

TAPS = {"one/last": {"summary": 5, "spatial": 6}, "two/stage0": {"summary": None, "spatial": 12}}


def make_student(
    kind: str = "dinov2", adapter: dict[str, Any] = ADAPTERS[0], standardize: str = "phi_s"
) -> ShouldersModel:
    """A student whose adapter has random weights."""
    torch.manual_seed(0)
    base = AutoModel.from_config(BASE_CONFIGS[kind](), **BASES[kind].build)
    config = ShouldersConfig(
        base=base.config.to_dict(),
        adapter=adapter,
        mean=list(MEAN),
        std=list(STD),
        image_size=[32, 32],
        taps=TAPS,
        layers=["block0", "latent"],
        projector_width=16,
        standardize=standardize,
    )
    built = build_student(base, config).eval()
    with torch.no_grad():
        for p in built.encoder.adapter.parameters():
            p.normal_(std=0.1)
    return built


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a["kind"])
@pytest.mark.parametrize("kind", BASES)
def test_a_loaded_student_computes_the_same_bits(kind: str, adapter: dict[str, Any], tmp_path: Path) -> None:
    student = make_student(kind, adapter)
    pixels = torch.rand(2, 3, 32, 48)
    student.save_pretrained(tmp_path / "student")
    with torch.no_grad():
        expected = {tap: f.components() for tap, f in student.predict_teacher_features(pixels).items()}
        latent = student(pixels).latent
    reloaded = AutoModel.from_pretrained(tmp_path / "student").eval()
    assert not any(p.requires_grad for p in reloaded.encoder.base.parameters())
    with torch.no_grad():
        assert torch.equal(reloaded(pixels).latent.spatial, latent.spatial)
        for tap, features in reloaded.predict_teacher_features(pixels).items():
            assert all(torch.equal(x, expected[tap][part]) for part, x in features.components().items())


def test_a_student_in_bfloat16_predicts_nearly_the_same(tmp_path: Path) -> None:
    student = make_student(standardize="phi_s")
    student.config.base["dtype"] = "float32"  # as bases on the hub were stored
    student.save_pretrained(tmp_path / "student")
    half = AutoModel.from_pretrained(tmp_path / "student", dtype=torch.bfloat16).eval()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected, predicted = student.predict_teacher_features(pixels), half.predict_teacher_features(pixels.bfloat16())
    for tap, features in predicted.items():
        for part, x in features.components().items():
            assert torch.allclose(x.float(), expected[tap].components()[part], atol=0.1, rtol=0.1)


def test_auto_model_loads_a_student_whichever_package_is_imported_first(tmp_path: Path) -> None:
    student = make_student()
    student.save_pretrained(tmp_path / "student")
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        save_file(
            {"pixels": pixels, "latent": student(pixels).latent.spatial.contiguous()}, tmp_path / "io.safetensors"
        )
    for first in (
        "import shoulders; from transformers import AutoModel",
        "from transformers import AutoModel; import shoulders",
    ):
        code = f"""
{first}
import torch
from safetensors.torch import load_file
io = load_file({str(tmp_path / "io.safetensors")!r})
with torch.no_grad():
    latent = AutoModel.from_pretrained({str(tmp_path / "student")!r}).eval()(io["pixels"]).latent
assert torch.equal(latent.spatial, io["latent"])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", BASES)
def test_the_weights_of_the_base_have_the_names_of_the_hub(kind: str, tmp_path: Path) -> None:
    student = make_student(kind)
    student.save_pretrained(tmp_path / "student")
    student.encoder.base.save_pretrained(tmp_path / "base")
    of_base = {
        name.removeprefix("encoder.base.")
        for name in load_file(tmp_path / "student" / "model.safetensors")
        if name.startswith("encoder.base.")
    }
    assert of_base == set(load_file(tmp_path / "base" / "model.safetensors"))


@pytest.mark.parametrize("fault", ["missing", "left over", "other shape"])
def test_weights_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    make_student().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "encoder.adapter.parts.0-mlp.up.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "left over":
        tensors["encoder.adapter.parts.9-mlp.up.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:, :3].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    finish_folder(tmp_path)
    with pytest.raises(DataError, match=r"-mlp.up.weight|ignore_mismatched_sizes"):
        shoulders.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_student_is_named(name: str, tmp_path: Path) -> None:
    make_student().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    finish_folder(tmp_path)  # with a manifest that fits
    with pytest.raises(DataError, match="not a valid student"):
        shoulders.load(tmp_path)


def test_a_folder_without_a_student_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no student in this folder; give a run folder"):
        shoulders.load(tmp_path)
    save_base(tmp_path, "vit")
    with pytest.raises(DataError, match="holds a model of type vit, not a student"):
        shoulders.load(tmp_path)


@pytest.mark.parametrize("adapter", [{"kind": "bottleneck", "wid": 3}, {"kind": "nothing"}, "bottleneck"])
def test_settings_of_another_version_are_named(adapter: Any, tmp_path: Path) -> None:
    make_student().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"adapter": adapter}))
    finish_folder(tmp_path)
    with pytest.raises(DataError, match="not a valid student"):
        shoulders.load(tmp_path)


def test_a_backbone_returns_one_map_per_layer(tmp_path: Path) -> None:
    student = make_student()
    student.save_pretrained(tmp_path)
    backbone = ShouldersBackbone.from_pretrained(tmp_path, out_features=["block0", "latent"]).eval()
    pixels = torch.rand(2, 3, 48, 32)
    with torch.no_grad():
        maps = backbone(pixels).feature_maps
        features = student.encoder(pixels, ["block0", "latent"])
    assert [m.shape for m in maps] == [(2, 32, 6, 4)] * 2
    assert all(torch.equal(m, features[layer].to_map()) for m, layer in zip(maps, ["block0", "latent"], strict=True))
    assert backbone.num_features == [32, 32, 32, 32]


def test_predicted_teacher_features_are_in_the_teachers_own_space() -> None:
    student = make_student(standardize="channel")
    part = student.standardizer("one/last").parts["spatial"]
    with torch.no_grad():
        part.mean.fill_(100.0)  # type: ignore[operator]
        part.std.fill_(0.5)  # type: ignore[operator]
        pixels = torch.rand(1, 3, 32, 32)
        standardized = student.project(student.forward_features(pixels))["one/last"]
        predicted = student.predict_teacher_features(pixels)["one/last"]
        assert torch.allclose(predicted.components()["spatial"], standardized.components()["spatial"] * 0.5 + 100)
        back = student.standardize({"one/last": predicted})["one/last"]
        assert torch.allclose(back.components()["spatial"], standardized.components()["spatial"], atol=1e-4)


def test_the_config_is_plain_json_with_the_licenses_of_the_teachers(tmp_path: Path) -> None:
    student = make_student()
    student.config.teachers = {"one": {"source": "a/b", "revision": None, "license": "mit"}}
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["teachers"]["one"]["license"] == "mit"
    assert config["base"]["model_type"] == "dinov2"
    assert config["taps"] == TAPS


def test_features_of_contradicting_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        Features(None, None)
    with pytest.raises(ValueError, match=r"spatial must be \(B, 6, C\)"):
        Features(None, torch.zeros(1, 5, 3), (2, 3))
    maps = torch.randn(2, 3, 4, 5)
    assert torch.equal(Features.from_map(maps).to_map(), maps)


@pytest.mark.parametrize("kind", BASES)
def test_a_student_can_be_pickled_and_copied(kind: str) -> None:
    """After a forward too, in which transformers adds hooks that cannot be pickled."""
    ours, pixels = make_student(kind), torch.rand(1, 3, 32, 32)
    ours.heads = {"classifier": Path("heads/classifier")}
    expected, state = ours.predict_teacher_features(pixels), torch.get_rng_state()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = torch.load(file, weights_only=False), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)  # noqa: S301
    assert torch.equal(torch.get_rng_state(), state)
    for again in copies:
        assert (again.training, again.heads) == (ours.training, ours.heads)
        flags = [{name: p.requires_grad for name, p in one.named_parameters()} for one in (ours, again)]
        assert flags[0] == flags[1] and set(flags[0].values()) == {True, False}
        places = [{weight.data_ptr() for weight in one.parameters() if weight.numel()} for one in (ours, again)]
        assert not places[0] & places[1]
        for tap, features in again.predict_teacher_features(pixels).items():
            assert torch.equal(features.components()["spatial"], expected[tap].components()["spatial"])

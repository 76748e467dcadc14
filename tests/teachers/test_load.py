"""Loading teachers: what is refused and with which message, and unusual folders that can be loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shoulders.config.sections import TeacherSpec
from shoulders.errors import DataError, RecipeError
from shoulders.teachers import check_teacher, load_teacher
from tests.teachers.conftest import VIT

WriteTiny = Callable[..., Path]


def refusal(spec: TeacherSpec) -> str:
    """The one-line message with which both the check and the loading refuse a teacher."""
    with pytest.raises(RecipeError) as checked:
        check_teacher("t", spec)
    with pytest.raises(RecipeError) as loaded:
        load_teacher("t", spec)
    assert str(checked.value) == str(loaded.value)
    assert "\n" not in str(checked.value)
    return str(checked.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    for model, message in {
        "./missing": "teachers.t.model: no folder './missing'",
        "/missing/folder": "teachers.t.model: no folder '/missing/folder'",
        "a/b/c": "teachers.t.model: no folder 'a/b/c'",
        "someone/something": "teachers.t.model: 'someone/something' is no local folder, and no such hub",
        "not a name!": "teachers.t.model: 'not a name!' is no local folder",
    }.items():
        assert refusal(TeacherSpec(model=model)).startswith(message)
    assert "has no config.json" in refusal(TeacherSpec(model=str(tmp_path)))
    (tmp_path / "file").touch()
    assert "is not a folder" in refusal(TeacherSpec(model=str(tmp_path / "file")))


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    for text, message in {"{": "is not JSON", "[]": "must hold a JSON object"}.items():
        (tmp_path / "config.json").write_text(text)
        assert message in refusal(TeacherSpec(model=str(tmp_path)))


def test_an_unknown_model_type_lists_the_known_ones(tmp_path: Path) -> None:
    edit(tmp_path / "config.json", model_type="bert")
    line = refusal(TeacherSpec(model=str(tmp_path)))
    assert line.startswith("teachers.t.model: ") and "'bert'" in line
    assert "dinov2, " in line and "module: package.module:function" in line


def test_a_timm_backbone_needs_timm(tmp_path: Path) -> None:
    edit(tmp_path / "config.json", model_type="detr", use_timm_backbone=True, backbone="resnet50")
    assert "install timm" in refusal(TeacherSpec(model=str(tmp_path)))


def test_unknown_taps_and_sizes_are_refused(write_tiny: WriteTiny) -> None:
    folder = str(write_tiny("dinov2"))
    line = refusal(TeacherSpec(model=folder, taps=["last", "stage1"]))
    assert line.startswith("teachers.t.taps: no tap stage1; ") and "block0, block1, block2, last" in line
    assert refusal(TeacherSpec(model=folder, taps=[])).startswith("teachers.t.taps: no tap given")
    line = refusal(TeacherSpec(model=folder, size=(28, 30)))
    assert line == "teachers.t.size: 30 px is not a multiple of 7; nearest legal: 28 and 35"
    assert "nearest legal: 7" in refusal(TeacherSpec(model=folder, size=0))
    assert load_teacher("t", TeacherSpec(model=folder, size=(28, 35))).taps["last"].grid == (4, 5)


def test_pickled_weights_are_never_read(write_tiny: WriteTiny) -> None:
    folder = write_tiny("dinov2")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(TeacherSpec(model=str(folder)))
    torch.save(weights, folder / "pytorch_model.bin")
    line = refusal(TeacherSpec(model=str(folder)))
    assert "never read" in line and "Dinov2ForImageClassification.from_pretrained" in line


def test_missing_weights_of_the_encoder_are_refused(write_tiny: WriteTiny) -> None:
    folder = write_tiny("dinov2")
    weights = load_file(folder / "model.safetensors")
    lacking = {key: weight for key, weight in weights.items() if "layernorm" not in key}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    check_teacher("t", TeacherSpec(model=str(folder)))
    with pytest.raises(DataError, match=r"teachers\.t\.model: .* lack layernorm\.bias, layernorm\.weight"):
        load_teacher("t", TeacherSpec(model=str(folder)))


def test_damaged_weights_are_refused(write_tiny: WriteTiny) -> None:
    folder = write_tiny("dinov2")
    file = folder / "model.safetensors"
    weights = load_file(file)
    changed = dict(weights)
    name = next(key for key in changed if "mlp.fc1.weight" in key)
    changed[name] = changed[name][:3]
    save_file(changed, file, {"format": "pt"})
    with pytest.raises(DataError, match="weights cannot be read"):
        load_teacher("t", TeacherSpec(model=str(folder)))
    save_file({**weights, name: weights[name] * float("nan")}, file, {"format": "pt"})
    with pytest.raises(DataError, match="not finite"):
        load_teacher("t", TeacherSpec(model=str(folder)))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match="weights cannot be read"):
        load_teacher("t", TeacherSpec(model=str(folder)))


def test_size_normalization_and_license_come_from_the_folder(write_tiny: WriteTiny) -> None:
    folder = write_tiny("dinov2")
    teacher = load_teacher("t", TeacherSpec(model=str(folder)))
    assert teacher.size == (28, 28) and teacher.license == "unknown"
    torch.testing.assert_close(teacher.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    edit(folder / "preprocessor_config.json", size=40, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: my-license\n---\n")
    teacher = load_teacher("t", TeacherSpec(model=str(folder)))
    assert teacher.size == (42, 42) and teacher.license == "my-license"  # the nearest multiple of 7
    assert teacher.std.flatten().tolist() == [0.25] * 3
    assert load_teacher("t", TeacherSpec(model=str(folder), size=35)).size == (35, 35)
    edit(folder / "preprocessor_config.json", image_std=[0, 1, 1])
    assert "must be positive" in refusal(TeacherSpec(model=str(folder)))


def test_classification_checkpoints_of_image_towers(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision |= {"image_size": 16, "patch_size": 8}
    clip = transformers.CLIPConfig(vision_config=vision, projection_dim=12)
    transformers.CLIPForImageClassification(clip).save_pretrained(tmp_path / "clip")
    assert load_teacher("t", TeacherSpec(model=str(tmp_path / "clip"))).taps["last"].summary == 16
    siglip = transformers.SiglipConfig(vision_config=vision)
    transformers.SiglipForImageClassification(siglip).save_pretrained(tmp_path / "siglip")
    assert load_teacher("t", TeacherSpec(model=str(tmp_path / "siglip"))).taps["last"].summary == 16


HUB = """
from shoulders.config.sections import TeacherSpec
from shoulders.teachers import load_teacher

for revision in (None, "main", "{commit}"):
    teacher = load_teacher("t", TeacherSpec(model="someone/something", revision=revision))
    print(teacher.revision, teacher.license)
"""


def test_the_commit_of_a_hub_model_is_recorded(write_tiny: WriteTiny, tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "home" / "hub" / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    folder = write_tiny("dinov2")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    folder.rename(repository / "snapshots" / commit)
    (repository / ".no_exist" / commit).mkdir(parents=True)
    (repository / ".no_exist" / commit / "preprocessor_config.json").touch()  # the hub has no such file
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HUB.format(commit=commit)],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split("\n") == [f"{commit} mit"] * 3 + [""], done.stderr
    assert done.stderr == ""


REMOTE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class OwnConfig(PreTrainedConfig):
    model_type = "own_net"
    patch_size: int = 8
    image_size: int = 16

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Conv2d(3, 4, config.patch_size, config.patch_size)
        self.post_init()

    def forward(self, pixel_values):
        return BaseModelOutput(last_hidden_state=self.embed(pixel_values).flatten(2).mT)
"""


def test_remote_code_runs_only_when_the_recipe_trusts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(REMOTE)
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    edit(folder / "config.json", model_type="own_net", auto_map=code, architectures=["OwnModel"])
    weights = {"embed.weight": torch.randn(4, 3, 8, 8), "embed.bias": torch.zeros(4)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "not supported" in refusal(TeacherSpec(model=str(folder)))
    teacher = load_teacher("t", TeacherSpec(model=str(folder), trust_remote_code=True))
    assert teacher.taps["last"].grid == (2, 2) and teacher.taps["last"].spatial == 4
    for old, new, message in (
        ("return BaseModelOutput(last_hidden_state=", "return (", "cannot be run on 16 x 16 px"),
        ("    patch_size: int = 8\n", "", "has no patch_size in its config; give it as a module: of your own"),
    ):
        other = tmp_path / f"own{len(old)}"
        shutil.copytree(folder, other)
        (other / "modeling_own.py").write_text(REMOTE.replace(old, new))
        with pytest.raises((DataError, RecipeError), match=message):
            load_teacher("t", TeacherSpec(model=str(other), trust_remote_code=True))
    edit(folder / "config.json", auto_map={"AutoModel": "else/where--modeling.Net"})
    line = refusal(TeacherSpec(model=str(folder), trust_remote_code=True))
    assert line.startswith("teachers.t.trust_remote_code: ") and "another repository" in line


@pytest.mark.parametrize(
    "model",
    [
        transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**VIT, use_mask_token=True)),
        transformers.HieraForPreTraining(
            transformers.HieraConfig(
                embed_dim=8,
                image_size=[64, 64],
                depths=[1, 2, 1, 1],
                num_heads=[1, 1, 2, 2],
                decoder_hidden_size=16,
                decoder_depth=1,
                decoder_num_heads=2,
            )
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_checkpoints_without_a_pooling_layer_have_no_summary(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    taps = load_teacher("t", TeacherSpec(model=str(tmp_path))).taps
    assert [tap.summary for tap in taps.values()] == [None] and all(tap.spatial for tap in taps.values())


def test_models_of_one_channel_are_refused(tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**VIT, num_channels=1)).save_pretrained(tmp_path)
    assert "takes 1 channels" in refusal(TeacherSpec(model=str(tmp_path)))


@pytest.mark.parametrize("revision", [None, "main", "abc123"])
def test_remote_code_from_the_hub_needs_a_commit(revision: str | None) -> None:
    spec = TeacherSpec(model="someone/something", trust_remote_code=True, revision=revision)
    assert refusal(spec).startswith("teachers.t.revision: remote code runs only at a fixed commit; give 40 hex")


OWN = """
import torch
from shoulders.features import Features
from shoulders.teachers import Teacher

class Net(torch.nn.Module):
    def forward(self, pixels):
        colour = pixels.mean((2, 3))
        return {"colour": Features(colour, None), "map": Features.from_map(pixels)}

class FirstRow(torch.nn.Module):
    def forward(self, pixels):
        return {"map": Features.from_map(pixels[:1])}

def teacher(): return Teacher(Net(), size=(4, 4), license="mit", source="own")
def net(): return Net()
def first(): return Teacher(FirstRow(), size=(4, 4))
def broken(): raise ArithmeticError("no weights")
value = 3
"""


def test_a_teacher_built_by_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_teachers.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import missing_module")
    before = list(sys.path)
    teacher = load_teacher("t", TeacherSpec(module="own_teachers:teacher"))
    assert sys.path == before
    assert list(teacher.taps) == ["colour", "map"] and teacher.license == "mit"
    chosen = load_teacher("t", TeacherSpec(module="own_teachers:teacher", taps=["map"]))
    assert list(chosen.taps) == list(chosen(torch.rand(2, 3, 4, 4))) == ["map"]

    def loading_error(path: str, **more: Any) -> str:
        check_teacher("t", TeacherSpec(module=path, **more))
        with pytest.raises(RecipeError) as refused:
            load_teacher("t", TeacherSpec(module=path, **more))
        return str(refused.value)

    assert loading_error("own_teachers:x") == "teachers.t.module: own_teachers has no function 'x'"
    assert "has no function 'value'" in loading_error("own_teachers:value")
    assert "must return a shoulders Teacher, got Net" in loading_error("own_teachers:net")
    assert "spatial has 1 rows for 2 images" in loading_error("own_teachers:first")
    assert "own_teachers:broken fails: ArithmeticError: no weights" in loading_error("own_teachers:broken")
    assert "importing own_broken fails: ModuleNotFoundError" in loading_error("own_broken:teacher")
    assert loading_error("own_teachers:teacher", taps=["x"]) == (
        "teachers.t.taps: no tap x; own_teachers:teacher has colour, map"
    )
    assert "must be written package.module:function" in refusal(TeacherSpec(module="own_teachers"))
    assert "must be written package.module:function" in refusal(TeacherSpec(module="own-teachers:f"))
    assert "no Python module 'missing_module'" in refusal(TeacherSpec(module="missing_module:f"))
    assert "no Python module 'own_teachers.sub'" in refusal(TeacherSpec(module="own_teachers.sub:f"))
    line = refusal(TeacherSpec(module="own_teachers:teacher", size=8))
    assert line.startswith("teachers.t.size: ")

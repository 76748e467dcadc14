"""Bases: the messages of refused ones, and the weights of accepted ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shoulders.config.student import Student
from shoulders.errors import DataError, RecipeError
from shoulders.student.base import check_base, load_base
from shoulders.student.families import BASES, IMAGE_CONFIGS
from tests.tiny import BASE_CONFIGS, save_base

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99}


def refusal(base: Path | str, size: tuple[int, int] = (32, 32), revision: str | None = None) -> str:
    """The message of `check_base`, which must be one line."""
    with pytest.raises(RecipeError) as refused:
        check_base(Student(base=str(base), revision=revision), size)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def edit_weights(folder: Path, keep: dict[str, torch.Tensor]) -> None:
    save_file(keep, folder / "model.safetensors", {"format": "pt"})


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    assert refusal("./nowhere") == ("student.base: no folder './nowhere'; give a local folder or a hub id owner/name")
    assert refusal("someone/something").startswith("student.base: 'someone/something' is no local folder, and no such")
    assert "at revision 'v2'" in refusal("someone/something", revision="v2")
    assert refusal(tmp_path) == (
        f"student.base: {str(tmp_path)!r} has no config.json; give a folder written by save_pretrained"
    )


def test_an_unsupported_model_type_is_refused(tmp_path: Path) -> None:
    edit(tmp_path / "config.json", model_type="convnext")
    message = refusal(tmp_path)
    assert message.startswith(
        f"student.base: {str(tmp_path)!r} is of model type 'convnext', which cannot be the base of a student"
    )
    assert message.endswith("a base is one of " + ", ".join(sorted([*BASES, *IMAGE_CONFIGS])))
    edit(tmp_path / "config.json", model_type=None, auto_map={"AutoModel": "modeling_own.OwnModel"})
    assert "is of model type None" in refusal(tmp_path)  # its code is not run


def test_an_invalid_config_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path)
    edit(tmp_path / "config.json", hidden_size="wide")
    assert refusal(tmp_path).startswith(f"student.base: {str(tmp_path)!r} has a config.json that is not valid: ")


def test_an_invalid_preprocessing_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path)
    edit(tmp_path / "preprocessor_config.json", image_std=[0, 1, 1])
    message = refusal(tmp_path)
    assert message.startswith("student.base: ") and "image_std must be positive" in message


@pytest.mark.parametrize(("size", "nearest"), [((32, 30), (32, 32)), ((3, 43), (8, 40)), ((225, 224), (224, 224))])
def test_a_size_that_is_no_multiple_of_the_patch_size_is_refused(
    tmp_path: Path, size: tuple[int, int], nearest: tuple[int, int]
) -> None:
    save_base(tmp_path)
    assert refusal(tmp_path, size) == (
        f"images.size: {size} is not a multiple of the base's patch size 8; the nearest is {nearest}"
    )
    check_base(Student(base=str(tmp_path)), nearest)


def test_a_missing_patch_size_is_the_default_of_transformers(tmp_path: Path) -> None:
    save_base(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["patch_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "patch size 14" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("vit", {"num_channels": 1}, "it takes 1 channels"),
        ("vit", {"patch_size": [8, 8]}, "the patch_size of its config is [8, 8]"),
        ("dinov2", {"image_size": [32, 48]}, "made for images of 32 x 48 px"),
        ("siglip_vision_model", {"vision_use_head": False}, "no pooling head"),
    ],
)
def test_an_unusable_config_of_a_supported_family_is_refused(
    kind: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    edit(save_base(tmp_path, kind) / "config.json", **changes)
    assert "cannot be the base of a student: " in refusal(tmp_path) and reason in refusal(tmp_path)


@pytest.mark.parametrize("kind", BASES)
def test_loaded_weights_are_the_saved_weights(tmp_path: Path, kind: str) -> None:
    save_base(tmp_path, kind)
    edit(tmp_path / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    check_base(Student(base=str(tmp_path)), (32, 48))
    base = load_base(Student(base=str(tmp_path)))
    assert type(base.model).__name__ == BASES[kind].model and not base.model.training
    assert base.preprocessing.mean == (0.1, 0.2, 0.3) and base.preprocessing.std == (0.4, 0.5, 0.6)
    assert (base.license, base.revision) == ("mit", None)
    # reference: loading by transformers alone, without the pooler, which the base of a vit leaves out
    saved = {
        k: v
        for k, v in transformers.AutoModel.from_pretrained(tmp_path).state_dict().items()
        if (not k.startswith("pooler."))
    }
    loaded = base.model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


@pytest.mark.parametrize("kind", BASES)
def test_the_default_normalisation_is_that_of_the_family(tmp_path: Path, kind: str) -> None:
    half = kind in ("siglip_vision_model", "vit")
    mean = load_base(Student(base=str(save_base(tmp_path, kind)))).preprocessing.mean
    assert mean == ((0.5, 0.5, 0.5) if half else (0.485, 0.456, 0.406))


def test_the_base_of_an_image_text_checkpoint_is_its_image_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = BASE_CONFIGS["siglip_vision_model"]()
    siglip = transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=vision.to_dict(), text_config=TEXT)
    ).eval()
    siglip.save_pretrained(tmp_path)
    assert "patch size 8" in refusal(tmp_path, (30, 32))
    base = load_base(Student(base=str(tmp_path)))
    assert base.model.config.model_type == "siglip_vision_model"
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(base.model(pixels).pooler_output, siglip.get_image_features(pixels).pooler_output)


def test_fp16_weights_load_as_float32(tmp_path: Path) -> None:
    save_base(tmp_path)
    half = transformers.AutoModel.from_pretrained(tmp_path).half()
    half.save_pretrained(tmp_path)
    base = load_base(Student(base=str(tmp_path)))
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    for key, weight in base.model.state_dict().items():
        assert torch.equal(weight, half.state_dict()[key].float())


def test_a_missing_weight_is_refused_and_an_extra_one_is_ignored(tmp_path: Path) -> None:
    save_base(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    edit_weights(tmp_path, weights | {"head.weight": torch.zeros(3)})
    load_base(Student(base=str(tmp_path)))
    name = next(key for key in weights if key.endswith("mlp.fc1.weight"))
    edit_weights(tmp_path, {key: weight for key, weight in weights.items() if key != name})
    check_base(Student(base=str(tmp_path)), (32, 32))  # the check reads no weights
    with pytest.raises(DataError, match=r"^student\.base: .*: the weights lack .*mlp\.fc1\.weight of Dinov2Model$"):
        load_base(Student(base=str(tmp_path)))


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    save_base(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if key.endswith("mlp.fc1.weight"))
    edit_weights(tmp_path, weights | {name: weights[name][:3]})
    with pytest.raises(DataError, match=r"^student\.base: .*: weights cannot be read as Dinov2Model: "):
        load_base(Student(base=str(tmp_path)))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match="weights cannot be read"):
        load_base(Student(base=str(tmp_path)))


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    save_base(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    assert refusal(tmp_path) == f"student.base: {str(tmp_path)!r} has no model.safetensors; give a folder with weights"
    torch.save(weights, tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert "a pickle, which is never read" in message
    assert f"transformers.Dinov2Model.from_pretrained('{tmp_path}').save_pretrained('{tmp_path}')" in message
    with pytest.raises(RecipeError, match="never read"):
        load_base(Student(base=str(tmp_path)))


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_base(tmp_path, "vit")  # its pooler is an extra weight, which transformers would report
    capfd.readouterr()
    load_base(Student(base=str(tmp_path)))
    assert capfd.readouterr() == ("", "")


def test_layers_of_the_projectors_are_those_that_the_base_has(tmp_path: Path) -> None:
    spec = Student(base=str(save_base(tmp_path)))
    check_base(spec, (32, 32), ["block0", "latent", "block1"])
    with pytest.raises(
        RecipeError, match=r"^transfer\.layers: .* has no layer 'block2'; it has latent, block0 .. block1$"
    ):
        check_base(spec, (32, 32), ["block0", "block2"])

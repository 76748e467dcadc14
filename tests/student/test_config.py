"""The config of a student: defaults, and the layers that it names."""

from __future__ import annotations

from shoulders.student.config import ShouldersConfig
from tests.tiny import BASE_CONFIGS


def test_a_config_without_a_base_has_imagenets_statistics_and_size() -> None:
    config = ShouldersConfig()
    assert tuple(config.mean) == (0.485, 0.456, 0.406) and tuple(config.std) == (0.229, 0.224, 0.225)
    assert tuple(config.image_size) == (224, 224)
    assert tuple(config.layers) == ("latent",) and config.projector_width == 0
    assert config.stage_names == ["stem", "latent"]


def test_the_layers_of_a_config_are_the_blocks_of_its_base_and_the_latent() -> None:
    base = BASE_CONFIGS["dinov2"]()
    config = ShouldersConfig(base=base.to_dict())
    assert config.stage_names == ["stem", "block0", "block1", "latent"]
    assert type(config.base_config()) is type(base) and config.base_config().hidden_size == 32
    assert list(config.out_features) == ["latent"] and list(config.out_indices) == [3]
    chosen = ShouldersConfig(base=base.to_dict(), out_features=["block0", "latent"])
    assert list(chosen.out_indices) == [1, 3]
    assert list(ShouldersConfig(base=base.to_dict(), out_indices=[1]).out_features) == ["block0"]


def test_other_settings_of_transformers_are_kept() -> None:
    config = ShouldersConfig(num_labels=7, note="of my own")
    assert config.num_labels == 7 and config.note == "of my own"
    assert config.name_or_path == ""

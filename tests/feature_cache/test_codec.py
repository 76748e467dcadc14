"""Decoded features are the encoded ones, within the precision of each way of storing them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from shoulders.config.sections import Cache
from shoulders.errors import DataError
from shoulders.feature_cache.channels import fit_channels, load_channels, save_channels
from shoulders.feature_cache.codec import Codec, EncodeError, reconstruction_fvu
from shoulders.features import Features
from shoulders.teachers import Tap
from shoulders.transfer.fvu import unexplained
from shoulders.transfer.standardize import Moments

TAPS = {"odd": Tap(None, 5, (3, 5)), "both": Tap(7, 6, (4, 4)), "summary": Tap(3, None, (0, 0))}


def random_features(images: int = 64, seed: int = 0) -> dict[str, Features]:
    """Features with a channel of large values, one far from zero, and a constant one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator)
        x[..., 0] *= 300
        x[..., 1] += 1000
        x[..., 2] = 3
        return x

    return {
        tap: Features(
            draw(images, shape.summary) if shape.summary else None,
            draw(images, shape.grid[0] * shape.grid[1], shape.spatial) if shape.spatial else None,
            shape.grid,
        )
        for tap, shape in TAPS.items()
    }


def fitted_codec(**settings: Any) -> Codec:
    """A codec with its transforms fitted on other images."""
    cache = Cache(**settings)
    moments: dict[str, Moments] = {}
    for tap, features in Codec(TAPS, cache).pool(random_features(256, 1)).items():
        for part, x in features.components().items():
            moments.setdefault(f"{tap}/{part}", Moments(x.shape[-1])).update(x)
    transforms = {name: fit_channels(one, cache.pca, cache.dtype == "int8") for name, one in moments.items()}
    return Codec(TAPS, cache, {name: one for name, one in transforms.items() if one})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floats_are_stored_exactly(dtype: str) -> None:
    exact = getattr(torch, dtype)
    given = {tap: features.map(lambda x: x.to(exact).float()) for tap, features in random_features().items()}
    decoded = fitted_codec(dtype=dtype).decode(fitted_codec(dtype=dtype).encode(given))
    for tap, features in given.items():
        assert decoded[tap].grid == features.grid
        for part, x in features.components().items():
            y = decoded[tap].components()[part]
            assert torch.equal(x, y) and y.dtype == torch.float32 and y.is_contiguous()


def test_int8_is_within_half_a_step_of_its_token() -> None:
    codec = fitted_codec(dtype="int8")
    decoded = codec.decode(codec.encode(random_features()))
    for tap, features in random_features().items():
        for part, x in features.components().items():
            transform = codec.transforms[f"{tap}/{part}"]
            stored = transform.apply(x)
            step = stored.abs().amax(-1, keepdim=True) / 127
            assert ((transform.apply(decoded[tap].components()[part]) - stored).abs() <= 0.505 * step + 1e-6).all()
    assert max(reconstruction_fvu(codec, random_features()).values()) < 2e-3
    plain = Codec(TAPS, Cache(dtype="int8"))  # the channel of the largest values decides the scale of a token
    assert max(reconstruction_fvu(plain, random_features()).values()) > 0.1


def test_a_token_of_zeros_stays_zeros() -> None:
    codec = Codec(TAPS, Cache(dtype="int8"))
    zeros = {tap: features.map(torch.zeros_like) for tap, features in random_features(2).items()}
    assert all((x == 0).all() for f in codec.decode(codec.encode(zeros)).values() for x in f.components().values())


def test_principal_components_explain_the_most_variance() -> None:
    codec = fitted_codec(dtype="float32", pca=2)
    assert {field.width for field in codec.fields} == {2}
    x = random_features()["both"].components()["spatial"]
    y = codec.decode(codec.encode(random_features()))["both"].components()["spatial"]
    rows = (x - x.mean((0, 1))).flatten(0, 1).double()
    best = torch.linalg.svdvals(rows)[2:].square().sum() / rows.square().sum()
    assert unexplained(y.flatten(0, 1), x.flatten(0, 1)) == pytest.approx(float(best), rel=0.1)
    wide = fitted_codec(dtype="int8", pca=100)
    assert [field.width for field in wide.fields] == [5, 7, 6, 3]
    assert max(reconstruction_fvu(wide, random_features()).values()) < 2e-3


def test_pooled_grids_are_means_of_neighbouring_tokens() -> None:
    codec = fitted_codec(dtype="float32", pool=2)
    assert {tap: shape.grid for tap, shape in codec.taps.items()} == {"odd": (2, 3), "both": (2, 2), "summary": (0, 0)}
    x = random_features()["both"].to_map()
    y = codec.decode(codec.encode(random_features()))["both"].to_map()
    expected = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    assert torch.allclose(y, expected, atol=1e-4)
    fvu = reconstruction_fvu(codec, random_features())
    assert fvu["both/summary"] < 1e-9 and 0.3 < fvu["both/spatial"] < 1


def test_records_of_a_batch_are_those_of_its_images() -> None:
    codec, given = fitted_codec(dtype="int8", pca=4), random_features(9)
    records = codec.encode(given)
    assert records.shape == (9, codec.payload_bytes) and codec.payload_bytes % 8 == 0
    one = {tap: features.map(lambda x: x[3:4]) for tap, features in given.items()}
    assert torch.equal(codec.encode(one)[0], records[3])
    assert sum(codec.field_bytes(field) for field in codec.fields) <= codec.payload_bytes
    padded = torch.cat([records, torch.ones(9, 16, dtype=torch.uint8)], 1)
    for tap, features in codec.decode(records).items():
        assert all(
            torch.equal(x, codec.decode(padded)[tap].components()[part]) for part, x in features.components().items()
        )
    assert json.loads(json.dumps(codec.to_json()))["payload_bytes"] == codec.payload_bytes


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", float("nan")), ("int8", float("inf"))])
def test_values_that_cannot_be_stored_are_named(dtype: str, value: float) -> None:
    given = random_features(4)
    given["both"].components()["spatial"][2, 1, 3] = value
    with pytest.raises(EncodeError) as error:
        fitted_codec(dtype=dtype).encode(given)
    assert (error.value.field, error.value.image) == ("both/spatial", 2)


def test_transforms_are_saved_and_loaded(tmp_path: Any) -> None:
    transforms = fitted_codec(dtype="int8", pca=4).transforms
    loaded = load_channels(tmp_path, save_channels(transforms))
    assert loaded.keys() == transforms.keys()
    for name, one in transforms.items():
        assert torch.equal(one.mean, loaded[name].mean) and torch.equal(one.scale, loaded[name].scale)
        assert (one.basis is None) == (loaded[name].basis is None) == (len(one.mean) <= 4)
    with pytest.raises(DataError, match="damaged"):
        load_channels(tmp_path / "x", b"nothing")

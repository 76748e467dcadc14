"""Features become bytes and features again, within what each way of storing promises."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from shoulders.config.recipe import Cache
from shoulders.errors import DataError
from shoulders.feature_cache.channels import fit_channels, load_channels, save_channels
from shoulders.feature_cache.codec import Codec, EncodeError, errors
from shoulders.features import Features
from shoulders.teachers import Tap
from shoulders.transfer.fvu import unexplained
from shoulders.transfer.standardize import Moments

TAPS = {"odd": Tap(None, 5, (3, 5)), "both": Tap(7, 6, (4, 4)), "summary": Tap(3, None, (0, 0))}


def told(images: int = 64, seed: int = 0) -> dict[str, Features]:
    """Features with a loud channel, one far from zero, and one that never varies."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator)
        x[..., 0] *= 300
        x[..., 1] += 1000
        x[..., 2] = 3
        return x

    return {
        tap: Features(
            draw(images, facts.summary) if facts.summary else None,
            draw(images, facts.grid[0] * facts.grid[1], facts.spatial) if facts.spatial else None,
            facts.grid,
        )
        for tap, facts in TAPS.items()
    }


def codec(**how: Any) -> Codec:
    """A codec with what it does to channels fitted on other images."""
    cache = Cache(**how)
    moments: dict[str, Moments] = {}
    for tap, features in Codec(TAPS, cache).pooled(told(256, 1)).items():
        for part, x in features.components().items():
            moments.setdefault(f"{tap}/{part}", Moments(x.shape[-1])).update(x)
    found = {name: fit_channels(one, cache.pca, cache.dtype == "int8") for name, one in moments.items()}
    return Codec(TAPS, cache, {name: one for name, one in found.items() if one})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floats_are_the_same_floats(dtype: str) -> None:
    given = {tap: features.map(lambda x: x.to(getattr(torch, dtype)).float()) for tap, features in told().items()}
    back = codec(dtype=dtype).decode(codec(dtype=dtype).encode(given))
    for tap, features in given.items():
        assert back[tap].grid == features.grid
        for part, x in features.components().items():
            y = back[tap].components()[part]
            assert torch.equal(x, y) and y.dtype == torch.float32 and y.is_contiguous()


def test_int8_is_within_half_a_step_of_its_token() -> None:
    made = codec(dtype="int8")
    back = made.decode(made.encode(told()))
    for tap, features in told().items():
        for part, x in features.components().items():
            channels = made.channels[f"{tap}/{part}"]
            stored = channels.apply(x)
            step = stored.abs().amax(-1, keepdim=True) / 127
            assert ((channels.apply(back[tap].components()[part]) - stored).abs() <= 0.505 * step + 1e-6).all()
    assert max(errors(made, told()).values()) < 2e-3
    plain = Codec(TAPS, Cache(dtype="int8"))  # a scale per token alone is at the mercy of the loudest channel
    assert max(errors(plain, told()).values()) > 0.1


def test_a_token_of_zeros_stays_zeros() -> None:
    made = Codec(TAPS, Cache(dtype="int8"))
    nothing = {tap: features.map(torch.zeros_like) for tap, features in told(2).items()}
    assert all((x == 0).all() for f in made.decode(made.encode(nothing)).values() for x in f.components().values())


def test_principal_components_are_the_best_that_many() -> None:
    made = codec(dtype="float32", pca=2)
    assert {piece.width for piece in made.pieces} == {2}
    x = told()["both"].components()["spatial"]
    y = made.decode(made.encode(told()))["both"].components()["spatial"]
    rows = (x - x.mean((0, 1))).flatten(0, 1).double()
    best = torch.linalg.svdvals(rows)[2:].square().sum() / rows.square().sum()
    assert unexplained(y.flatten(0, 1), x.flatten(0, 1)) == pytest.approx(float(best), rel=0.1)
    wide = codec(dtype="int8", pca=100)
    assert [piece.width for piece in wide.pieces] == [5, 7, 6, 3]
    assert max(errors(wide, told()).values()) < 2e-3


def test_pooled_grids_are_means_of_squares() -> None:
    made = codec(dtype="float32", pool=2)
    assert {tap: facts.grid for tap, facts in made.taps.items()} == {"odd": (2, 3), "both": (2, 2), "summary": (0, 0)}
    x = told()["both"].to_map()
    y = made.decode(made.encode(told()))["both"].to_map()
    expected = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    assert torch.allclose(y, expected, atol=1e-4)
    lost = errors(made, told())
    assert lost["both/summary"] < 1e-9 and 0.3 < lost["both/spatial"] < 1


def test_records_of_a_batch_are_those_of_its_images() -> None:
    made, given = codec(dtype="int8", pca=4), told(9)
    whole = made.encode(given)
    assert whole.shape == (9, made.bytes) and made.bytes % 8 == 0
    one = {tap: features.map(lambda x: x[3:4]) for tap, features in given.items()}
    assert torch.equal(made.encode(one)[0], whole[3])
    assert sum(made.size_of(piece) for piece in made.pieces) <= made.bytes
    padded = torch.cat([whole, torch.ones(9, 16, dtype=torch.uint8)], 1)
    for tap, features in made.decode(whole).items():
        assert all(
            torch.equal(x, made.decode(padded)[tap].components()[part]) for part, x in features.components().items()
        )
    assert json.loads(json.dumps(made.to_json()))["bytes"] == made.bytes


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", float("nan")), ("int8", float("inf"))])
def test_what_cannot_be_held_is_named(dtype: str, value: float) -> None:
    given = told(4)
    given["both"].components()["spatial"][2, 1, 3] = value
    with pytest.raises(EncodeError) as refusal:
        codec(dtype=dtype).encode(given)
    assert (refusal.value.part, refusal.value.row) == ("both/spatial", 2)


def test_what_is_done_to_channels_is_kept(tmp_path: Any) -> None:
    channels = codec(dtype="int8", pca=4).channels
    again = load_channels(tmp_path, save_channels(channels))
    assert again.keys() == channels.keys()
    for name, one in channels.items():
        assert torch.equal(one.mean, again[name].mean) and torch.equal(one.spread, again[name].spread)
        assert (one.directions is None) == (again[name].directions is None) == (len(one.mean) <= 4)
    with pytest.raises(DataError, match="damaged"):
        load_channels(tmp_path / "x", b"nothing")

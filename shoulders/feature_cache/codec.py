"""How a teacher's features become bytes of one size, and features again.

A record holds what one teacher says of one view: for each tap and part its values, and with int8 a scale per token.
Every piece starts at a multiple of ``ALIGN`` bytes, so that a whole batch of records can be read in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.config.recipe import Cache
from shoulders.feature_cache.channels import ChannelTransform
from shoulders.features import Features, align
from shoulders.teachers import Tap
from shoulders.transfer.fvu import channel_standardized, unexplained

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
ALIGN = 8


@dataclass(frozen=True)
class Piece:
    """One part of one tap in a record: ``tokens`` x ``width`` values from byte ``at`` on, scales from ``scales_at``."""

    tap: str
    part: str
    tokens: int
    width: int
    at: int
    scales_at: int | None


class EncodeError(ValueError):
    """A value that is not finite, or too large for the dtype."""

    def __init__(self, part: str, row: int, value: float) -> None:
        self.part, self.row, self.value = part, row, value
        super().__init__(f"{part} of image {row} holds {value:g}")


class Codec:
    """Features of one teacher to records and back.

    Args:
        taps: what the teacher gives.
        how: dtype, pool and pca are used.
        channels: {"tap/part": what is done to its channels}.
    """

    def __init__(
        self, taps: Mapping[str, Tap], how: Cache, channels: Mapping[str, ChannelTransform] | None = None
    ) -> None:
        self.how, self.dtype = how, DTYPES[how.dtype]
        self.channels = dict(channels or {})
        self.given = dict(taps)
        self.taps = {tap: replace(facts, grid=_pooled(facts.grid, how.pool)) for tap, facts in taps.items()}
        self.pieces = list(_lay_out(self.taps, how))
        self._there: dict[
            torch.device, dict[str, ChannelTransform]
        ] = {}  # what is done to channels, on the devices asked for
        last = self.pieces[-1]
        self.bytes = _aligned(last.at + last.tokens * last.width * self.dtype.itemsize)

    def pooled(self, told: Mapping[str, Features]) -> dict[str, Features]:
        """``{tap: Features}`` on the grids that are stored."""
        return {tap: _pool(features, self.taps[tap].grid) for tap, features in told.items()}

    def encode(self, told: Mapping[str, Features]) -> Tensor:
        """Records (B, bytes) uint8 of ``{tap: Features}``, on the device of those.

        Raises:
            EncodeError: a value that the dtype cannot hold.
        """
        pooled = self.pooled(told)
        first = next(iter(pooled.values()))
        count = len(next(iter(first.components().values())))
        device = next(iter(first.components().values())).device
        records = torch.zeros(count, self.bytes, dtype=torch.uint8, device=device)
        for piece in self.pieces:
            x = pooled[piece.tap].components()[piece.part].float().reshape(count, piece.tokens, -1)  # (B, N, C)
            channels = self._channels(piece, device)
            x = channels.apply(x) if channels else x  # (B, N, W)
            self._check(f"{piece.tap}/{piece.part}", x)
            if piece.scales_at is not None:
                scales = x.abs().amax(2) / 127  # (B, N)
                x = (x / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]).round().clamp(-127, 127)
                _put(records, piece.scales_at, scales)
            _put(records, piece.at, x.to(self.dtype).flatten(1))
        return records

    def _check(self, part: str, x: Tensor) -> None:
        holds = torch.finfo(self.dtype if self.dtype.is_floating_point else torch.float32).max
        fits = (x.abs() <= holds).flatten(1)  # (B, N * W); false for NaN too
        if not fits.all():
            row = int((~fits.all(1)).nonzero()[0])
            raise EncodeError(part, row, float(x[row].flatten()[~fits[row]][0]))

    def decode(self, records: Tensor) -> dict[str, Features]:
        """``{tap: Features}`` in float32 of records (B, bytes or more) uint8, on their device."""
        return self.decode_parts([records], len(records))

    def decode_parts(self, parts: Iterable[Tensor], count: int) -> dict[str, Features]:
        """As `decode`, of ``count`` records that come a few at a time: those are still in the CPU's own memory then."""
        found: dict[Piece, Tensor] = {}
        done = 0
        for records in parts:
            rows = slice(done, done + len(records))
            for piece in self.pieces:
                if piece not in found:
                    channels = self._channels(piece, records.device)
                    width = piece.width if channels is None else len(channels.mean)
                    found[piece] = _empty((count, piece.tokens, width), records.device)  # (B, N, C)
                self._decode(piece, records, found[piece][rows])
            done = rows.stop
        told: dict[str, dict[str, Tensor]] = {}
        for piece, x in found.items():
            told.setdefault(piece.tap, {})[piece.part] = x if piece.part == "spatial" else x[:, 0]
        return {
            tap: Features(both.get("summary"), both.get("spatial"), self.taps[tap].grid) for tap, both in told.items()
        }

    def _channels(self, piece: Piece, device: torch.device) -> ChannelTransform | None:
        """What is done to the channels of a piece, on ``device``."""
        if device not in self._there:
            self._there[device] = {part: one.to(device) for part, one in self.channels.items()}
        return self._there[device].get(f"{piece.tap}/{piece.part}")

    def _decode(self, piece: Piece, records: Tensor, out: Tensor) -> None:
        """One piece (B, N, C) of some records."""
        values = _get(records, piece.at, self.dtype, piece.tokens * piece.width).unflatten(1, (piece.tokens, -1))
        stored = out if out.shape == values.shape else torch.empty(values.shape, device=out.device)
        stored.copy_(values)
        if piece.scales_at is not None:
            stored.mul_(_get(records, piece.scales_at, torch.float32, piece.tokens)[:, :, None])
        channels = self._channels(piece, records.device)
        if channels is not None:
            channels.undo(stored, out)

    def size_of(self, piece: Piece) -> int:
        """Bytes of one piece, its scales included."""
        return piece.tokens * (piece.width * self.dtype.itemsize + (0 if piece.scales_at is None else 4))

    def to_json(self) -> dict[str, Any]:
        """The layout, for whoever reads a cache without this code."""
        return {"bytes": self.bytes, "pieces": [asdict(piece) for piece in self.pieces]}


def errors(codec: Codec, told: Mapping[str, Features]) -> dict[str, float]:
    """fvu that storing alone costs, by tap and part: what decoded features leave unexplained of ``told``.

    ChannelTransform are standardized as in `shoulders.transfer.fvu`; pooled grids are held against the original ones.
    """
    back = codec.decode(codec.encode(told))
    lost = {}
    for tap, features in told.items():
        restored = align(back[tap], features.grid).components()
        for part, x in features.components().items():
            target, guess = channel_standardized(*(y.flatten(0, -2).double().cpu() for y in (x, restored[part])))
            lost[f"{tap}/{part}"] = unexplained(guess, target)
    return lost


def _lay_out(taps: Mapping[str, Tap], how: Cache) -> Iterator[Piece]:
    end = 0
    for tap, facts in taps.items():
        for part, width, tokens in (
            ("summary", facts.summary, 1),
            ("spatial", facts.spatial, facts.grid[0] * facts.grid[1]),
        ):
            if width is None:
                continue
            kept = min(width, how.pca or width)
            scales_at = end if how.dtype == "int8" else None
            at = end if scales_at is None else _aligned(end + 4 * tokens)
            yield Piece(tap, part, tokens, kept, at, scales_at)
            end = _aligned(at + tokens * kept * DTYPES[how.dtype].itemsize)


def _aligned(at: int) -> int:
    return -(-at // ALIGN) * ALIGN


def _pooled(grid: tuple[int, int], pool: int) -> tuple[int, int]:
    return -(-grid[0] // pool), -(-grid[1] // pool)


def _pool(features: Features, grid: tuple[int, int]) -> Features:
    if features.spatial is None or features.grid == grid:
        return features
    return Features.from_map(F.adaptive_avg_pool2d(features.to_map().float(), grid), features.summary)


def _empty(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Float32, uninitialised. On a CPU it is numpy's: that asks for huge pages, and touching small ones for the first
    time would take longer than all the rest."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device)


def _put(records: Tensor, at: int, values: Tensor) -> None:
    raw = values.contiguous().view(torch.uint8)  # (B, bytes)
    records[:, at : at + raw.shape[1]] = raw


def _get(records: Tensor, at: int, dtype: torch.dtype, count: int) -> Tensor:
    """``count`` values (B, count) from byte ``at`` of each record, without a copy."""
    start = at // dtype.itemsize
    return records.view(dtype)[:, start : start + count]

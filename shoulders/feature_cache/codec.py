"""Encoding of a teacher's features as records of one size, and decoding.

A record holds the features of one teacher for one view: a field for each component of each tap, and for int8 one scale
per token. Each field starts at a multiple of ``ALIGN`` bytes, so that a batch of records can be decoded in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.config.sections import Cache
from shoulders.feature_cache.channels import ChannelTransform
from shoulders.features import Features, align
from shoulders.teachers import Tap
from shoulders.transfer.fvu import channel_standardized, unexplained

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
ALIGN = 8


@dataclass(frozen=True)
class Field:
    """One component of one tap in a record.

    Args:
        tap: name of the tap.
        component: ``summary`` or ``spatial``.
        tokens: N; 1 for a summary.
        width: channels of each token.
        offset: of the values (tokens, width) in bytes.
        scales_offset: of the scales (tokens,) float32 in bytes; None unless the values are int8.
    """

    tap: str
    component: str
    tokens: int
    width: int
    offset: int
    scales_offset: int | None

    @property
    def name(self) -> str:
        """``tap/component``."""
        return f"{self.tap}/{self.component}"


class EncodeError(ValueError):
    """A value that is not finite, or too large for the dtype.

    Args:
        field: name of the field.
        image: index of the image in the batch.
        value: the value.
    """

    def __init__(self, field: str, image: int, value: float) -> None:
        self.field, self.image, self.value = field, image, value
        super().__init__(f"{field} of image {image} contains {value:g}")


class Codec:
    """Encodes the features of one teacher as records, and decodes them.

    Args:
        taps: shapes of the teacher's features.
        settings: dtype, pool and pca are used.
        transforms: of the channels, by name of the field.
    """

    def __init__(
        self, taps: Mapping[str, Tap], settings: Cache, transforms: Mapping[str, ChannelTransform] | None = None
    ) -> None:
        self.dtype = DTYPES[settings.dtype]
        self.transforms = dict(transforms or {})
        self.taps = {tap: replace(shape, grid=_pooled_grid(shape.grid, settings.pool)) for tap, shape in taps.items()}
        self.fields = list(_lay_out(self.taps, settings))
        self._transforms_on: dict[torch.device, dict[str, ChannelTransform]] = {}
        last = self.fields[-1]
        self.payload_bytes = _aligned(last.offset + last.tokens * last.width * self.dtype.itemsize)

    def pool(self, features: Mapping[str, Features]) -> dict[str, Features]:
        """``{tap: Features}`` on the grids that are stored."""
        return {tap: _pool(one, self.taps[tap].grid) for tap, one in features.items()}

    def encode(self, features: Mapping[str, Features]) -> Tensor:
        """``{tap: Features}`` as payloads (B, payload_bytes) uint8, on the same device.

        Raises:
            EncodeError: a value that the dtype cannot hold.
        """
        pooled = self.pool(features)
        first = next(iter(next(iter(pooled.values())).components().values()))
        count, device = len(first), first.device
        payload = torch.zeros(count, self.payload_bytes, dtype=torch.uint8, device=device)
        for field in self.fields if count else ():
            x = pooled[field.tap].components()[field.component].float().reshape(count, field.tokens, -1)  # (B, N, C)
            transform = self._transform(field, device)
            x = transform.apply(x) if transform else x  # (B, N, W)
            self._check(field, x)
            if field.scales_offset is not None:
                scales = x.abs().amax(2) / 127  # (B, N)
                x = (x / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]).round().clamp(-127, 127)
                _put(payload, field.scales_offset, scales)
            _put(payload, field.offset, x.to(self.dtype).flatten(1))
        return payload

    def decode(self, records: Tensor) -> dict[str, Features]:
        """Records (B, payload_bytes or more) uint8 as ``{tap: Features}`` in float32, on the same device."""
        return self.decode_parts([records], len(records))

    def decode_parts(self, parts: Iterable[Tensor], count: int) -> dict[str, Features]:
        """As `decode`, for ``count`` records that arrive in several parts, each small enough for the CPU's cache."""
        decoded: dict[Field, Tensor] = {}
        done = 0
        for records in parts:
            part = slice(done, done + len(records))
            for field in self.fields:
                if field not in decoded:
                    transform = self._transform(field, records.device)
                    width = field.width if transform is None else len(transform.mean)
                    decoded[field] = _empty((count, field.tokens, width), records.device)  # (B, N, C)
                self._decode_field(field, records, decoded[field][part])
            done = part.stop
        components: dict[str, dict[str, Tensor]] = {}
        for field, x in decoded.items():
            components.setdefault(field.tap, {})[field.component] = x if field.component == "spatial" else x[:, 0]
        return {
            tap: Features(both.get("summary"), both.get("spatial"), self.taps[tap].grid)
            for tap, both in components.items()
        }

    def field_bytes(self, field: Field) -> int:
        """Size of one field with its scales."""
        return field.tokens * (field.width * self.dtype.itemsize + (0 if field.scales_offset is None else 4))

    def to_json(self) -> dict[str, Any]:
        """The layout of a record, for readers without this code."""
        return {"payload_bytes": self.payload_bytes, "fields": [asdict(field) for field in self.fields]}

    def _check(self, field: Field, x: Tensor) -> None:
        largest = torch.finfo(self.dtype if self.dtype.is_floating_point else torch.float32).max
        fits = (x.abs() <= largest).flatten(1)  # (B, N * W); false for NaN too
        if not fits.all():
            image = int((~fits.all(1)).nonzero()[0])
            raise EncodeError(field.name, image, float(x[image].flatten()[~fits[image]][0]))

    def _decode_field(self, field: Field, records: Tensor, out: Tensor) -> None:
        """Decode one field of some records into ``out`` (B, N, C)."""
        values = _get(records, field.offset, self.dtype, field.tokens * field.width).unflatten(1, (field.tokens, -1))
        stored = out if out.shape == values.shape else torch.empty(values.shape, device=out.device)  # (B, N, W)
        stored.copy_(values)
        if field.scales_offset is not None:
            stored.mul_(_get(records, field.scales_offset, torch.float32, field.tokens)[:, :, None])
        transform = self._transform(field, records.device)
        if transform is not None:
            transform.invert(stored, out)

    def _transform(self, field: Field, device: torch.device) -> ChannelTransform | None:
        if device not in self._transforms_on:
            self._transforms_on[device] = {name: one.to(device) for name, one in self.transforms.items()}
        return self._transforms_on[device].get(field.name)


def reconstruction_fvu(codec: Codec, features: Mapping[str, Features]) -> dict[str, float]:
    """Fraction of the variance of ``features`` that decoded features leave unexplained, by name of the field.

    Channels are standardized as in `shoulders.transfer.fvu`. Pooled grids are resized and compared with the original
    ones.
    """
    decoded = codec.decode(codec.encode(features))
    result = {}
    for tap, original in features.items():
        restored = align(decoded[tap], original.grid).components()
        for component, x in original.components().items():
            pair = (y.flatten(0, -2).double().cpu() for y in (x, restored[component]))
            target, prediction = channel_standardized(*pair)
            result[f"{tap}/{component}"] = unexplained(prediction, target)
    return result


def _lay_out(taps: Mapping[str, Tap], settings: Cache) -> Iterator[Field]:
    end = 0
    for tap, shape in taps.items():
        for component, channels, tokens in (
            ("summary", shape.summary, 1),
            ("spatial", shape.spatial, shape.grid[0] * shape.grid[1]),
        ):
            if channels is None:
                continue
            width = min(channels, settings.pca or channels)
            scales_offset = end if settings.dtype == "int8" else None
            offset = end if scales_offset is None else _aligned(end + 4 * tokens)
            yield Field(tap, component, tokens, width, offset, scales_offset)
            end = _aligned(offset + tokens * width * DTYPES[settings.dtype].itemsize)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _pooled_grid(grid: tuple[int, int], pool: int) -> tuple[int, int]:
    return -(-grid[0] // pool), -(-grid[1] // pool)


def _pool(features: Features, grid: tuple[int, int]) -> Features:
    if features.spatial is None or features.grid == grid:
        return features
    return Features.from_map(F.adaptive_avg_pool2d(features.to_map().float(), grid), features.summary)


def _empty(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uninitialised float32. On a CPU the memory comes from numpy, which asks for huge pages: the first access to small
    pages would take longer than all of the decoding."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, device=device)


def _put(payload: Tensor, offset: int, values: Tensor) -> None:
    raw = values.contiguous().view(torch.uint8)  # (B, bytes)
    payload[:, offset : offset + raw.shape[1]] = raw


def _get(records: Tensor, offset: int, dtype: torch.dtype, count: int) -> Tensor:
    """``count`` values (B, count) from byte ``offset`` of each record, without a copy."""
    start = offset // dtype.itemsize
    return records.view(dtype)[:, start : start + count]

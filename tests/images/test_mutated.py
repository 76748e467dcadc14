"""Ten thousand damaged files: each is decoded or skipped with its reason, and none ends the process."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shoulders.images import Collection
from shoulders.images.decode import Undecodable, decode
from shoulders.images.loader import evaluation_batches
from tests.crashes import fork
from tests.images.test_decode import encode

FILES = 10_000
SIZE = (16, 16)
MAX_PIXELS = 1_000_000
Dice = random.Random


def picture(mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (8, 10, 4), dtype=np.uint8)
    return Image.fromarray(values).resize((40, 32)).convert(mode)


ORIGINALS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(picture("RGB"), "JPEG"),
    "cmyk jpeg": lambda: encode(picture("CMYK"), "JPEG"),
    "grey jpeg": lambda: encode(picture("L"), "JPEG"),
    "progressive jpeg": lambda: encode(picture("RGB"), "JPEG", progressive=True),
    "png": lambda: encode(picture("RGB"), "PNG"),
    "palette png": lambda: encode(picture("P"), "PNG"),
    "transparent png": lambda: encode(picture("RGBA"), "PNG"),
    "deep png": lambda: encode(Image.fromarray(np.arange(1280, dtype=np.uint16).reshape(32, 40) * 51), "PNG"),
    "webp": lambda: encode(picture("RGB"), "WEBP"),
    "gif": lambda: encode(picture("P"), "GIF"),
    "bmp": lambda: encode(picture("RGB"), "BMP"),
    "tiff": lambda: encode(picture("RGB"), "TIFF", compression="tiff_lzw"),
}


def flip_bits(data: bytearray, dice: Dice) -> None:
    for _ in range(dice.randint(1, 8)):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def overwrite(data: bytearray, dice: Dice) -> None:
    start = dice.randrange(len(data))
    data[start : start + 16] = dice.randbytes(len(data[start : start + 16]))


def damage_header(data: bytearray, dice: Dice) -> None:
    for _ in range(2):
        data[dice.randrange(min(64, len(data)))] = dice.randrange(256)


def cut_off(data: bytearray, dice: Dice) -> None:
    del data[dice.randrange(len(data)) :]


def remove_piece(data: bytearray, dice: Dice) -> None:
    start = dice.randrange(len(data))
    del data[start : start + dice.randint(1, 100)]


def repeat_piece(data: bytearray, dice: Dice) -> None:
    start = dice.randrange(len(data))
    data[start:start] = data[start : start + dice.randint(1, 100)]


MUTATIONS = (flip_bits, overwrite, damage_header, cut_off, remove_piece, repeat_piece)
KINDS = [(original, mutate) for original in ORIGINALS for mutate in MUTATIONS]
original_bytes = cache(lambda name: ORIGINALS[name]())


class Mutated:
    """A source of damaged images: number ``index`` is always the same."""

    classes: list[str] | None = None
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return FILES

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        original, mutate = KINDS[index % len(KINDS)]
        data, dice = bytearray(original_bytes(original)), random.Random(index)  # noqa: S311
        mutate(data, dice)
        return bytes(data)

    def label(self, index: int) -> int | None:
        return None


def load_all(path: Path) -> None:
    """Number of decoded images, and the reason for each other one, as runs load images."""
    warnings.filterwarnings("ignore", category=UserWarning)  # of the range of grey values
    decoded, skipped = 0, dict[str, str]()
    for batch in evaluation_batches(Collection({"mutated": Mutated()}), [SIZE], 256, max_pixels=MAX_PIXELS):
        decoded += len(batch)
        skipped |= {one.name: one.reason for one in batch.skipped}
    path.write_text(json.dumps([decoded, skipped]))


def decode_all(path: Path) -> None:
    """The reason for each image that cannot be decoded, one after another without a loader."""
    source, skipped = Mutated(), {}
    for index in range(FILES):
        try:
            decode(source.read(index), MAX_PIXELS, min(SIZE))
        except Undecodable as error:
            skipped[str(index)] = str(error)
    path.write_text(json.dumps(skipped))


def test_each_of_ten_thousand_damaged_files_is_decoded_or_skipped_with_its_reason(tmp_path: Path) -> None:
    assert fork(partial(load_all, tmp_path / "loaded")) == 0
    assert fork(partial(decode_all, tmp_path / "decoded")) == 0
    decoded, skipped = json.loads((tmp_path / "loaded").read_text())
    assert decoded + len(skipped) == FILES
    assert min(decoded, len(skipped)) > FILES // 5
    assert skipped == json.loads((tmp_path / "decoded").read_text())
    kinds = Counter(reason.split(":")[0] for reason in skipped.values())
    assert kinds.keys() == {"damaged", "not an image", "too many pixels", "empty file"}
    assert not [reason for reason in skipped.values() if "\n" in reason or "Warning" in reason or "0x" in reason]

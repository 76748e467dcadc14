"""Run a student's kept heads on images: JSON in the form of the transformers pipelines, and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shoulders.checkpoint import write_text
from shoulders.errors import DataError, RecipeError
from shoulders.images import Collection, Undecodable, View, open_source, render
from shoulders.images.folder import Folder
from shoulders.model import ShouldersModel, load
from shoulders.pictures import enlarged, pca_pictures, picture
from shoulders.ranks import this_device
from shoulders.recipe import as_size
from shoulders.tasks.coco import list_runs

BATCH = 8
WHOLE = View(0, 0, 1, 1)


def predict(
    run: Path | str, images: Path | str, heads: Sequence[str] = (), out: Path | str | None = None, *,
    threshold: float = 0.5, max_pixels: int = 50_000_000, on_image: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """What each head says of each image: ``{image: {head: answer}}``, masks as COCO run lengths.

    Args:
        run: a run folder, or a student's folder.
        images: an image, or a folder, parquet or tar file of images.
        heads: names of kept heads; default: all of them.
        out: a folder for ``predictions.json`` and a picture for each image and head, and of the latent.
        threshold: objects of a lower score are left out.
        on_image: called after each image.

    Raises:
        RecipeError: a head that the student does not keep, or no images there.
        DataError: an image cannot be decoded, or the student or a head is damaged.
    """
    student = load(run).to(this_device())
    names = list(heads) or list(student.heads)
    if not names:
        raise RecipeError(f"{run}: this student keeps no heads; name some in keep_heads: of the recipe")
    for name in names:
        student.head(name)
    collection = _open(Path(images))
    told: dict[str, dict[str, Any]] = {}
    size = as_size(tuple(student.config.image_size))
    for few in _decoded(collection, max_pixels):
        pixels = torch.stack([render(image, WHOLE, size) for _, image in few]).to(student.device) / 255
        sizes = [(image.shape[1], image.shape[2]) for _, image in few]
        said = {name: student.predict(name, pixels, sizes, threshold) for name in names}
        for at, (image, _) in enumerate(few):
            told[image] = {name: _plain(said[name][at]) for name in names}
            on_image()
        if out is not None:
            _draw(Path(out), student, pixels, few, said)
    if out is not None:
        write_text(Path(out) / "predictions.json", json.dumps(told, indent=1) + "\n")
    return told


def _open(path: Path) -> Collection:
    """One image, or whatever holds images."""
    if path.is_file() and path.suffix.lower() not in (".parquet", ".tar"):
        return Collection({"images": Folder(path.parent, [path.name.encode()])})
    return Collection({"images": open_source(path)})


def _decoded(images: Collection, max_pixels: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Names and whole images (3, H, W) uint8, a few at a time."""
    for start in range(0, len(images), BATCH):
        few = range(start, min(start + BATCH, len(images)))
        try:
            yield [(images.name(at), images.pixels(at, max_pixels, None)[0]) for at in few]
        except Undecodable as error:
            raise DataError(
                f"{images.name(few[0])} or one of the next {len(few) - 1}: {error}; leave it out"
            ) from error


def _draw(
    out: Path, student: ShouldersModel, pixels: Tensor, few: list[tuple[str, Tensor]], said: dict[str, list[Any]]
) -> None:
    """A picture for each image and head, and one of the latent's principal components."""
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        shades = pca_pictures(student.encoder(pixels)["latent"], (480, 480))
    for at, (name, decoded) in enumerate(few):
        stem = Path(name).with_suffix("").as_posix().replace("/", "-")
        original = Image.fromarray(decoded.permute(1, 2, 0).numpy())
        shades[at].resize(enlarged(original.size)).save(out / f"{stem}-latent.png")
        for head, answers in said.items():
            picture(original, answers[at]).save(out / f"{stem}-{head}.png")


def _plain(answer: Any) -> Any:
    """An answer as JSON: masks as run lengths, depth as rows of numbers."""
    if isinstance(answer, dict):
        return {"predicted_depth": answer["predicted_depth"].tolist()}
    return [{key: _rle(value) if key == "mask" else value for key, value in one.items()} for one in answer]


def _rle(mask: Tensor) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": list_runs(mask.cpu().numpy())}

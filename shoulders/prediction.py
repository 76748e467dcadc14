"""Run a student's kept heads, and probes, on images: JSON in the form of the transformers pipelines, and pictures."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shoulders.config.recipe import read_recipe
from shoulders.config.section import as_size
from shoulders.distributed.device import this_device
from shoulders.errors import DataError, RecipeError
from shoulders.features import Batch, Features, FeaturesOf, Skipped
from shoulders.images import MAX_PIXELS, WHOLE_IMAGE, Collection, Undecodable, central_view, open_source, render
from shoulders.images.folder import Folder
from shoulders.images.pictures import display_copy, draw_prediction, pca_pictures
from shoulders.images.run_lengths import mask_to_runs
from shoulders.images.source import EXTENSIONS
from shoulders.inference import (
    adapted_encoder,
    features_of_encoder,
    features_of_student,
    features_of_teacher,
    run_heads,
)
from shoulders.model import ShouldersModel, load
from shoulders.storage.atomic import write_bytes, write_text
from shoulders.teachers import load_teacher
from shoulders.teachers.heads.post_process import post_process

BATCH = 8
MAX_STEM_BYTES = 180  # of a picture's file name before the name of the head; file systems allow 255 in all
PNG_LEVEL = 1  # zlib's fastest: files are larger by some tenths, and are written in a fraction of the time
PICTURE_PX = (480, 480)  # of the latent's components

Images = list[tuple[str, Tensor]]  # names and pixels (3, H, W) uint8
Predict = Callable[[Images], list[Any]]  # predictions for each image


def predict(
    run: Path | str,
    images: Path | str,
    heads: Sequence[str] = (),
    out: Path | str | None = None,
    *,
    probes: Sequence[str] = (),
    threshold: float = 0.5,
    max_pixels: int = MAX_PIXELS,
    pictures: bool = True,
    verify: bool = True,
    on_image: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """The predictions of each head and probe for each image, masks as COCO run lengths.

    Images that cannot be read are left out with a warning, and listed in ``out/skipped.jsonl``.

    Args:
        run: a run folder, or a student's folder.
        images: an image, or a folder, parquet or tar file of images.
        heads: names of kept heads; default: all of them where no probe is given.
        probes: names of probes that `shoulders.evaluation.evaluate` saved in the run folder, such as
            ``student/semantic``.
        out: a folder for ``predictions.json`` and a picture per image and head, and of the latent.
        threshold: minimum score of an object.
        max_pixels: images with more are not read.
        pictures: whether to write pictures into ``out``. They are reduced to at most
            `shoulders.images.pictures.MAX_SIDE_PX` px; predictions always are in the pixels of the original.
        verify: compare the files of the student, its heads and the probes with their manifests.
        on_image: called after each image.

    Returns:
        {image: {head: prediction}}. Depth is float32 (h, w) in a ``.npy`` file below ``out``, whose name the prediction
        holds; without ``out`` it is a list of lists.

    Raises:
        RecipeError: a head that the student does not keep, a probe or images that do not exist.
        DataError: no image can be decoded, or the student, a head or a probe is damaged.
    """
    student = load(run, verify).to(this_device())
    names = list(heads) or ([] if probes else list(student.heads))
    by_probe = {name: _open_probe(Path(run), name, threshold, verify) for name in probes}
    folder = None if out is None else Path(out)
    _check(run, student, names, probes, Path(images), folder)
    collection = _open_images(Path(images))
    stems = picture_stems([collection.name(index) for index in range(len(collection))])
    predictions: dict[str, dict[str, Any]] = {}
    skipped: list[Skipped] = []
    for decoded in _decode(collection, max_pixels, skipped):
        latent, by_name = _run_heads(student, names, decoded, threshold)
        by_name |= {name: run_probe(decoded) for name, run_probe in by_probe.items()}
        for index, (image, _) in enumerate(decoded):
            files = {
                name: None if folder is None else folder / file_name(stems[image], name, "npy") for name in by_name
            }
            predictions[image] = {name: to_json(of_batch[index], files[name]) for name, of_batch in by_name.items()}
            on_image()
        if folder is not None and pictures:
            _save_pictures(folder, latent, [(stems[name], pixels) for name, pixels in decoded], by_name)
    _report_skipped(skipped, len(collection), folder)
    if folder is not None:
        _write_rows(folder, predictions, skipped)
    return predictions


def _write_rows(out: Path, predictions: Mapping[str, Any], skipped: Sequence[Skipped]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "predictions.json", json.dumps(predictions, indent=1) + "\n")
    write_text(out / "skipped.jsonl", "".join(json.dumps(asdict(one)) + "\n" for one in skipped))


def _check(
    run: Path | str,
    student: ShouldersModel,
    heads: Sequence[str],
    probes: Sequence[str],
    images: Path,
    out: Path | None,
) -> None:
    if not heads and not probes:
        raise RecipeError(f"{run}: this student keeps no heads; name some in keep_heads: of the recipe")
    for name in heads:
        student.head(name)
    if out is not None and images.is_dir() and out.resolve().is_relative_to(images.resolve()):
        raise RecipeError(f"--out: {out} is inside {images}, whose images are read; choose another folder")


def _run_heads(
    student: ShouldersModel, names: Sequence[str], decoded: Images, threshold: float
) -> tuple[Features, dict[str, list[Any]]]:
    """The latent of whole images at the student's size, and the predictions of kept heads."""
    size = as_size(tuple(student.config.image_size))
    pixels = torch.stack([render(image, WHOLE_IMAGE, size) for _, image in decoded]).to(student.device) / 255
    sizes = [(image.shape[1], image.shape[2]) for _, image in decoded]
    latent, outputs = run_heads(student, names, pixels)
    return latent, {
        name: post_process(student.head(name), output, sizes, threshold) for name, output in outputs.items()
    }


def _open_probe(run: Path, name: str, threshold: float, verify: bool) -> Predict:
    """A saved probe, with the model whose features it needs, as a function from images to predictions."""
    # heads need no task: what fits and evaluates probes is imported where one is used
    from shoulders.tasks import TASKS
    from shoulders.tasks.saved_probes import open_probe, predict_with_probe

    probe = open_probe(run, name, verify)
    probe.head.to(this_device())
    spatial = TASKS[probe.task].needs_spatial
    features_of = _features_of(run, name, probe, spatial, verify)

    @torch.no_grad()
    def run_probe(decoded: Images) -> list[Any]:
        """Predictions for images that are drawn as those that the probe was fitted on."""
        sizes = [(image.shape[1], image.shape[2]) for _, image in decoded]
        views = [WHOLE_IMAGE if spatial else central_view(size, probe.size) for size in sizes]
        drawn = [render(image, view, probe.size) for (_, image), view in zip(decoded, views, strict=True)]
        features = features_of(Batch(torch.arange(len(decoded)), {probe.size: torch.stack(drawn)}))
        return predict_with_probe(probe, features, sizes, threshold)

    return run_probe


def _features_of(run: Path, name: str, probe: Any, spatial: bool, verify: bool) -> FeaturesOf:
    """The features that a probe was fitted on, with the adapter that was finetuned with it."""
    if probe.model not in ("student", "base"):
        teachers = read_recipe(run / "recipe.yaml").teachers
        if probe.model not in teachers:
            raise RecipeError(f"--probe: {name!r} needs {probe.model}, which is not among the teachers of {run}")
        return features_of_teacher(load_teacher(probe.model, teachers[probe.model]).to(this_device()), spatial)
    student = load(run, verify).to(this_device())
    if probe.adapter is not None:
        return features_of_encoder(adapted_encoder(student, probe.model, probe.adapter), probe.size)
    return features_of_student(student, probe.size, probe.model == "base")


def _open_images(path: Path) -> Collection:
    """One image, or all images of a folder or file."""
    if path.is_file() and path.suffix.lower() not in (".parquet", ".tar"):
        return Collection({"images": Folder(path.parent, [os.fsencode(path.name)])})
    return Collection({"images": open_source(path)})


def _decode(images: Collection, max_pixels: int, skipped: list[Skipped]) -> Iterator[Images]:
    """Names and whole images, a few at a time; those that cannot be read go into ``skipped``.

    Raises:
        DataError: none can be read.
    """
    for start in range(0, len(images), BATCH):
        decoded = []
        for index in range(start, min(start + BATCH, len(images))):
            try:
                decoded.append((images.name(index), images.pixels(index, max_pixels, None)[0]))
            except Undecodable as error:
                skipped.append(Skipped(images.name(index), str(error)))
        if len(skipped) == len(images):
            raise DataError(f"{skipped[0].name}: {skipped[0].reason}; leave it out")
        if decoded:
            yield decoded


def _report_skipped(skipped: Sequence[Skipped], total: int, out: Path | None) -> None:
    if skipped:
        listed = "" if out is None else f" ({out / 'skipped.jsonl'})"
        warnings.warn(
            f"{len(skipped)} of {total} images could not be read{listed}, first {skipped[0].name}: {skipped[0].reason}",
            stacklevel=3,
        )


def _save_pictures(out: Path, latent: Features, decoded: Images, by_name: Mapping[str, list[Any]]) -> None:
    """A picture per image and head, and one of the latent's principal components; ``decoded`` has file stems."""
    out.mkdir(parents=True, exist_ok=True)
    components = pca_pictures(latent, PICTURE_PX)
    for index, (stem, pixels) in enumerate(decoded):
        original = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        reduced = display_copy(original)  # once for all heads
        _save_picture(components[index].resize(reduced.size), out / f"{stem}-latent.png")
        for name, of_batch in by_name.items():
            picture = draw_prediction(reduced, of_batch[index], size=original.size)
            _save_picture(picture, out / file_name(stem, name, "png"))


def _save_picture(picture: Image.Image, path: Path) -> None:
    encoded = io.BytesIO()  # Pillow does not say what went wrong when it writes to a full disk
    picture.save(encoded, "PNG", compress_level=PNG_LEVEL)
    write_bytes(path, encoded.getvalue(), durable=False)


def picture_stems(names: Sequence[str]) -> dict[str, str]:
    """{name of an image: stem of its pictures' file names}: without its extension, unless another has the same."""

    def flat(name: str) -> str:
        return re.sub(r"[/\\\x00-\x1f\x7f]", "-", name)  # names in a tar file may hold any character

    def short(name: str) -> str:
        return flat(name.rpartition(".")[0] if name.lower().endswith(EXTENSIONS) else name)

    shorts, longs = Counter(map(short, names)), Counter(map(flat, names))
    stems = {name: short(name) if shorts[short(name)] == 1 else flat(name) for name in names}
    # numbers distinguish a/b.jpg from a-b.jpg; names that are too long for a file get one, too
    return {
        name: f"{stem[: MAX_STEM_BYTES // 4]}-{number}"
        if longs[flat(name)] > 1 or len(os.fsencode(stem)) > MAX_STEM_BYTES
        else stem
        for number, (name, stem) in enumerate(stems.items())
    }


def file_name(stem: str, head: str, extension: str) -> str:
    """The name of a file with a head's prediction for an image."""
    return f"{stem}-{head.replace('/', '-')}.{extension}"


def to_json(prediction: Any, depth_file: Path | None) -> Any:
    """A prediction as JSON: masks as run lengths, depth as the name of the file that it is written to, or as lists."""
    if isinstance(prediction, dict):
        depth = prediction["predicted_depth"].float().cpu()
        if depth_file is None:
            return {"predicted_depth": depth.tolist()}
        depth_file.parent.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        np.save(encoded, depth.numpy())
        write_bytes(depth_file, encoded.getvalue(), durable=False)
        return {"predicted_depth": depth_file.name}
    return [{key: _run_lengths(value) if key == "mask" else value for key, value in one.items()} for one in prediction]


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": mask_to_runs(mask.cpu().numpy())}

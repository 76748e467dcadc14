"""Run a student's kept heads, or probes, on images: JSON in the form of the transformers pipelines, and pictures."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shoulders.config.recipe import as_size, read_recipe
from shoulders.distributed.device import this_device
from shoulders.errors import DataError, RecipeError
from shoulders.evaluation.evaluate import OWN
from shoulders.evaluation.finetune_models import adapted
from shoulders.evaluation.probes import Probe, open_probe, probe_answers
from shoulders.features import Batch, Features, Skipped
from shoulders.images import Collection, Undecodable, View, central_view, open_source, render
from shoulders.images.folder import Folder
from shoulders.images.pictures import display_size, draw_prediction, pca_pictures
from shoulders.images.source import EXTENSIONS
from shoulders.inference import FeaturesOf, features_of_student, features_of_teacher, predicted_taps
from shoulders.model import ShouldersModel, load
from shoulders.storage.atomic import write_text
from shoulders.tasks import TASKS
from shoulders.tasks.data.coco import list_runs
from shoulders.teachers import load_teacher
from shoulders.teachers.heads.post_process import post_process

BATCH = 8
WHOLE = View(0, 0, 1, 1)
LONGEST = 180  # bytes of the name of a picture before that of its head; file systems allow 255 in all


def predict(
    run: Path | str,
    images: Path | str,
    heads: Sequence[str] = (),
    out: Path | str | None = None,
    *,
    probes: Sequence[str] = (),
    threshold: float = 0.5,
    max_pixels: int = 50_000_000,
    on_image: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """What each head and probe says of each image: ``{image: {head: answer}}``, masks as COCO run lengths.

    Depth is float32 (h, w) in a ``.npy`` file below ``out``, of which the answer holds the name; without ``out``, rows.

    Args:
        run: a run folder, or a student's folder.
        images: an image, or a folder, parquet or tar file of images.
        heads: names of kept heads; default: all of them where no probe is asked for.
        probes: names of probes that `shoulders.evaluation.evaluate` left in the run folder, such as ``student/semantic``.
        out: a folder for ``predictions.json`` and a picture for each image and head, and of the latent.
        threshold: objects of a lower score are left out.
        max_pixels: images of more are not read.
        on_image: called after each image.

    Images that cannot be read are left out with a warning, and listed in ``out/skipped.jsonl``.

    Raises:
        RecipeError: a head that the student does not keep, a probe that is not there, or no images there.
        DataError: no image can be decoded, or the student, a head or a probe is damaged.
    """
    student = load(run).to(this_device())
    names = list(heads) or ([] if probes else list(student.heads))
    asked = [_asked(Path(run), name) for name in probes]
    if not names and not asked:
        raise RecipeError(f"{run}: this student keeps no heads; name some in keep_heads: of the recipe")
    for name in names:
        student.head(name)
    if out is not None and Path(images).is_dir() and Path(out).resolve().is_relative_to(Path(images).resolve()):
        raise RecipeError(f"--out: {out} lies in {images}, whose pictures are read; choose another place")
    collection = _open(Path(images))
    stems = _stems([collection.name(at) for at in range(len(collection))])
    told: dict[str, dict[str, Any]] = {}
    size = as_size(tuple(student.config.image_size))
    skipped: list[Skipped] = []
    for few in _decoded(collection, max_pixels, skipped):
        pixels = torch.stack([render(image, WHOLE, size) for _, image in few]).to(student.device) / 255
        sizes = [(image.shape[1], image.shape[2]) for _, image in few]
        latent, outputs = ask_heads(student, names, pixels)
        said = {name: post_process(student.head(name), output, sizes, threshold) for name, output in outputs.items()}
        said |= {probe.name: _answers(probe, features_of, few, threshold) for probe, features_of in asked}
        for at, (image, _) in enumerate(few):
            told[image] = {
                name: _plain(answer[at], None if out is None else Path(out) / _file(stems[image], name, "npy"))
                for name, answer in said.items()
            }
            on_image()
        if out is not None:
            _draw(Path(out), latent, [(stems[name], image) for name, image in few], said)
    if skipped:
        where = "" if out is None else f" ({Path(out) / 'skipped.jsonl'})"
        warnings.warn(
            f"{len(skipped)} of {len(collection)} images could not be read{where}, first {skipped[0].name}: "
            f"{skipped[0].reason}",
            stacklevel=2,
        )
    if out is not None:
        write_text(Path(out) / "predictions.json", json.dumps(told, indent=1) + "\n")
        write_text(Path(out) / "skipped.jsonl", "".join(json.dumps(asdict(one)) + "\n" for one in skipped))
    return told


@torch.no_grad()
def ask_heads(student: ShouldersModel, heads: Sequence[str], pixels: Tensor) -> tuple[Features, dict[str, Any]]:
    """The latent of pixels (B, 3, h, w) in [0, 1] and each head's own output: the encoder runs once for all of them."""
    seen = student.forward_features(pixels)
    return seen["latent"], {name: student.head(name)(predicted_taps(student, name, seen)) for name in heads}


def _asked(run: Path, name: str) -> tuple[Probe, FeaturesOf]:
    """A probe and the features that it was fitted on, its own adapter among them."""
    probe = open_probe(run, name)
    probe.head.to(this_device())
    if probe.model not in OWN:
        specs = read_recipe(run / "recipe.yaml").teachers
        if probe.model not in specs:
            raise RecipeError(f"--probe: {name!r} is of {probe.model}, which is not among the teachers of {run}")
        teacher = load_teacher(probe.model, specs[probe.model])
        return probe, features_of_teacher(teacher.to(this_device()), TASKS[probe.task].spatial)
    student = load(run)
    if probe.adapter is not None:
        student.encoder = adapted(student, probe.model, probe.adapter)
    base = probe.model == "base" and probe.adapter is None
    return probe, features_of_student(student.to(this_device()), probe.size, base)


@torch.no_grad()
def _answers(probe: Probe, features_of: FeaturesOf, few: list[tuple[str, Tensor]], threshold: float) -> list[Any]:
    """What a probe says of a few images, each seen as those that it was fitted on."""
    sizes = [(image.shape[1], image.shape[2]) for _, image in few]
    views = [WHOLE if TASKS[probe.task].spatial else central_view(size, probe.size) for size in sizes]
    drawn = [render(image, view, probe.size) for (_, image), view in zip(few, views, strict=True)]
    features = features_of(Batch(torch.arange(len(few)), {probe.size: torch.stack(drawn)}))
    return probe_answers(probe, features, sizes, threshold)


def _open(path: Path) -> Collection:
    """One image, or whatever holds images."""
    if path.is_file() and path.suffix.lower() not in (".parquet", ".tar"):
        return Collection({"images": Folder(path.parent, [os.fsencode(path.name)])})
    return Collection({"images": open_source(path)})


def _decoded(images: Collection, max_pixels: int, skipped: list[Skipped]) -> Iterator[list[tuple[str, Tensor]]]:
    """Names and whole images (3, H, W) uint8, a few at a time; those that cannot be read go into ``skipped``.

    Raises:
        DataError: none can be read.
    """
    for start in range(0, len(images), BATCH):
        few = []
        for at in range(start, min(start + BATCH, len(images))):
            try:
                few.append((images.name(at), images.pixels(at, max_pixels, None)[0]))
            except Undecodable as error:
                skipped.append(Skipped(images.name(at), str(error)))
        if len(skipped) == len(images):
            raise DataError(f"{skipped[0].name}: {skipped[0].reason}; leave it out")
        if few:
            yield few


def _draw(out: Path, latent: Features, few: list[tuple[str, Tensor]], said: dict[str, list[Any]]) -> None:
    """A picture for each image and head, and one of the latent's principal components."""
    out.mkdir(parents=True, exist_ok=True)
    shades = pca_pictures(latent, (480, 480))
    for at, (stem, decoded) in enumerate(few):
        original = Image.fromarray(decoded.permute(1, 2, 0).numpy())
        shades[at].resize(display_size(original.size)).save(out / f"{stem}-latent.png")
        for head, answer in said.items():
            draw_prediction(original, answer[at]).save(out / _file(stem, head, "png"))


def _stems(names: Sequence[str]) -> dict[str, str]:
    """{name of an image: what its pictures are called by}; without its extension, unless that says too little."""

    def flat(name: str) -> str:
        return name.replace("/", "-")

    def short(name: str) -> str:
        return flat(name.rpartition(".")[0] if name.lower().endswith(EXTENSIONS) else name)

    shorts, longs = Counter(map(short, names)), Counter(map(flat, names))
    stems = {name: short(name) if shorts[short(name)] == 1 else flat(name) for name in names}
    # a/b.jpg and a-b.jpg: told apart by their numbers; so are those that no file could be called by
    return {
        name: f"{stem[: LONGEST // 4]}-{number}" if longs[flat(name)] > 1 or len(os.fsencode(stem)) > LONGEST else stem
        for number, (name, stem) in enumerate(stems.items())
    }


def _file(stem: str, head: str, kind: str) -> str:
    """The name of what a head says of an image."""
    return f"{stem}-{head.replace('/', '-')}.{kind}"


def _plain(answer: Any, file: Path | None) -> Any:
    """An answer as JSON: masks as run lengths, depth as the file that it is written to, or rows of numbers."""
    if isinstance(answer, dict):
        depth = answer["predicted_depth"].float().cpu()
        if file is None:
            return {"predicted_depth": depth.tolist()}
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, depth.numpy())
        return {"predicted_depth": file.name}
    return [{key: _rle(value) if key == "mask" else value for key, value in one.items()} for one in answer]


def _rle(mask: Tensor) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": list_runs(mask.cpu().numpy())}

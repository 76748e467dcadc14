"""The layout of a teacher's records, which is decided before the first shard, and the accuracy of its encoding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shoulders.config.sections import Cache
from shoulders.errors import DataError, NumericError
from shoulders.feature_cache.channels import ChannelTransform, fit_channels, save_channels
from shoulders.feature_cache.codec import Codec, EncodeError, reconstruction_fvu
from shoulders.feature_cache.fingerprint import Fingerprint
from shoulders.feature_cache.metadata import CHANNELS, LAYOUT, write_json
from shoulders.feature_cache.teacher_runner import TeacherRunner, concat, numeric_error
from shoulders.features import Batch, Features
from shoulders.storage.atomic import write_bytes
from shoulders.transfer.standardize import Moments

FIT_VIEWS, PCA_FIT_VIEWS = 128, 1024  # views from which the transforms of channels are fitted, without and with PCA
MEASURED_VIEWS = 128  # other views, on which the reconstruction fvu is measured
MIN_MEASURED_VIEWS = 16
MAX_INT8_FVU = 1e-3  # a field with a higher reconstruction fvu in int8 has its channels rescaled


def write_layout(
    folder: Path,
    runner: TeacherRunner,
    draw: Callable[[int, int], Iterator[Batch]],
    num_training: int,
    counts: list[int],
    fingerprint: Fingerprint,
    cache: Cache,
) -> dict[str, Any]:
    """Decide how the features of a teacher are stored, and write ``layout.json`` and ``channels.safetensors``.

    Args:
        folder: of the teacher.
        runner: the teacher.
        draw: first record and end of a range -> batches of their views.
        num_training: number of records of training views; the first ones are measured.
        counts: number of records in each shard.
        fingerprint: of the features.
        cache: dtype, pool and pca are used.

    Returns:
        The contents of ``layout.json``.

    Raises:
        DataError: no image can be decoded.
        NumericError: the features of the teacher cannot be stored.
    """
    measured = min(MEASURED_VIEWS, max(num_training // 4, min(num_training, MIN_MEASURED_VIEWS)))
    batches = [batch for batch in draw(0, measured) if len(batch)]
    outputs = [runner(batch) for batch in batches]
    if not outputs:
        raise DataError(
            f"{runner.name}: none of the first {measured} views of its images could be decoded; check that the "
            "path of its images contains complete image files"
        )
    features = {tap: concat([output[tap] for output in outputs], batches) for tap in runner.taps}
    _check_finite(runner.name, features, sum(map(len, batches)))
    plain = _reconstruction_fvu(runner.name, Codec(runner.taps, cache.model_copy(update={"pca": None})), features)
    rescaled = {field for field, fvu in plain.items() if cache.dtype == "int8" and fvu > MAX_INT8_FVU}
    transforms: dict[str, ChannelTransform] = {}
    if rescaled or cache.pca:
        first = measured if num_training >= 2 * measured else 0  # not the measured views, if there are enough others
        count = min(PCA_FIT_VIEWS if cache.pca else FIT_VIEWS, num_training - first)
        transforms = _fit_transforms(runner, draw(first, first + count), cache, rescaled)
    codec = Codec(runner.taps, cache, transforms)
    folder.mkdir(parents=True, exist_ok=True)
    data = save_channels(transforms)
    if transforms:
        write_bytes(folder / CHANNELS, data)
    layout = {
        "fingerprint": fingerprint,
        "taps": [[tap, [shape.summary, shape.spatial, *shape.grid]] for tap, shape in runner.taps.items()],
        "record": codec.to_json(),
        "shards": counts,
        "channels": hashlib.sha256(data).hexdigest() if transforms else None,
        "reconstruction_fvu": _reconstruction_fvu(runner.name, codec, features),
        "measured_views": measured,
    }
    write_json(folder / LAYOUT, layout)
    return layout


def _check_finite(teacher: str, features: Mapping[str, Features], views: int) -> None:
    count = next(iter(features.values())).batch_size
    if count < views / 2:
        raise NumericError(
            f"teachers.{teacher}: its features are finite for {count} of the first {views} views only; check its "
            "weights, its input size and train.precision"
        )


def _reconstruction_fvu(teacher: str, codec: Codec, features: dict[str, Features]) -> dict[str, float]:
    try:
        return reconstruction_fvu(codec, features)
    except EncodeError as error:
        raise numeric_error(teacher, error) from error


def _fit_transforms(
    runner: TeacherRunner, batches: Iterator[Batch], cache: Cache, rescaled: set[str]
) -> dict[str, ChannelTransform]:
    """The transforms by name of the field, for the fields that need one."""
    codec = Codec(runner.taps, cache)
    moments: dict[str, Moments] = {}
    for batch in batches:
        if not len(batch):
            continue
        for tap, features in codec.pool(runner(batch)).items():
            for component, x in features.components().items():
                moments.setdefault(f"{tap}/{component}", Moments(x.shape[-1])).update(x)
    transforms = {}
    for field, one in moments.items():
        is_reduced = cache.pca is not None and len(one.mean) > cache.pca
        rescale = field in rescaled or (is_reduced and cache.dtype == "int8")
        transforms[field] = fit_channels(one, cache.pca, rescale)
    return {field: transform for field, transform in transforms.items() if transform}

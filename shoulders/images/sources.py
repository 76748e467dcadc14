"""Opening image sources: by path, or by a function of the user."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from shoulders.config.sections import Images
from shoulders.config.user_code import call_function
from shoulders.errors import DataError, RecipeError
from shoulders.images.folder import Folder, Listing, list_files
from shoulders.images.image_set import ImageSet
from shoulders.images.parquet import Parquet
from shoulders.images.passed_over import PassedOver
from shoulders.images.source import EXTENSIONS, ImageSource, is_image_name
from shoulders.images.tar import TarShards

SOURCE_MEMBERS = ("classes", "labels", "__len__", "name", "read", "label")  # of `ImageSource`


def open_source(path: Path | str, column: str = "image") -> ImageSource:
    """Open a folder of images, a parquet file, a tar file, or a folder of parquet or tar files.

    Args:
        path: the folder or file.
        column: the image column of parquet files.

    Raises:
        RecipeError: ``path`` does not exist, cannot hold images, or holds two kinds of files.
        DataError: no image, or a damaged file.
    """
    path = Path(path)
    if not path.exists():
        raise RecipeError(f"{path}: does not exist; give a folder of images, a .parquet or a .tar file")
    if path.is_dir():
        source = _open_folder(path, column)
    elif path.suffix.lower() == ".parquet":
        source = Parquet([path], [os.fsencode(path.name)], column)
    elif path.suffix.lower() == ".tar":
        source = TarShards([path], [os.fsencode(path.name)])
    else:
        raise RecipeError(f"{path}: not a source of images; give a folder, a .parquet or an uncompressed .tar file")
    if len(source) == 0:
        raise DataError(f"{path}: contains no images; looked for {' '.join(EXTENSIONS)}, .parquet and .tar")
    return source


def call_source(function: str, **settings: Any) -> ImageSource:
    """The source that a function of the user returns.

    Args:
        function: ``package.module:function``.
        **settings: its arguments.

    Raises:
        RecipeError: the function cannot be called, or it does not return an `ImageSource` with images in it.
    """
    try:
        source = call_function(function, **settings)
    except ValueError as error:
        raise RecipeError(f"images.sources: {error}") from error
    missing = [member for member in SOURCE_MEMBERS if not hasattr(source, member)]
    if missing:
        raise RecipeError(
            f"images.sources: {function} must return a shoulders.images.ImageSource; "
            f"this {type(source).__name__} has no {', '.join(missing)}"
        )
    if len(source) == 0:
        raise RecipeError(f"images.sources: {function} returned a source without images; add some")
    first = b""
    with suppress(Exception):  # an image that cannot be read is skipped later, like any other
        first = source.read(0)
    if not isinstance(first, bytes | bytearray | memoryview):
        raise RecipeError(
            f"images.sources: {function}: read(0) returned {type(first).__name__}; return the bytes of an image file"
        )
    labels = source.labels
    if labels is not None and (not isinstance(labels, np.ndarray) or labels.shape != (len(source),)):
        raise RecipeError(
            f"images.sources: {function}: labels is a {type(labels).__name__} of shape {np.shape(labels)}; give None, "
            f"or a numpy array with a number for each of the {len(source)} images, -1 for an image without a label"
        )
    return source


def open_images(settings: Images, seed: int) -> ImageSet:
    """The images of a run, from all of its sources.

    Args:
        settings: ``images:`` of the recipe.
        seed: of the order.

    Raises:
        RecipeError: as `open_source` and `call_source`.
        DataError: as `ImageSet`.
    """
    sources = settings.all_sources()
    opened = {
        name: open_source(source.path, source.column) if source.path else call_source(str(source.module), **source.args)
        for name, source in sources.items()
    }
    return ImageSet(opened, {name: source.share for name, source in sources.items()}, seed, settings.holdout)


def _open_folder(path: Path, column: str) -> ImageSource:
    try:
        listing = list_files(path)
    except OSError as error:
        raise DataError(f"{error.filename!r}: cannot be listed ({error.strerror}); give access to it") from error
    files = sorted(listing.files)
    images = [name for name in files if is_image_name(name)]
    tables = [name for name in files if name.lower().endswith(b".parquet")]
    shards = [name for name in files if name.lower().endswith(b".tar")]
    if (len(images) > 0) + (len(tables) > 0) + (len(shards) > 0) > 1:
        raise RecipeError(
            f"{path}: contains {len(images)} image, {len(tables)} .parquet and {len(shards)} .tar files; "
            "keep one kind in a folder, or list each kind as its own source in images.sources"
        )
    source: ImageSource
    if tables:
        source = Parquet([path / os.fsdecode(name) for name in tables], tables, column)
    elif shards:
        source = TarShards([path / os.fsdecode(name) for name in shards], shards)
    else:
        source = Folder(path, images)
    passed_over = _passed_over(listing, {*images, *tables, *shards}, source.classes if images else None)
    if not len(source):
        looked_for = f"looked for {' '.join(EXTENSIONS)}, .parquet and .tar"
        counts = f"; passed over are {passed_over.describe()}" if passed_over else ""
        raise DataError(f"{path}: contains no images; {looked_for}{counts}")
    if passed_over:
        warnings.warn(
            f"{path}: {len(source)} images are used; passed over are {passed_over.describe()}; convert or "
            "rename what should be used",
            stacklevel=4,
        )
    return source


def _passed_over(listing: Listing, used: set[bytes], classes: list[str] | None) -> PassedOver:
    """What a folder contains beside the files that are used."""
    passed_over = PassedOver()
    for name in listing.files:
        if name not in used:
            passed_over.add(name)
    passed_over.add_named("broken links or pipes", sorted(listing.broken))
    passed_over.add_named("hidden folders of images", sorted(listing.hidden))
    if classes is not None:
        top = {name for name in listing.folders if name and b"/" not in name}
        passed_over.add_named("class folders without images", sorted(top - {os.fsencode(name) for name in classes}))
    return passed_over

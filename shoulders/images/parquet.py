"""Parquet files with an image column, as Hugging Face datasets writes them."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError, RecipeError
from shoulders.images.decode import Undecodable
from shoulders.images.source import check_file_size, label_at
from shoulders.storage.json_text import parse_json

LABEL = "label"  # the column of the classes
TEXT = ("string", "large_string", "string_view")  # types of pyarrow
# the errors of pyarrow are subclasses of these
ERRORS = (OSError, ValueError, NotImplementedError, KeyError, TypeError, IndexError)
BUFFER_BYTES = 2**16  # so that the first rows can be read without all others
FIRST_ROWS = 8
MAX_CACHE_BYTES = 2**28  # 256 MiB of row groups in memory in each process


class Parquet:
    """The rows of one or more parquet files, whose image column holds structs {bytes, path} or plain binary.

    Row groups are read as a whole, and the latest ones stay in memory. Random access is fast with row groups of about
    100 images, or if all files together have less than ``max_cache_bytes``; otherwise tar shards are faster.

    Args:
        paths: of the files.
        names: the name of each file in the names of its images.
        column: the image column.
        max_cache_bytes: of row groups in memory; at least one stays.

    Raises:
        RecipeError: there is no such column, or pyarrow is not installed.
        DataError: a damaged file, or a column that holds paths without bytes.
    """

    def __init__(
        self, paths: list[Path], names: list[bytes], column: str, max_cache_bytes: int = MAX_CACHE_BYTES
    ) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        self.files = [os.fsdecode(name) for name in names]
        self.column, self.max_cache_bytes = column, max_cache_bytes
        self.columns: dict[str, str] = {}  # types of all columns but that of the images
        groups: list[tuple[int, int, int]] = []
        labels: list[NDArray[np.int64] | None] = []
        class_names: list[list[str] | None] = []
        for number, path in enumerate(self.paths):
            group_sizes, label, classes, columns = _inspect(path, column)
            self.columns |= columns
            groups += [(number, group, count) for group, count in enumerate(group_sizes)]
            labels.append(label)
            class_names.append(classes)
        self.groups = np.array(groups, dtype=np.int64).reshape(-1, 3)  # (groups, 3): file, group in it, rows
        self.ends = np.cumsum(self.groups[:, 2])
        self.classes, labels = _merge_classes(class_names, labels)
        known = [label for label in labels if label is not None]
        self.labels = np.concatenate(known) if known and len(known) == len(labels) else None
        self.cache: OrderedDict[int, Any] = OrderedDict()  # columns by row group, the latest last
        self.lock = Lock()  # for several threads that read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": OrderedDict(), "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=Lock())

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def name(self, index: int) -> str:
        """File and row, such as ``train.parquet#12``."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        file = int(self.groups[group, 0])
        first = int(self.groups[self.groups[:, 0] < file, 2].sum())
        return f"{self.files[file]}#{index - first}"

    def read(self, index: int) -> bytes:
        """The encoded image."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        with self.lock:
            column = self._column(group)
        cell = column[index - int(self.ends[group] - self.groups[group, 2])].as_py()
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise Undecodable("no bytes in this row")
        check_file_size(len(data))
        return data

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        return label_at(self.labels, index)

    def why_unlabelled(self) -> str:
        """Why the files have no labels, for an error; nothing where some rows have one."""
        if self.labels is not None:
            return ""
        if LABEL in self.columns:
            kind = self.columns[LABEL]
            return f", because the column {LABEL} ({kind}) does not hold integers or strings of the same classes"
        others = ", ".join(self.columns) or "none"
        return (
            f", because no column is called {LABEL} (columns beside the images: {others}; rename that of the classes)"
        )

    def _column(self, group: int) -> Any:
        """The image column of one row group."""
        if group in self.cache:
            self.cache.move_to_end(group)
            return self.cache[group]
        file, inside, _ = self.groups[group].tolist()
        # without threads: forked workers read in parallel already
        with _pyarrow().ParquetFile(self.paths[file]) as opened:
            leaf = _leaf(opened.schema_arrow, self.column)
            column = opened.read_row_group(inside, columns=[leaf], use_threads=False).column(0)
        self.cache[group] = column
        while len(self.cache) > 1 and sum(one.nbytes for one in self.cache.values()) > self.max_cache_bytes:
            self.cache.popitem(last=False)
        return column


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RecipeError('parquet files need pyarrow: pip install "shoulders[data]"') from error
    return pyarrow.parquet


def _inspect(path: str, column: str) -> tuple[list[int], NDArray[np.int64] | None, list[str] | None, dict[str, str]]:
    """Number of rows of each row group, labels, class names, and types of the other columns of one file."""
    parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as opened:
            schema = opened.schema_arrow
            if column not in schema.names:
                raise RecipeError(f"{path}: no column {column!r}; set column to one of {schema.names}")
            leaf = _leaf(schema, column)
            group_sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            if sum(group_sizes) > os.path.getsize(path):
                raise ValueError(f"it claims to hold {sum(group_sizes)} rows, more than it has bytes")
            _check_embedded(path, opened, leaf)
            columns = {field.name: str(field.type) for field in schema if field.name != column}
            return group_sizes, *_labels(opened), columns
    except ERRORS as error:
        fault = " ".join(str(error).split())
        raise DataError(f"{path}: not a complete parquet file ({fault}); fetch or write it again") from error


def _leaf(schema: Any, column: str) -> str:
    """Path of the encoded images in the schema: the column or a field of its structs."""
    kind = schema.field(column).type
    if str(kind) in ("binary", "large_binary", "binary_view"):
        return column
    if str(kind).startswith("struct<") and kind.get_field_index("bytes") >= 0:
        return f"{column}.bytes"
    raise RecipeError(f"column {column!r} holds {kind}, an image column binary or a struct with bytes; set column")


def _check_embedded(path: str, opened: Any, leaf: str) -> None:
    """Refuse a file without images: ``Dataset.to_parquet`` of an image folder writes paths without bytes.

    The first rows are read, not the statistics of the column: where these are damaged, pyarrow ends the process.
    """
    if opened.metadata.num_rows == 0:
        return
    batches = opened.iter_batches(FIRST_ROWS, row_groups=[0], columns=[leaf], use_threads=False)
    cells = (cell for batch in batches for cell in batch.column(0).to_pylist())
    if all((cell["bytes"] if isinstance(cell, dict) else cell) is None for cell in cells):
        raise DataError(
            f"{path}: {leaf} is empty, the images were not embedded; write the file again after "
            'ds.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)'
        )


def _labels(opened: Any) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    """Labels and class names: integers with the names of the schema, or strings, whose sorted values are the names."""
    schema = opened.schema_arrow
    kind = str(schema.field(LABEL).type) if LABEL in schema.names else ""
    if kind.removeprefix("u").startswith("int"):
        column = opened.read(columns=[LABEL], use_threads=False).column(0)
        return column.cast("int64").fill_null(-1).to_numpy(), _class_names(schema.metadata)
    if kind.startswith(TEXT) or kind.startswith("dictionary<values=string"):
        values = opened.read(columns=[LABEL], use_threads=False).column(0).cast("string").to_pylist()
        classes = sorted({value for value in values if value is not None})
        number = {value: index for index, value in enumerate(classes)} | {None: -1}
        return np.array([number[value] for value in values], dtype=np.int64), classes
    return None, None


def _merge_classes(
    class_names: list[list[str] | None], labels: list[NDArray[np.int64] | None]
) -> tuple[list[str] | None, list[NDArray[np.int64] | None]]:
    """Class names of all files, and the labels of each file as indices into them; files may number them differently."""
    lists = [names for names in class_names if names]
    if all(names == lists[0] for names in lists):
        return lists[0] if lists else None, labels
    classes = list(dict.fromkeys(name for names in lists for name in names))
    number = {name: index for index, name in enumerate(classes)}

    def renumber(label: NDArray[np.int64] | None, names: list[str] | None) -> NDArray[np.int64] | None:
        if label is None or not names or label.max(initial=-1) >= len(names):
            return None  # these numbers have no known meaning
        return np.array([*(number[name] for name in names), -1])[label]  # label -1, none, is the last entry

    return classes, [renumber(*pair) for pair in zip(labels, class_names, strict=True)]


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """Names of the ``label`` column in the Hugging Face schema metadata."""
    try:
        names = parse_json((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]

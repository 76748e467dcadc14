"""Parquet files with an image column, as Hugging Face datasets writes them."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError, RecipeError
from shoulders.images.decode import Undecodable
from shoulders.images.source import label_at

_KEEP_BYTES = 2**28  # 256 MiB of row groups stay in memory in each process


class Parquet:
    """Rows of one or more parquet files; the column holds {bytes, path} or plain binary.

    A row group is read as a whole, and the last ones are kept: files with small row groups (about 100
    images), or of less than 256 MiB altogether, are read fast in any order; else prefer tar shards.

    Args:
        paths: where the files are.
        names: what each is called in the names of its images.
        column: the image column.

    Raises:
        RecipeError: no such column, or pyarrow is not installed.
        DataError: a damaged file, or a column that holds paths alone.
    """

    def __init__(self, paths: list[Path], names: list[bytes], column: str) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        self.files = [os.fsdecode(name) for name in names]
        self.column = column
        groups: list[tuple[int, int, int]] = []
        labels: list[NDArray[np.int64] | None] = []
        named: list[list[str] | None] = []
        for number, path in enumerate(self.paths):
            rows, label, classes = _inspect(path, column)
            groups += [(number, group, count) for group, count in enumerate(rows)]
            labels.append(label)
            named.append(classes)
        self.groups = np.array(groups, dtype=np.int64).reshape(-1, 3)  # (groups, 3): file, group in it, rows
        self.ends = np.cumsum(self.groups[:, 2])
        self.classes, labels = _one_numbering(named, labels)
        known = [label for label in labels if label is not None]
        self.labels = np.concatenate(known) if known and len(known) == len(labels) else None
        self.kept: OrderedDict[int, Any] = OrderedDict()
        self.lock = Lock()  # several threads may read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": OrderedDict(), "lock": None}

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
        """The image in one row."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        with self.lock:
            rows = self._rows(group)
        cell = rows[index - int(self.ends[group] - self.groups[group, 2])].as_py()
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise Undecodable("no bytes in this row")
        return data

    def label(self, index: int) -> int | None:
        """Class index of an image, or None."""
        return label_at(self.labels, index)

    def _rows(self, group: int) -> Any:
        """The image column of one row group."""
        if group in self.kept:
            self.kept.move_to_end(group)
            return self.kept[group]
        file, inside, _ = self.groups[group].tolist()
        # no threads: this runs in forked workers, and they are the parallelism
        with _pyarrow().ParquetFile(self.paths[file]) as opened:
            leaf = _leaf(opened.schema_arrow, self.column)
            rows = opened.read_row_group(inside, columns=[leaf], use_threads=False).column(0)
        self.kept[group] = rows
        while len(self.kept) > 1 and sum(kept.nbytes for kept in self.kept.values()) > _KEEP_BYTES:
            self.kept.popitem(last=False)
        return rows


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RecipeError('parquet files need pyarrow: pip install "shoulders[data]"') from error
    return pyarrow.parquet


def _inspect(path: str, column: str) -> tuple[list[int], NDArray[np.int64] | None, list[str] | None]:
    """Rows of each row group, labels and class names of one file."""
    parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as opened:
            schema = opened.schema_arrow
            if column not in schema.names:
                raise RecipeError(f"{path}: no column {column!r}; set column to one of {schema.names}")
            leaf = _leaf(schema, column)
            rows = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            _refuse_paths_alone(path, opened.metadata, leaf)
            return rows, _labels(opened), _class_names(schema.metadata)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        fault = " ".join(str(error).split())
        raise DataError(f"{path}: not a whole parquet file ({fault}); fetch or write it again") from error


def _leaf(schema: Any, column: str) -> str:
    """The part of the column that holds the encoded images."""
    kind = schema.field(column).type
    if str(kind) in ("binary", "large_binary", "binary_view"):
        return column
    if str(kind).startswith("struct<") and kind.get_field_index("bytes") >= 0:
        return f"{column}.bytes"
    raise RecipeError(f"column {column!r} holds {kind}, an image column binary or a struct with bytes; set column")


def _refuse_paths_alone(path: str, metadata: Any, leaf: str) -> None:
    """``Dataset.to_parquet`` on a folder of images writes their paths and leaves the bytes empty."""
    for group in range(metadata.num_row_groups):
        parts = metadata.row_group(group)
        for part in (parts.column(number) for number in range(parts.num_columns)):
            if part.path_in_schema != leaf or part.statistics is None or not part.statistics.has_null_count:
                continue
            if part.statistics.null_count == parts.num_rows > 0:
                raise DataError(
                    f"{path}: {leaf} is empty, the images were not embedded; write the file again after "
                    'ds.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)'
                )


def _labels(opened: Any) -> NDArray[np.int64] | None:
    schema = opened.schema_arrow
    if "label" not in schema.names or not str(schema.field("label").type).removeprefix("u").startswith("int"):
        return None
    column = opened.read(columns=["label"], use_threads=False).column(0)
    return column.cast("int64").fill_null(-1).to_numpy()


def _one_numbering(
    named: list[list[str] | None], labels: list[NDArray[np.int64] | None]
) -> tuple[list[str] | None, list[NDArray[np.int64] | None]]:
    """The names of the classes of all files, and labels by them; files may number the same names differently."""
    lists = [names for names in named if names]
    if all(names == lists[0] for names in lists):
        return lists[0] if lists else None, labels
    classes = list(dict.fromkeys(name for names in lists for name in names))
    number = {name: at for at, name in enumerate(classes)}

    def renumbered(label: NDArray[np.int64] | None, names: list[str] | None) -> NDArray[np.int64] | None:
        if label is None or not names or label.max(initial=-1) >= len(names):
            return None  # what its numbers mean is not known
        return np.array([*(number[name] for name in names), -1])[label]  # -1: none, the last

    return classes, [renumbered(*pair) for pair in zip(labels, named, strict=True)]


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """Names of the ``label`` column in the Hugging Face schema metadata."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]

"""Tar and parquet files of strangers: nothing is written or read outside, and every fault is one line."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from shoulders.errors import DataError, RecipeError, ShouldersError, printable
from shoulders.images import Collection, open_source
from shoulders.images.source import MAX_FILE_BYTES
from shoulders.prediction import picture_stems

NAMES = [
    "/etc/passwd.jpg",
    "../../up.jpg",
    "a\x00b.jpg",
    "new\nline.jpg",
    "\x1b[31mred.jpg",
    "C:\\windows.jpg",
    f"{'x' * 300}.jpg",
    "‮gpj.exe.jpg",
]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, "/etc/passwd"
    member.pax_headers = {"path": name} if "\x00" in name else {}
    tar.addfile(member, io.BytesIO(data))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_members_are_read_in_place_whatever_they_are_called(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(NAMES):
            add(tar, name, jpeg(number))
    before = snapshot(tmp_path)
    source = open_source(path)
    names = [source.name(index) for index in range(len(source))]
    assert names == [f"a.tar/{name}" for name in NAMES]
    assert [source.read(index) for index in range(len(source))] == [jpeg(number) for number in range(len(NAMES))]
    assert snapshot(tmp_path) == before
    stems = picture_stems(names).values()
    assert len(set(stems)) == len(NAMES)
    for stem in stems:
        assert not set(stem) & {"/", "\\", "\0", "\n", "\x1b"} and len(os.fsencode(stem)) < 200
    assert not set(printable("".join(names))) & {"\0", "\n", "\x1b", "‮"}


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_devices_and_sparse_members_are_no_images(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.jpg", kind=kind)
        add(tar, "1.cls", kind=kind)
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=r"contains no images|not a complete, uncompressed tar file"):
        open_source(tmp_path / "a.tar")
    assert snapshot(tmp_path) == before


def test_two_members_of_one_name_are_refused(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            add(tar, "same.jpg", jpeg(number))
    with pytest.raises(ShouldersError, match=r"same\.jpg"):
        Collection({"a": open_source(tmp_path / "a.tar")})


def test_compressed_tar_files_are_not_unpacked(tmp_path: Path) -> None:
    """10 MB of zeros, for instance, which compress to 10 kB."""
    bomb = gzip.compress(bytes(10_000_000))
    for name in ("a.tar", "a.tar.gz", "a.tgz", "a.zip"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises((DataError, RecipeError), match=r"not a complete, uncompressed tar|not a source of images"):
            open_source(tmp_path / name)


@pytest.mark.parametrize("size", [MAX_FILE_BYTES + 1, 10**12, 2**63])
def test_sizes_that_a_header_claims_are_not_believed(tmp_path: Path, size: int) -> None:
    member = tarfile.TarInfo("huge.jpg")
    member.size = size
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match=r"a\.tar: not a complete, uncompressed tar file"):
        open_source(tmp_path / "a.tar")


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("huge.jpg")
    member.size = MAX_FILE_BYTES + 512
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(member.tobuf())
        file.truncate(512 + member.size + 1024)  # a hole, which takes no space
    source = open_source(tmp_path / "a.tar")
    with pytest.raises(DataError, match="file too large: 536871424 bytes, at most 536870912"):
        source.read(0)


def test_many_members_take_little_memory(tmp_path: Path) -> None:
    """A few hundred bytes each, so that a million fit into any memory."""
    count = 3_000
    (tmp_path / "a.tar").write_bytes(count * tarfile.TarInfo("same.jpg").tobuf() + bytes(1024))
    tracemalloc.start()
    source = open_source(tmp_path / "a.tar")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count and peak < 1000 * count


# in another process, which pyarrow would end where it is asked for the statistics of a damaged column
MUTATIONS = """
import random, sys
from pathlib import Path
import pyarrow, pyarrow.parquet
from shoulders.errors import ShouldersError
from shoulders.images import open_source
from tests.images.conftest import make_jpeg

path, dice = Path(sys.argv[1]), random.Random(0)
cells = [{"bytes": make_jpeg(number), "path": "../x"} for number in range(6)]
pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": list(range(6))}), path, row_group_size=3)
valid, opened, refused = path.read_bytes(), 0, 0
for position in range(1, 700, 2):  # the schema and the sizes are at the end
    data = bytearray(valid)
    data[-position] ^= dice.randrange(1, 256)
    path.write_bytes(data[: -dice.randrange(len(data))] if position % 7 == 0 else data)
    try:
        open_source(path)
        opened += 1
    except ShouldersError as error:
        assert "\\n" not in str(error)
        refused += 1
print(opened, refused)
"""


def test_parquet_files_with_any_wrong_byte_are_read_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    command = [sys.executable, "-W", "ignore", "-c", MUTATIONS, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    opened, refused = map(int, done.stdout.split())
    assert opened + refused == 350 and min(opened, refused) > 50


def test_a_parquet_file_that_claims_more_rows_than_bytes_is_refused(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": [b""] * 100_000}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"it claims to hold 100000 rows, more than it has bytes"):
        open_source(tmp_path / "a.parquet")

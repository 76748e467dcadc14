"""A folder, a parquet file and tar shards of the same files give the same images."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shoulders.errors import DataError, RecipeError
from shoulders.images import call_source, open_source
from shoulders.images.decode import READS_AVIF, Undecodable, decode
from shoulders.images.parquet import Parquet
from shoulders.images.source import ImageSource, NameList, image_id

WriteTar = Callable[[Path, dict[str, bytes]], None]


@pytest.fixture
def files(jpeg: Callable[..., bytes]) -> dict[str, bytes]:
    return {f"{kind}/{number}.jpg": jpeg(number) for number, kind in enumerate(["cat", "cat", "ant", "dog", "ant"])}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_parquet(path: Path, files: dict[str, bytes], binary: bool = False, classes: tuple[str, ...] = ()) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = list(files.values()) if binary else [{"bytes": data, "path": name} for name, data in files.items()]
    kind = pa.binary() if binary else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array(images, kind)}
    if classes:
        columns["label"] = pa.array([classes.index(name.partition("/")[0]) for name in files])
    table = pa.table(columns)
    features = {"info": {"features": {"label": {"names": list(classes), "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=2)
    return path


def contents(source: ImageSource) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


def names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def labels(source: ImageSource) -> list[int | None]:
    return [source.label(index) for index in range(len(source))]


def test_folder(tmp_path: Path, files: dict[str, bytes]) -> None:
    root = write_folder(tmp_path / "photos", files | {"cat/notes.txt": b"", "cat/._0.jpg": b"", ".trash/x.jpg": b""})
    with pytest.warns(
        UserWarning, match=r"5 images are used; passed over are hidden folders of images: 1 \('\.trash'\)"
    ):
        source = open_source(root)
    assert names(source) == ["ant/2.jpg", "ant/4.jpg", "cat/0.jpg", "cat/1.jpg", "dog/3.jpg"]
    assert contents(source) == [files[name] for name in names(source)]
    assert source.classes == ["ant", "cat", "dog"]
    assert labels(source) == [0, 0, 1, 1, 2]


def test_names_and_order_do_not_depend_on_where_the_folder_lies(tmp_path: Path, files: dict[str, bytes]) -> None:
    one = open_source(write_folder(tmp_path / "a", files))
    other = open_source(write_folder(tmp_path / "b" / "c", dict(reversed(files.items()))))
    assert names(one) == names(other) and contents(one) == contents(other)


@pytest.mark.parametrize("extra", ["top.jpg", "cat/deep/5.jpg"])
def test_classes_need_exactly_one_level(tmp_path: Path, files: dict[str, bytes], extra: str) -> None:
    source = open_source(write_folder(tmp_path / "photos", files | {extra: b"x"}))
    assert source.classes is None and source.labels is None and labels(source) == [None] * 6


def test_links_are_followed_and_loops_are_not(tmp_path: Path, files: dict[str, bytes]) -> None:
    root = write_folder(tmp_path / "photos", files)
    outside = write_folder(tmp_path / "outside", {"9.jpg": b"nine"})
    (root / "linked").symlink_to(outside)
    (root / "cat" / "loop").symlink_to(root)
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "cat" / "pipe.jpg")
    with pytest.warns(UserWarning, match=r"broken links or pipes: 2 \('cat/gone\.jpg', 'cat/pipe\.jpg'\)"):
        assert names(open_source(root)) == sorted([*files, "linked/9.jpg"])


def test_a_folder_that_is_linked_to_as_well_keeps_its_name(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", {"aa/1.jpg": b"one", "bb/cc/2.jpg": b"two"})
    (root / "zz").symlink_to(root / "aa")
    (root / "a").symlink_to(root / "bb" / "cc")
    assert names(open_source(root)) == ["aa/1.jpg", "bb/cc/2.jpg"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    with open(os.fsencode(root) + b"/\xff\n.jpg", "wb") as file:
        file.write(b"x")
    source = open_source(root)
    assert source.read(0) == b"x"
    assert image_id("a", source.name(0)) == image_id("a", "\udcff\n.jpg")


@pytest.mark.parametrize("binary", [False, True])
def test_parquet(tmp_path: Path, files: dict[str, bytes], binary: bool) -> None:
    classes = ("dog", "cat", "ant")
    source = open_source(write_parquet(tmp_path / "train.parquet", files, binary, classes))
    assert contents(source) == list(files.values())
    assert names(source) == [f"train.parquet#{row}" for row in range(5)]
    assert source.classes == list(classes)
    assert labels(source) == [1, 1, 2, 0, 2]


def test_folder_of_parquet_files(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "data").mkdir()
    for part in "ab":
        write_parquet(tmp_path / "data" / f"{part}.parquet", files)
    source = open_source(tmp_path)
    assert names(source)[4:6] == ["data/a.parquet#4", "data/b.parquet#0"]
    assert contents(source) == 2 * list(files.values())
    order = np.random.default_rng(0).permutation(10)
    assert [source.read(index) for index in order] == [list(files.values())[index % 5] for index in order]


def test_several_threads_can_read_one_parquet_file(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [b"%03d" % number * 50 for number in range(120)]
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "x.parquet", row_group_size=3)
    opened = Parquet([tmp_path / "x.parquet"], [b"x.parquet"], "image", max_cache_bytes=1000)  # a few row groups
    source = pickle.loads(pickle.dumps(opened))  # noqa: S301  (as for workers)
    indices = np.random.default_rng(0).integers(0, len(cells), 3000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, indices)) == [cells[number] for number in indices]


def test_tar_shards(tmp_path: Path, files: dict[str, bytes], tar: WriteTar) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    members: dict[str, bytes] = {}
    for number, data in enumerate(files.values()):
        members |= {f"./{number:03}.jpg": data, f"./{number:03}.txt": b"a caption"}
    members |= {"000.cls": b"4", "./000.cls": b"4", "./001.json": b'{"label": 2}', "./002.cls": b"what"}
    tar(shards / "a.tar", members)
    tar(shards / "b.tar", {"x.jpg": files["cat/0.jpg"]})
    with pytest.warns(UserWarning, match=r"shards: labels that are no class numbers: 1 \('002\.cls'\); their images"):
        source = open_source(shards)
    assert names(source) == [f"a.tar/{number:03}.jpg" for number in range(5)] + ["b.tar/x.jpg"]
    assert contents(source) == [*files.values(), files["cat/0.jpg"]]
    assert labels(source) == [4, 2, None, None, None, None]
    with pytest.warns(UserWarning, match="no class numbers"):
        assert contents(open_source(shards / "a.tar")) == list(files.values())


def test_only_regular_members_are_images(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = tmp_path / "hostile.tar"
    others = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
    with tarfile.open(path, "w") as tar:
        for number, kind in enumerate(others):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        member = tarfile.TarInfo("../../escape.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.warns(UserWarning, match=r"passed over are links or devices: 4 \('0\.jpg', '1\.jpg', '2\.jpg', \.\.\)"):
        source = open_source(path)
    assert names(source) == ["hostile.tar/../../escape.jpg"] and contents(source) == [b"abc"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hostile.tar"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"clip_0.0.png": b"", "clip_0.0.cls": b"0", "clip_0.1.png": b"", "clip_0.1.cls": b"1"},
            "the sample 'clip_0' has two labels, 0 in 'clip_0.0.cls' and 1 in 'clip_0.1.cls'",
        ),
        (
            {"x.left.png": b"", "x.right.png": b"", "x.cls": b"4"},
            "the sample 'x' has two images, 'x.left.png' and 'x.right.png', and the label in 'x.cls'",
        ),
        ({"x.png": b"", "x.cls": b"4", "x.json": b'{"label": 7}'}, "two labels, 4 in 'x.cls' and 7 in 'x.json'"),
        ({"x.png": b"", "x.cls": b"1", "y.png": b"", "x.jpg": b"", "./x.cls": b"1"}, "'x.png' and 'x.jpg'"),
    ],
)
def test_samples_that_share_a_key_are_refused(
    tmp_path: Path, tar: WriteTar, members: dict[str, bytes], message: str
) -> None:
    tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=re.escape(message) + r".*up to the first dot"):
        open_source(tmp_path / "a.tar")


def test_images_without_labels_may_share_a_key(tmp_path: Path, tar: WriteTar) -> None:
    tar(
        tmp_path / "a.tar",
        {"x.left.png": b"", "x.right.png": b"", "x.json": b'{"caption": 1}', "y.png": b"", "y.cls": b"3"},
    )
    assert labels(open_source(tmp_path / "a.tar")) == [None, None, 3]


def test_equal_labels_and_upper_case_and_whole_numbers_are_read(tmp_path: Path, tar: WriteTar) -> None:
    members = {"x.PNG": b"", "x.CLS": b"1\n", "x.json": b'{"label": 1}', "y.png": b"", "y.json": b'{"label": 2.0}'}
    tar(tmp_path / "a.tar", members)
    assert labels(open_source(tmp_path / "a.tar")) == [1, 2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("z.cls", b"cat"),
        ("z.cls", b"-1"),
        ("z.cls", b"1_0"),
        ("z.json", b'{"label": true}'),
        ("z.json", b'{"label": 1e999}'),
        ("z.json", b"[" * 60_000),
        ("z.cls", b"1" * 70_000),
    ],
)
def test_labels_that_are_no_class_numbers_are_counted(tmp_path: Path, tar: WriteTar, name: str, text: bytes) -> None:
    tar(tmp_path / "a.tar", {"x.png": b"", "x.cls": b"1", "z.png": b"", name: text})
    with pytest.warns(UserWarning, match=rf"labels that are no class numbers: 1 \('{name}'\); their images have no"):
        assert labels(open_source(tmp_path / "a.tar")) == [1, None]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGLINK])
def test_thousands_of_chained_headers_are_refused(tmp_path: Path, kind: bytes) -> None:
    content = b"12 path=aaa\n" if kind == tarfile.XHDTYPE else b"name\0"
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, len(content)
    part = header.tobuf(tarfile.GNU_FORMAT) + content.ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(5000 * part + tarfile.TarInfo("a.jpg").tobuf() + bytes(1024))
    with pytest.raises(DataError, match=r"a\.tar: not a complete, uncompressed tar file \(too many chained headers\)"):
        open_source(tmp_path / "a.tar")


MIXED = {
    **{f"dog/h{number}.heic": b"" for number in range(4)},
    "dog/photo": b"",
    "cat/x.jpg_large": b"",
    "cat/notes.txt": b"",
    "cat/x.jpg.tmp": b"",
}


def test_files_that_are_passed_over_are_counted_by_extension(
    tmp_path: Path, files: dict[str, bytes], tar: WriteTar
) -> None:
    root = write_folder(tmp_path / "photos", files | MIXED | {".fox/1.jpg": b"", "__MACOSX/1.jpg": b""})
    (root / "cow").mkdir()
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="5 images are used") as caught:
        assert names(open_source(root)) == sorted(files)
    assert str(caught[0].message).removeprefix(f"{root}: 5 images are used; passed over are ") == (
        ".heic: 4 ('dog/h0.heic', 'dog/h1.heic', 'dog/h2.heic', ..), hidden folders of images: 2 ('.fox', '__MACOSX'), "
        ".jpg_large: 1 ('cat/x.jpg_large'), .tmp: 1 ('cat/x.jpg.tmp'), broken links or pipes: 1 ('cat/gone.jpg'), "
        "class folders without images: 1 ('cow'), without an extension: 1 ('dog/photo'); convert or rename what "
        "should be used"
    )
    tar(tmp_path / "a.tar", files | MIXED)
    with pytest.warns(UserWarning, match=r"a\.tar: 5 images are used; passed over are \.heic: 4 .*\.tmp: 1") as caught:
        open_source(tmp_path / "a.tar")
    assert len(caught) == 1


def test_a_folder_of_files_that_cannot_be_read_is_refused_with_their_counts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains no images; looked for .*; passed over are \.heic: 4"):
        open_source(write_folder(tmp_path / "photos", MIXED))


@pytest.mark.skipif(not READS_AVIF, reason="needs Pillow with AVIF")
def test_avif_and_upper_case_extensions_are_read(tmp_path: Path, tar: WriteTar) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 10, 10)).save(file, "AVIF")
    files = {"1.avif": file.getvalue(), "2.AVIF": file.getvalue(), "3.JPEG": b"x"}
    tar(tmp_path / "a.tar", files)
    for source in (open_source(write_folder(tmp_path / "photos", files)), open_source(tmp_path / "a.tar")):
        assert len(source) == 3
        red = decode(source.read(0), 1000)[:, 3, 4].float()
        assert (red - red.new_tensor([200, 10, 10])).abs().max() < 10


@pytest.mark.parametrize("fault", ["cut", "header", "compressed", "claims a terabyte", "two"])
def test_damaged_tar_files_are_refused(tmp_path: Path, files: dict[str, bytes], tar: WriteTar, fault: str) -> None:
    path = tmp_path / "a.tar"
    tar(path, {name.replace("/", "_"): data for name, data in files.items()})
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as opened:
        third = opened.getmembers()[2]
    if fault == "cut":
        data = data[: third.offset_data + 10]
    if fault == "header":
        data[third.offset + 10] ^= 255
    if fault == "compressed":
        data = bytearray(b"\x1f\x8b\x08" + bytes(data))
    if fault == "claims a terabyte":
        huge = tarfile.TarInfo("huge.jpg")
        huge.size = 10**12
        data = bytearray(huge.tobuf()) + data
    if fault == "two":
        data = data * 2
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar: not a complete, uncompressed tar"):
        open_source(path)


def test_folder_parquet_and_tar_give_the_same_images(tmp_path: Path, files: dict[str, bytes], tar: WriteTar) -> None:
    ordered = dict(sorted(files.items()))
    tar(tmp_path / "x.tar", {name.replace("/", "_"): data for name, data in ordered.items()})
    paths = [
        write_folder(tmp_path / "photos", files),
        write_parquet(tmp_path / "x.parquet", ordered),
        tmp_path / "x.tar",
    ]
    for path in paths:
        source = open_source(path)
        assert contents(pickle.loads(pickle.dumps(source))) == contents(source) == list(ordered.values())  # noqa: S301


def test_errors_of_open_source_name_the_fix(tmp_path: Path, files: dict[str, bytes], tar: WriteTar) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.jpg").write_bytes(b"x")
    mixed = write_folder(tmp_path / "mixed", files)
    tar(mixed / "a.tar", {"a.jpg": b""})
    for path, error, message in [
        (tmp_path / "nowhere", RecipeError, "nowhere: does not exist; give a folder"),
        (tmp_path / "empty", DataError, "contains no images; looked for .jpg"),
        (tmp_path / "photo.jpg", RecipeError, "give a folder"),
        (mixed, RecipeError, "5 image, 0 .parquet and 1 .tar files; keep one kind"),
    ]:
        with pytest.raises(error, match=message):
            open_source(path)


def test_nested_metadata_of_a_parquet_file_is_no_list_of_names(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [b"x", b"y"], "label": [1, 0]})
    nested = 200_000 * b"[" + 200_000 * b"]"
    parquet.write_table(table.replace_schema_metadata({b"huggingface": nested}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.classes is None and labels(source) == [1, 0]


@pytest.mark.parametrize("kind", ["uint8", "uint64", "list"])
def test_labels_are_read_if_they_are_integers(kind: str, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = pyarrow.array([[1], [2]]) if kind == "list" else pyarrow.array([1, None], kind)
    parquet.write_table(pyarrow.table({"image": [b"x", b"y"], "label": labels}), tmp_path / "x.parquet")
    read = open_source(tmp_path / "x.parquet").labels
    assert read is None if kind == "list" else read is not None and read.tolist() == [1, -1]


def test_errors_of_parquet_files_name_the_fix(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = write_parquet(tmp_path / "a.parquet", files)
    with pytest.raises(RecipeError, match=r"no column 'photo'; set column to one of \['image'\]"):
        open_source(path, "photo")
    labelled = write_parquet(tmp_path / "l.parquet", files, classes=("ant", "cat", "dog"))
    with pytest.raises(RecipeError, match="holds int64"):
        open_source(labelled, "label")
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="not a complete parquet file"):
        open_source(tmp_path / "cut.parquet")
    write_parquet(tmp_path / "paths.parquet", dict.fromkeys(files))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="images were not embedded"):
        open_source(tmp_path / "paths.parquet")
    some = write_parquet(tmp_path / "some.parquet", {"a": b"x", "b": None})  # type: ignore[dict-item]
    with pytest.raises(Undecodable, match="no bytes"):
        open_source(some).read(1)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from shoulders.images import open_source\n"
        f"open_source({str(tmp_path / 'a.parquet')!r})"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert 'pip install "shoulders[data]"' in result.stderr


def test_image_ids_are_pinned() -> None:
    assert image_id("images", "cat/0.jpg") == 484744756830294009
    assert 0 <= image_id("a", "b") < 2**63
    assert image_id("a", "b") != image_id("ab", "") != image_id("", "ab")


def test_a_million_names_need_little_memory() -> None:
    many = NameList([b"folder/%07d.jpg" % number for number in range(1_000_000)])
    assert many[0] == b"folder/0000000.jpg" and many[999_999] == b"folder/0999999.jpg"
    assert len(pickle.dumps(many)) < 28e6


class UserSource:
    """A source of the user with one fault."""

    classes = None

    def __init__(self, read: Any = b"x", labels: Any = None) -> None:
        self.first, self.labels = read, labels

    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Any:
        return self.first

    def label(self, index: int) -> None:
        return None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"read": np.zeros((4, 4, 3))},
            r"test_sources:UserSource: read\(0\) returned ndarray; return the bytes of an image file",
        ),
        ({"read": "1.jpg"}, r"read\(0\) returned str"),
        (
            {"labels": [0, 1, 2]},
            r"labels is a list of shape \(3,\); give None, or a numpy array with a number for each of the 3",
        ),
        ({"labels": 7}, r"labels is a int of shape \(\)"),
        ({"labels": np.zeros(2)}, r"labels is a ndarray of shape \(2,\)"),
    ],
)
def test_sources_of_the_user_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        call_source("tests.images.test_sources:UserSource", **wrong)
    assert len(call_source("tests.images.test_sources:UserSource", labels=np.arange(3))) == 3

"""Labelled splits are found in the layouts that users have; what cannot be used is refused with the fix."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from shoulders.errors import DataError, RecipeError
from shoulders.images import open_source
from shoulders.tasks.data.labelled import LabelledSplit, find_labelled


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def write_classes(folder: Path, classes: list[str], count: int) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.png").write_bytes(png(index))


def write_parquet(file: Path, labels: list[int]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": png(index), "path": None} for index in range(len(labels))]
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"image": images, "label": labels}), file)


def write_tar(file: Path, labels: list[int]) -> None:
    with tarfile.open(file, "w") as tar:
        for index, label in enumerate(labels):
            for suffix, content in ((".png", png(index)), (".cls", str(label).encode())):
                member = tarfile.TarInfo(f"{index:04d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def names(split: LabelledSplit) -> set[str]:
    return {split.images.name(index) for index in split.indices.tolist()}


def counts(*splits: LabelledSplit) -> tuple[int, ...]:
    return tuple(len(split.indices) for split in splits)


def test_folders_of_class_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        write_classes(tmp_path / split, ["cat", "dog"], count)
    splits = find_labelled(tmp_path)
    assert splits.val is not None
    assert counts(splits.train, splits.val, splits.test) == (6, 2, 4)
    assert splits.train.images.classes == ["cat", "dog"]
    assert (splits.n_classes, splits.how) == (2, "train, val, test as given")


def test_parquet_files_with_val_but_without_test(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1, 2, 0])
    write_parquet(tmp_path / "val.parquet", [2, 0])
    splits = find_labelled(tmp_path)
    assert splits.val is None
    assert splits.test.labels().tolist() == [2, 0]
    assert (*counts(splits.train), splits.n_classes, splits.how) == (4, 3, "train, val as given")


def test_tar_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [0, 1, 1])
    write_tar(tmp_path / "test.tar", [1, 0])
    splits = find_labelled(tmp_path)
    assert (*counts(splits.train, splits.test), splits.n_classes) == (3, 2, 2)


def test_a_split_may_lack_classes_that_train_has(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", ["cat", "dog", "fox"], 2)
    write_classes(tmp_path / "val", ["cat"], 1)
    write_classes(tmp_path / "test", ["dog", "fox"], 1)
    splits = find_labelled(tmp_path)
    assert splits.val is not None and splits.val.labels().tolist() == [0]
    assert splits.test.labels().tolist() == [1, 2]
    assert splits.test.images.classes == ["cat", "dog", "fox"] and splits.n_classes == 3


def test_only_the_split_to_evaluate_on_counts_where_nothing_is_fitted(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", ["cat"], 1)  # fewer classes than test
    write_classes(tmp_path / "test", ["cat", "dog"], 1)
    splits = find_labelled(tmp_path, fit=False)
    assert counts(splits.train, splits.test) == (0, 2) and splits.classes == ("cat", "dog")
    assert splits.how == "test as given"
    with pytest.raises(DataError, match="train and test differ in their classes"):
        find_labelled(tmp_path)
    all_images = find_labelled(tmp_path / "test", fit=False)  # one image per class
    assert (counts(all_images.test), all_images.how) == ((2,), "all images")


@pytest.mark.parametrize(
    "files",
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("plain_text/train.parquet", "plain_text/test.parquet"),
        ("imagenet1k-train-0000.parquet", "imagenet1k-validation-0000.parquet"),
    ],
)
def test_splits_in_files_below_other_folders_are_not_mixed(files: tuple[str, str], tmp_path: Path) -> None:
    for file in files:
        write_parquet(tmp_path / file, [0, 1] * 10)
    with pytest.raises(RecipeError, match="look like splits"):
        find_labelled(tmp_path)


@pytest.mark.parametrize("name", ["valid", "validation", "dev"])
def test_val_with_another_name_is_refused(name: str, tmp_path: Path) -> None:
    for split in ("train", "test", name):
        write_classes(tmp_path / split, ["cat", "dog"], 2)
    with pytest.raises(RecipeError, match=f"holds {name}; rename it to val"):
        find_labelled(tmp_path)


def test_parquet_files_that_number_their_classes_differently(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for file, classes, labels in (("a", ["cat", "dog"], [0, 1] * 5), ("b", ["fox", "cat"], [0, 1, 1] * 5)):
        write_parquet(tmp_path / f"{file}.parquet", labels)
        table = parquet.read_table(tmp_path / f"{file}.parquet")
        metadata = {"info": {"features": {"label": {"names": classes}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})
        parquet.write_table(pyarrow.table(table), tmp_path / f"{file}.parquet")
    source = open_source(tmp_path)
    assert source.classes == ["cat", "dog", "fox"] and source.labels is not None
    assert source.labels.tolist() == [0, 1] * 5 + [2, 0, 0] * 5


def test_one_folder_is_split_by_stable_id_in_every_class(tmp_path: Path) -> None:
    write_classes(tmp_path / "one", ["cat", "dog", "train"], 10)
    splits = find_labelled(tmp_path / "one")
    assert splits.how == "80/20 by image id"
    assert Counter(splits.test.labels().tolist()) == {0: 2, 1: 2, 2: 2}
    assert names(splits.train) | names(splits.test) == {
        f"{name}/{index}.png" for name in ("cat", "dog", "train") for index in range(10)
    }
    assert not names(splits.train) & names(splits.test)
    for part in (splits.train, splits.test):
        for index, label in zip(part.indices.tolist(), part.labels().tolist(), strict=True):
            assert part.images.name(index).partition("/")[0] == ["cat", "dog", "train"][label]
    # the split does not depend on the location
    (tmp_path / "one").rename(tmp_path / "other")
    assert names(find_labelled(tmp_path / "other").test) == names(splits.test)


@pytest.mark.parametrize("write", [write_parquet, write_tar])
def test_one_file_is_split(tmp_path: Path, write: Callable[[Path, list[int]], None]) -> None:
    file = tmp_path / ("all.parquet" if write is write_parquet else "all.tar")
    write(file, [0] * 10 + [1])
    splits = find_labelled(file)
    assert splits.test.labels().tolist() == [0, 0]
    assert counts(splits.train) == (9,)  # the only image of class 1 among them
    assert splits.n_classes == 2


def test_a_path_that_does_not_exist_is_refused_with_the_layouts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"does not exist; expected PATH/\{train,val,test\}/CLASS"):
        find_labelled(tmp_path / "absent")


def test_a_file_of_another_kind_is_refused_with_the_layouts(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(RecipeError, match=r"labelled images: PATH/\{train,val,test\}/CLASS"):
        find_labelled(tmp_path / "notes.txt")


def test_test_without_train_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [0, 1])
    with pytest.raises(RecipeError, match="holds test, but no train to fit on"):
        find_labelled(tmp_path)


@pytest.mark.parametrize("name", ["validation.parquet", "test-00000-of-00001.parquet", "validation/cat"])
def test_splits_with_other_names_are_refused(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        write_parquet(tmp_path / "train.parquet", [0, 1])
        write_parquet(tmp_path / name, [0, 1])
    else:
        write_classes(tmp_path / "train", ["cat", "dog"], 1)
        write_classes(tmp_path / "validation", ["cat", "dog"], 1)
    with pytest.raises(RecipeError, match="train.* look like splits, but expected are .*rename them"):
        find_labelled(tmp_path)


def test_two_forms_of_one_split_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", ["cat", "dog"], 1)
    write_parquet(tmp_path / "train.parquet", [0, 1])
    with pytest.raises(RecipeError, match=r"both train and train.parquet; keep one"):
        find_labelled(tmp_path)


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, ["flat"], 3)
    with pytest.raises(DataError, match="3 of 3 images have no label; give each a class folder"):
        find_labelled(tmp_path / "flat")


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, ["cat"], 3)
    with pytest.raises(DataError, match="all images are of one class"):
        find_labelled(tmp_path)


def test_one_image_per_class_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, ["cat", "dog"], 1)
    with pytest.raises(DataError, match="leaves none to evaluate on"):
        find_labelled(tmp_path)


def test_other_classes_in_test_than_in_train_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", ["cat", "dog"], 1)
    write_classes(tmp_path / "test", ["cat", "fox"], 1)
    with pytest.raises(DataError, match=r"train and test differ in their classes \(fox\); give train every"):
        find_labelled(tmp_path)


def test_a_label_that_train_lacks_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [0, 1, 1])
    write_tar(tmp_path / "test.tar", [1, 4])
    with pytest.raises(DataError, match=r"test has labels that train lacks: \[4\]"):
        find_labelled(tmp_path)


def test_label_numbers_with_huge_gaps_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "far.tar", [7, 7, 2_000_000, 2_000_000])
    message = "2 different labels in train, the highest of all is 2000000: a head would have 2000001 outputs; number"
    with pytest.raises(DataError, match=message):
        find_labelled(tmp_path / "far.tar")
    write_tar(tmp_path / "near.tar", [7, 7, 999, 999])  # some of ImageNet's classes
    assert find_labelled(tmp_path / "near.tar").n_classes == 1000


@pytest.mark.parametrize("encode", [False, True])
def test_strings_in_the_column_label_are_the_names_of_classes(tmp_path: Path, encode: bool) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split, values in (("train", ["dog", "cat", "fox", "dog"]), ("test", ["fox", "cat"])):
        labels = pyarrow.array(values)
        table = {"image": [b"x"] * len(values), "label": labels.dictionary_encode() if encode else labels}
        parquet.write_table(pyarrow.table(table), tmp_path / f"{split}.parquet")
    splits = find_labelled(tmp_path)
    assert splits.classes == ("cat", "dog", "fox")
    assert (splits.train.labels().tolist(), splits.test.labels().tolist()) == ([1, 0, 2, 1], [2, 0])


def test_a_missing_label_names_what_there_is_instead(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, columns in (("a", {"fine_label": [1, 2], "coarse_label": [0, 0]}), ("b", {"label": [[1], [2]]})):
        parquet.write_table(pyarrow.table({"image": [b"x", b"y"]} | columns), tmp_path / f"{name}.parquet")
    message = (
        r"2 of 2 images have no label, because no column is called label \(columns beside the images: fine_label, coa"
    )
    with pytest.raises(DataError, match=message):
        find_labelled(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"because the column label \(list<.*>\) does not hold integers or strings"):
        find_labelled(tmp_path / "b.parquet")


@pytest.mark.parametrize("stray", ["stray.png", "dog/more/9.png"])
def test_an_image_outside_the_class_folders_is_named(tmp_path: Path, stray: str) -> None:
    write_classes(tmp_path, ["cat", "dog"], 3)
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).write_bytes(png(0))
    with pytest.raises(DataError, match=rf"because 1 of them are not exactly one folder down \('{stray}'\)"):
        find_labelled(tmp_path)


def test_cifar10_is_found(shared_data: Path) -> None:
    splits = find_labelled(shared_data / "cifar10")
    assert (*counts(splits.train, splits.test), splits.n_classes) == (50_000, 10_000, 10)

"""Classes of heads and of data are matched by map, name, synonym or number; what is unclear is left out or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoulders.errors import DataError, RecipeError
from shoulders.tasks.class_match import match_classes
from shoulders.tasks.data.class_names import classes_in_names, read_class_map

IMAGENET = ("background", "tench, Tinca tinca", "polecat, fitch", "skunk, polecat", "crane", "crane (2)", "maillot")
COCO = ("N/A", "person", "bicycle", "N/A", "dining table")


@pytest.mark.parametrize(
    ("head", "data", "indices"),
    [
        (("cat", "crane", "dog", "crane"), ("cat", "crane", "crane", "dog"), (0, 1, 3, 2)),  # k-th of a name
        (IMAGENET, ("tench, Tinca tinca", "skunk"), (-1, 0, -1, 1, -1, -1, -1)),
        (IMAGENET, ("Tench", "n02443114, polecat"), (-1, 0, 1, -1, -1, -1, -1)),  # the first name counts first
        (IMAGENET, ("Tinca_tinca",), (-1, 0, -1, -1, -1, -1, -1)),
        (IMAGENET, ("maillot", "n1, crane", "n2, crane"), (-1, -1, -1, -1, 1, 2, 0)),
        (IMAGENET, ("maillot", "crane"), (-1, -1, -1, -1, -1, -1, 0)),  # which of the two cranes is unknown
        (COCO, ("things", "person", "Dining-Table"), (-1, 1, -1, -1, 2)),
        (("pottedplant", "tvmonitor"), ("potted plant", "tv"), (0, -1)),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2"), (0, 1, 2)),  # numbers alone, equally many
        (("a", "b", "c"), ("2", "0", "1"), (1, 2, 0)),
        (("0", "1", "2"), ("2", "1"), (-1, 1, 0)),  # numbers that are names of the head too
    ],
)
def test_classes_are_matched_by_name(head: tuple[str, ...], data: tuple[str, ...], indices: tuple[int, ...]) -> None:
    assert match_classes(head, data, {}).indices == indices


def test_numbers_without_names_need_a_map() -> None:
    """1,000 numbers and 1,001 classes, of which the first is background: off by one."""
    data = tuple(map(str, range(3)))
    with pytest.raises(RecipeError, match=r"3 classes with numbers alone .* which is which\? give --classes"):
        match_classes(("background", "cat", "dog", "cow"), data, {})
    match = match_classes(("background", "cat", "dog", "cow"), data, {"0": "cat", "1": "Dog", "2": 3})
    assert match.indices == (-1, 0, 1, 2)
    with pytest.raises(RecipeError, match="numbers alone"):  # 1 to 3 are not 0 to 2
        match_classes(("cat", "dog", "cow"), ("1", "2", "3"), {})


def test_a_map_may_give_several_classes_one_name() -> None:
    """ImageNet's own list has two cranes, told apart by their order alone."""
    given = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane", "n01443537": "goldfish"}
    assert match_classes(IMAGENET, tuple(given), given).indices == (-1, 0, -1, -1, 1, 2, -1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sofa": "cat"}, "none of its names \\('sofa'\\) is a class of the data \\('couch', 'dog'\\)"),
        ({"couch": "sofas", "dog": "dogs"}, "have no class in common"),
        ({"couch": 3}, "'couch' is class 3 of the head, which has 0 to 2"),
        ({"couch": 1, "dog": 1}, "'couch' and 'dog' are both class 1 of the head"),
    ],
)
def test_maps_that_do_not_fit_are_refused(given: dict[str, str | int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        match_classes(("background", "sofa", "cat"), ("couch", "dog"), given)


def test_what_is_left_out_is_counted_and_named() -> None:
    match = match_classes(COCO, ("person", "unicorn"), {})
    assert match.settings(7, "objects") == {
        "classes": 1,
        "head_classes_left_out": 4,
        "data_classes_left_out": 1,
        "labels_left_out": 7,
        "classes_left_out": "4 of the head ('N/A', 'bicycle', 'N/A', ..) and 1 of the data ('unicorn'; objects: 7)",
    }
    assert not match_classes(COCO, COCO, {}).settings(0, "objects")


def test_maps_are_read_in_three_forms(tmp_path: Path) -> None:
    for name, text, expected in (
        ("a.json", json.dumps({"n01440764": "tench", "x": 3}), {"n01440764": "tench", "x": 3}),
        ("b.json", '["tench", "crane"]', {"0": "tench", "1": "crane"}),
        (
            "c.txt",
            "n01440764 tench, Tinca tinca\n\nn02012849 crane\n",
            {"n01440764": "tench, Tinca tinca", "n02012849": "crane"},
        ),
    ):
        (tmp_path / name).write_text(text)
        assert read_class_map(tmp_path / name) == expected
    for name, text in (("d.json", "{"), ("e.json", "[" * 100_000), ("f.json", '{"a": 1.5}'), ("g.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="give a JSON object"):
            read_class_map(tmp_path / name)
    with pytest.raises(DataError, match=r"h\.json: No such file"):
        read_class_map(tmp_path / "h.json")


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["n02_b.jpg", "a_1.jpg"], ["a", "n02_b"], [1, 0]),
        (["n01440764_tench.JPEG", "n02012849_crane.JPEG"], ["n01440764, tench", "n02012849, crane"], [0, 1]),
        (["n02012849_17.JPEG", "n01440764_1.JPEG", "n01440764_2.JPEG"], ["n01440764", "n02012849"], [1, 0, 0]),
        (["ILSVRC2012_val_00000293_n01440764.JPEG"], ["n01440764"], [0]),
        (["english_springer-2.jpg", "english_springer (3).jpg"], ["english_springer"], [0, 0]),
        (["000123.jpg", "cat.jpg"], None, []),
        (["a/cat.jpg", "cat.jpg"], None, []),
    ],
)
def test_classes_in_the_names_of_files(names: list[str], classes: list[str] | None, labels: list[int]) -> None:
    found = classes_in_names(names)
    assert (None if found is None else found[0]) == classes
    assert found is None or found[1].tolist() == labels

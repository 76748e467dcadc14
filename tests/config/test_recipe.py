"""Recipes: read, completed, written and refused."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml

from shoulders.config.recipe import Recipe, as_recipe, dump_recipe, read_recipe
from shoulders.errors import RecipeError
from shoulders.transfer.losses import METHODS

VALID = """
student: {base: some/base, adapter: {kind: bottleneck, width: 16}}
teachers:
  one: {model: some/teacher}
images: {path: photos}
train: {steps: 10, lr: 3e-4}
out: runs/x
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(VALID)
    return path


def test_a_written_recipe_is_complete_and_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    first = read_recipe(recipe, ["train.steps=20", "teachers.two.model=x/y", "images.size=[96, 64]"])
    assert first.train.steps == 20 and first.train.lr == 3e-4 and first.teachers["two"].model == "x/y"
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(first))
    assert read_recipe(again) == first
    assert set(yaml.safe_load(again.read_text())["train"]) == set(type(first.train).model_fields)


def test_a_recipe_may_be_given_as_a_file(recipe: Path) -> None:
    read = read_recipe(recipe)
    assert as_recipe(read) is read
    assert as_recipe(recipe) == as_recipe(str(recipe)) == read


def test_a_tilde_is_the_home_folder(recipe: Path) -> None:
    read = read_recipe(recipe, ["out=~/run", "cache.path=~/cache"])
    assert (read.out, read.cache.path) == (Path.home() / "run", Path.home() / "cache")


def test_names_of_folders_that_yaml_reads_otherwise(recipe: Path) -> None:
    read = read_recipe(recipe, ["images.path=set #2", "out=2024-11-20"])
    assert (read.images.path, read.out) == (Path("set #2"), Path("2024-11-20"))
    assert read_recipe(recipe, ["out='a #1'  # a note"]).out == Path("a #1")


def test_teachers_limited_to_some_sources(recipe: Path) -> None:
    sources = ["images.path=null", "images.sources={streets: {path: a}, cells: {path: b}}"]
    read = read_recipe(recipe, [*sources, "teachers.two={model: x, sources: [cells]}"])
    assert read.teacher_sources == {"two": ["cells"]}
    with pytest.raises(RecipeError, match=r"teachers\.one\.sources: roads not in images\.sources: streets, cells"):
        read_recipe(recipe, [*sources, "teachers.one.sources=[cells, roads]"])


def test_a_conv_adapter_reads_the_blocks_that_projectors_read(recipe: Path) -> None:
    conv = ["student.adapter={kind: conv}", "transfer.layers=[block3, latent, block1]"]
    assert read_recipe(recipe, conv).student.adapter.model_dump()["blocks"] == [1, 3]
    assert read_recipe(recipe, [*conv, "student.adapter.blocks=[3]"]).student.adapter.model_dump()["blocks"] == [3]
    with pytest.raises(RecipeError, match=r"transfer\.layers: block2 missing, which student\.adapter\.blocks names"):
        read_recipe(recipe, [*conv, "student.adapter.blocks=[2, 3]"])


def test_the_methods_of_a_recipe_are_those_of_the_losses() -> None:
    assert get_args(Recipe.model_fields["method"].annotation) == tuple(METHODS)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("out=12", "out: a path must be text, but YAML reads 12, which is not; quote the value in YAML"),
        ("out=runs: a", "out: a path must be text, but YAML reads {'runs': 'a'}"),
        ("out=~nobody-of-this-name/run", "no user of this name has a home folder; write the full path"),
        ("train.stepss=3", "train.stepss: unknown key; did you mean steps?"),
        ("student.adapter.widht=3", "student.adapter.widht: unknown key; did you mean width?"),
        ("teachers.one.modle=a", "teachers.one.modle: unknown key; did you mean mod"),
        ("nonsense=3", "nonsense: unknown key; allowed: student, teachers"),
        ("train.lr=fast", "train.lr: Input should be a valid number, unable to parse string as a number (got 'fast')"),
        ("train.steps=0", "train.steps: Input should be greater than or equal to 1 (got 0)"),
        ("transfer.t2s=both", "transfer.t2s: Input should be 'none', 'each' or 'joint' (got 'both')"),
        ("student.adapter.kind=houlsby", "student.adapter: Input tag 'houlsby'"),
        (
            "teachers.base.model=a/b",
            "teacher name 'base': use letters, digits and _; reserved names are base, concatenated",
        ),
        ("teachers.joint.model=a/b", "teacher name 'joint'"),
        ("teachers.one.module=a:b", "teachers.one: give either model (hub id or folder) or module"),
        ("teachers.one.weight=2", "teachers.one.weight only counts with transfer.balance: fixed"),
        ("student.adapter={width: 4}", "student.adapter: give its kind, one of bottleneck, lora"),
        ("images.views=[1]", "images.views: "),
        ("images.size=big", "images.size: "),
        ("transfer.layers=[latent, block3, latent]", "transfer.layers: each layer once, got latent, block3, latent"),
        ("train.lr", "'train.lr': an override is written key.subkey=value"),
        ("train.lr.x=3", "'train.lr.x=3': 'lr' holds a value, not a section"),
        ("train.lr=[", "the value is not YAML"),
        ("out=", "out: "),
    ],
)
def test_a_fault_is_one_line_with_the_key_and_the_fix(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        read_recipe(recipe, [override])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("out: 2024-13-45", "not YAML"),
        ("train: {steps: 3}\nout: x\ntrain: {lr: 1.0}", "not YAML (train is given twice"),
        ("- 1", "a recipe is a mapping of keys to values, got list"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("out: x", "student: missing; give it in the recipe or as student=..."),
    ],
)
def test_files_that_are_not_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="(?s).*" + message.replace("(", r"\(").replace(".", r"\.")):
        read_recipe(path)
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_recipe(tmp_path / "absent.yaml")


def test_every_shipped_recipe_is_valid_and_begins_with_a_comment() -> None:
    recipes = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        read_recipe(path)
        first = path.read_text().splitlines()[0]
        assert first.startswith("#"), f"{path.name}: the first lines give purpose, command, time and score"
        assert "/home" not in path.read_text() and "shared/" not in path.read_text()

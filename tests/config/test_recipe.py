from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shoulders.config.recipe import dump_recipe, read_recipe
from shoulders.errors import RecipeError

GOOD = """
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
    path.write_text(GOOD)
    return path


def test_what_is_written_is_complete_and_reads_back_the_same(recipe: Path, tmp_path: Path) -> None:
    first = read_recipe(recipe, ["train.steps=20", "teachers.two.model=x/y", "images.size=[96, 64]"])
    assert first.train.steps == 20 and first.train.lr == 3e-4 and first.teachers["two"].model == "x/y"
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(first))
    assert read_recipe(again) == first
    assert set(yaml.safe_load(again.read_text())["train"]) == set(type(first.train).model_fields)


def test_ones_own_folder_may_be_called_by_its_short_name(recipe: Path) -> None:
    told = read_recipe(recipe, ["out=~/run", "cache.path=~/cache"])
    assert (told.out, told.cache.path) == (Path.home() / "run", Path.home() / "cache")


def test_folders_may_be_called_as_the_shell_allows(recipe: Path) -> None:
    told = read_recipe(recipe, ["images.path=set #2", "out=2024-11-20"])
    assert (told.images.path, told.out) == (Path("set #2"), Path("2024-11-20"))
    assert read_recipe(recipe, ["out='a #1'  # a note"]).out == Path("a #1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("out=12", "out: a path is text, and YAML reads another thing here (12); put it into quotes of its own"),
        ("out=runs: a", "out: a path is text, and YAML reads another thing here ({'runs': 'a'})"),
        ("train.stepss=3", "train.stepss: unknown key; did you mean steps?"),
        ("student.adapter.widht=3", "student.adapter.widht: unknown key; did you mean width?"),
        ("teachers.one.modle=a", "teachers.one.modle: unknown key; did you mean mod"),
        ("nonsense=3", "nonsense: unknown key; allowed: student, teachers"),
        ("train.lr=fast", "train.lr: Input should be a valid number, unable to parse string as a number (got 'fast')"),
        ("train.steps=0", "train.steps: Input should be greater than or equal to 1 (got 0)"),
        ("transfer.t2s=both", "transfer.t2s: Input should be 'none', 'each' or 'joint' (got 'both')"),
        ("student.adapter.kind=houlsby", "student.adapter: Input tag 'houlsby'"),
        ("teachers.base.model=a/b", "teacher name 'base'"),
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
def test_faults_are_one_line_with_the_key_and_the_fix(recipe: Path, override: str, message: str) -> None:
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
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="(?s).*" + message.replace("(", r"\(").replace(".", r"\.")):
        read_recipe(path)
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_recipe(tmp_path / "absent.yaml")


def test_every_recipe_that_ships_is_valid() -> None:
    recipes = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        read_recipe(path)
        first = path.read_text().splitlines()[0]
        assert first.startswith("#"), f"{path.name} begins with what it is, its command, time and score"
        assert "/home" not in path.read_text() and "shared/" not in path.read_text()

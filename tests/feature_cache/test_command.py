"""``shoulders cache`` from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.tiny import run_cli, save_base, save_convnext, save_images, tiny_tree


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    save_base(root / "base")
    save_convnext(root / "classifier")
    save_images(root / "images", 30)
    tree = tiny_tree(
        root,
        teachers={"classifier": {"model": str(root / "classifier")}},
        images__views=1,
        images__holdout=None,
        train__steps=2,
        cache={"path": str(root / "cache"), "dtype": "int8"},
    )
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return root / "recipe.yaml"


def run(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    done = run_cli(*args)
    return done.returncode, done.stdout, done.stderr


def test_estimate_build_info_and_verify(recipe: Path) -> None:
    def cache(*args: object) -> tuple[int, str, str]:
        return run("cache", recipe, *args)

    code, out, err = cache("--info")
    assert (code, out) == (3, "") and "there is no cache; build it with: shoulders cache RECIPE cache.path=" in err
    code, out, _ = cache("--estimate")
    assert code == 0 and "KiB on disk (" in out and "minutes in one process" in out and "base" in out
    estimated = json.loads(cache("--estimate", "--json")[1])
    assert {row["teacher"]: row["views"] for row in estimated["teachers"]} == {"classifier": 30, "base": 30}
    code, out, err = cache("--json")
    built = json.loads(out)
    assert code == 0 and built["bytes"] == estimated["disk_bytes"] and "reconstruction fvu" in err
    code, out, _ = cache("--info")
    assert code == 0 and "classifier/stage1/spatial  64 x 16 int8" in out and "classifier: 30 views, complete, " in out
    code, out, _ = cache("--verify")
    assert code == 0 and out.endswith("every record is as it was written\n")
    assert json.loads(cache("--verify", "--json")[1])["teachers"] == built["teachers"]
    code, out, err = cache("--verify", "--estimate")
    assert (code, out) == (2, "") and "give one of --estimate, --verify and --info" in err


def test_refusals_have_their_exit_codes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> tuple[int, str]:
        code, out, err = run(*args)
        assert out == "" and len(err.splitlines()) == 1
        return code, err

    run("cache", recipe)
    code, err = refuse("cache", recipe, "images.views=fresh")
    assert code == 2 and "fresh views never repeat" in err
    code, err = refuse("distill", recipe, "images.views=fresh", "cache.mode=require")
    assert code == 2 and "cache.mode: require, but images.views is fresh" in err
    code, err = refuse("cache", recipe, "cache.mod=off")
    assert code == 2 and "cache.mod: unknown key; did you mean mode?" in err
    code, err = refuse("distill", recipe, "train.seed=4", "cache.mode=require")
    assert code == 3 and "train.seed was 0, is 4" in err and "cache.path=OTHER" in err
    shard = recipe.parent / "cache" / "classifier" / "shard-00000.bin"
    original = shard.read_bytes()
    shard.write_bytes(original[:5000] + b"?" + original[5001:])
    code, err = refuse("cache", recipe, "--verify")
    assert code == 3 and f"{shard}: record " in err and "is damaged; remove this file, then: shoulders cache" in err
    shard.write_bytes(original)
    usage = shutil.disk_usage(recipe.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    code, err = refuse("cache", recipe, f"cache.path={recipe.parent / 'other'}")
    assert code == 5 and "KiB needed, 10 bytes free; make room" in err


def test_a_run_logs_whether_it_reads_the_cache(recipe: Path) -> None:
    run("cache", recipe)
    code, _, err = run("distill", recipe)
    assert code == 0 and f"reading the teachers' features from {recipe.parent / 'cache'} (int8)" in err
    code, _, err = run("distill", recipe, "train.seed=4", f"out={recipe.parent / 'live'}")
    assert code == 0 and "running the teachers, not reading the cache: " in err

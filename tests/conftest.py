"""Settings of all tests: no network, one thread; and the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Set before torch and transformers are imported; processes that tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and labels: SHOULDERS_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SHOULDERS_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set SHOULDERS_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two teachers and 60 images in one folder, which no test changes; see `tests.tiny.save_tiny_world`."""
    from tests.tiny import save_tiny_world

    return save_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def uninterrupted_run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `tests.runs` that nothing interrupted, which no test changes."""
    from tests.runs import run

    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(tiny_world, out)
    return out


@pytest.fixture(scope="session")
def short_run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, `tests.runs.SHORT`, that nothing interrupted, which no test changes."""
    from tests.runs import SHORT, run

    out = tmp_path_factory.mktemp("short") / "run"
    run(tiny_world, out, resume=False, **SHORT)
    return out

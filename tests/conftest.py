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

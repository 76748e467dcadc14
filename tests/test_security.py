"""The package contains nothing that could run code of others or accept a damaged file."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "shoulders"

# Patterns over the tokens of the code, joined by single spaces; comments and strings are left out.
FORBIDDEN = {
    "unpickling": r"\b(pickle|cloudpickle|dill|shelve|marshal|joblib)\b",
    "torch.load": r"\btorch \. load \(|\bfrom torch import .*\bload\b|\bweights_only\b",
    "yaml.load": r"\byaml \. (load|load_all|unsafe_load|full_load) \(",
    "eval or exec": r"(?<!\. )(?<!def )\b(eval|exec) \(",
    "a shell": r"\bshell = True\b|\bos \. (system|popen)\b",
    "extractall": r"\bextractall\b",
    "remote code of every model": r"\btrust_remote_code = True\b",
    "truncated images": r"\bLOAD_TRUNCATED_IMAGES\b",
    "images without a limit": r"\bMAX_IMAGE_PIXELS = None\b",
    "other readers that run code": r"\btorch \. (hub|package)\b|\bjit \. load \(|\bdistributed \. checkpoint\b",
    "unpacked archives": r"\b(unpack_archive|ZipFile)\b",
    "guessable temporary files": r"\bmktemp \(",
    "object arrays": r"\ballow_pickle = True\b",
}
IGNORED_TOKENS = {tokenize.COMMENT, tokenize.STRING}


def violations(code: str) -> list[str]:
    """The names of the forbidden patterns in some code."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    text = " ".join(token.string for token in tokens if token.type not in IGNORED_TOKENS)
    return [name for name, pattern in FORBIDDEN.items() if re.search(pattern, text)]


def test_the_package_contains_nothing_forbidden() -> None:
    files = {str(file): violations(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
    assert files
    assert {name: names for name, names in files.items() if names} == {}


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import pickle", "unpickling"),
        ("state = torch.load(path)", "torch.load"),
        ("tree = yaml.load(text, Loader)", "yaml.load"),
        ("value = eval(text)", "eval or exec"),
        ("subprocess.run(line, shell=True)", "a shell"),
        ("archive.extractall(folder)", "extractall"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "remote code of every model"),
        ("model = torch.jit.load(path)", "other readers that run code"),
        ("model = torch.hub.load(name)", "other readers that run code"),
        ("from torch.distributed.checkpoint import load", "other readers that run code"),
        ("zipfile.ZipFile(path)", "unpacked archives"),
        ("shutil.unpack_archive(path)", "unpacked archives"),
        ("tempfile.mktemp()", "guessable temporary files"),
        ("ImageFile.LOAD_TRUNCATED_IMAGES = True", "truncated images"),
        ("Image.MAX_IMAGE_PIXELS = None", "images without a limit"),
        ("np.load(path, allow_pickle=True)", "object arrays"),
    ],
)
def test_forbidden_code_is_detected(code: str, name: str) -> None:
    assert violations(code) == [name]


def test_harmless_code_passes() -> None:
    harmless = '"""No pickle here."""\nmodel.eval()  # not eval(text)\ntree = yaml.safe_load(text)\n'
    assert violations(harmless) == []

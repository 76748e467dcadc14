"""A static gate: what could run a stranger's code, or swallow a broken file, is nowhere in the package."""

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
    "remote code for everyone": r"\btrust_remote_code = True\b",
    "truncated images": r"\bLOAD_TRUNCATED_IMAGES\b",
    "images without a limit": r"\bMAX_IMAGE_PIXELS = None\b",
    "object arrays": r"\ballow_pickle = True\b",
}
LEFT_OUT = {tokenize.COMMENT, tokenize.STRING}


def faults(code: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    text = " ".join(token.string for token in tokens if token.type not in LEFT_OUT)
    return [what for what, pattern in FORBIDDEN.items() if re.search(pattern, text)]


def test_the_package_holds_nothing_forbidden() -> None:
    found = {file.name: faults(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
    assert found
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "unpickling"),
        ("state = torch.load(path)", "torch.load"),
        ("tree = yaml.load(text, Loader)", "yaml.load"),
        ("value = eval(text)", "eval or exec"),
        ("subprocess.run(line, shell=True)", "a shell"),
        ("archive.extractall(folder)", "extractall"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "remote code for everyone"),
        ("ImageFile.LOAD_TRUNCATED_IMAGES = True", "truncated images"),
        ("Image.MAX_IMAGE_PIXELS = None", "images without a limit"),
        ("np.load(path, allow_pickle=True)", "object arrays"),
    ],
)
def test_the_gate_closes(code: str, what: str) -> None:
    assert faults(code) == [what]


def test_the_gate_lets_harmless_code_pass() -> None:
    harmless = '"""No pickle here."""\nmodel.eval()  # not eval(text)\ntree = yaml.safe_load(text)\n'
    assert faults(harmless) == []

"""Which numbers and names a ``config.json`` may hold: transformers builds whatever it describes, however large.

A model of a billion layers takes all memory before its weights are compared with the file, and an attention
implementation may be the name of code on the hub.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# (pattern of a key and of the keys around it, largest number): the first that matches counts; others have no limit
LIMITS = (
    (r"vocab_size$", 4_000_000),
    (r"labels$", 100_000),
    (r"(image|img)_size", 16_384),
    (r"^(up|down)sample\.", 64),
    (r"size|dim|width|channels|heads|features|d_model|hidden|ffn|stem|kernel|stride|ratio|padding", 65_536),
    (r"queries|proposals|denoising|tokens|registers|embeddings|patches|points|feats|rank$|summary$|spatial$", 65_536),
)
LAYERS = re.compile(r"(^|[._])(layers|depth|depths|blocks|repeats|stages|levels)(_per_stage)?$")
MAX_LAYERS, MAX_SUM_OF_LAYERS = 500, 2_000  # the sum of a list such as depths
# keys whose numbers are divisors or sizes of weights
POSITIVE = re.compile(
    r"(^|\.)((patch|image|hidden|intermediate)_sizes?|patch_strides?|strides?|embed_dim|d_model|width|num_channels|"
    r"num_(attention_)?heads)$"
)
LABELS = ("id2label", "label2id")
IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flash_attention_2"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}


def why_refused(config: Mapping[str, Any]) -> str:
    """Why no model is built from the content of a ``config.json``, or "".

    Returns:
        What is there and what is allowed: ``depths is [1000000000, 1], at most 500``.
    """
    try:
        for key, value in _values(config):
            if reason := _why_number(key, list(_numbers(value))) or _why_implementation(key, value):
                return f"{key} is {_shorten(value)}, {reason}"
    except RecursionError:
        return "nesting is too deep"
    return ""


def _values(config: Mapping[str, Any], around: str = "") -> Iterator[tuple[str, Any]]:
    """(keys joined by dots, value) of all that is in a config, but for class names."""
    for key, value in config.items():
        if key in LABELS:
            continue
        if isinstance(value, Mapping) and not key.endswith("_implementation"):
            yield from _values(value, f"{around}{key}.")
        else:
            yield f"{around}{key}", value


def _why_number(key: str, numbers: Sequence[float]) -> str:
    limits = [limit for pattern, limit in LIMITS if re.search(pattern, key)]
    limit = MAX_LAYERS if LAYERS.search(key) else next(iter(limits), math.inf)
    if not all(abs(number) <= limit for number in numbers):  # NaN is refused, too
        return f"at most {limit}"
    if LAYERS.search(key) and sum(numbers) > MAX_SUM_OF_LAYERS:
        return f"at most {MAX_SUM_OF_LAYERS} together"
    return "at least 1" if POSITIVE.search(key) and numbers and min(numbers) < 1 else ""


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value, and in the lists in it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from _numbers(one)


def _why_implementation(key: str, value: Any) -> str:
    """Why an implementation is refused: transformers takes any other name for a kernel on the hub, and runs that."""
    name = key.rpartition(".")[2]
    allowed = IMPLEMENTATIONS.get(name.lstrip("_").removesuffix("_internal"))
    named = value.values() if isinstance(value, Mapping) else [value]
    if allowed is None or all(one in (None, *allowed) for one in named):
        return ""
    return f"which would be a kernel from the hub; allowed are {', '.join(allowed)}"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}.."

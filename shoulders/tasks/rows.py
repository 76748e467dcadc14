"""What every task answers with: one row per metric, ready for ``results.json``."""

from __future__ import annotations

from typing import TypedDict


class Row(TypedDict):
    """One measured number.

    ``value`` is a fraction 0 to 1, ``n`` the images it was measured on, ``seconds`` the fit and the scoring,
    ``settings`` what it depends on.
    """

    task: str
    metric: str
    value: float
    n: int
    seconds: float
    settings: dict[str, float | int | str]

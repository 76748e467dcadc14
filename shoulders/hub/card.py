"""The model card of a student: how to load it, its teachers and their licenses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_card(
    folder: Path, size: tuple[int, int], patch_size: int, teachers: Mapping[str, Mapping[str, str | None]]
) -> None:
    """Write ``folder/README.md``.

    Args:
        size: (h, w) in px that the student was trained at.
        patch_size: px.
        teachers: {name: {"source", "revision", "license"}}.
    """
    rows = [
        f"| {name} | {teacher['source']} | {teacher.get('revision') or '-'} | {teacher['license']} |"
        for name, teacher in teachers.items()
    ]
    card = [
        "---",
        "library_name: transformers",
        "tags: [shoulders]",
        "---",
        "# A student made with shoulders",
        "",
        f"Trained at {size[0]} x {size[1]} px; takes pixels in [0, 1] of any multiple of {patch_size} px.",
        "",
        "```python",
        "import shoulders",
        'student = shoulders.load("this/folder")',
        "latent = student(pixels).latent  # Features(summary, spatial, grid)",
        "```",
        "",
        "It was distilled from these models; the licenses of all of them apply to it.",
        "",
        "| teacher | source | revision | license |",
        "|---|---|---|---|",
        *rows,
    ]
    (folder / "README.md").write_text("\n".join(card) + "\n")

"""What all sections of a recipe share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, and values are also checked when they are assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: no user of this name has a home folder; write the full path") from error


UserPath = Annotated[Path, AfterValidator(_expand_home)]  # a leading ~ is the home folder
Size = int | tuple[int, int]  # in px: of a square, or (h, w)


def as_size(size: Size) -> tuple[int, int]:
    """(h, w) of a size that is given as one number or two."""
    return (size, size) if isinstance(size, int) else size

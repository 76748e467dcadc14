"""What a recipe may say of the student: its base and its adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    """A section of the recipe: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Bottleneck(Part):
    """Parallel down-GELU-up beside each block's MLP (AdaptFormer, arXiv 2205.13535)."""

    kind: Literal["bottleneck"]
    width: int = Field(64, ge=1, description="hidden width")


class Lora(Part):
    """Low-rank update of the linear layers of each block (arXiv 2106.09685)."""

    kind: Literal["lora"]
    rank: int = Field(16, ge=1, description="of the update")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")


class Side(Part):
    """A small ladder network beside the base, which it only reads: no gradient goes through it (arXiv 2206.06522)."""

    kind: Literal["side"]
    width: int = Field(192, ge=1, description="of the ladder; above 64 a multiple of 64")
    blocks: int | list[int] = Field(4, description="so many places evenly spaced, or blocks by number and the latent")

    @model_validator(mode="after")
    def _fits(self) -> Side:
        if self.width > 64 and self.width % 64:
            raise ValueError(f"width: above 64 a multiple of 64, such as {self.width // 64 * 64}, got {self.width}")
        chosen = self.blocks if isinstance(self.blocks, list) else [self.blocks - 1]
        if any(block < 0 for block in chosen) or sorted(set(chosen)) != chosen:
            raise ValueError(f"blocks: a number from 1 on, or blocks in rising order as [2, 5, 8], got {self.blocks}")
        return self


class Conv(Part):
    """Convolutions beside the base, which look at the pixels and read what the base says (arXiv 2205.08534)."""

    kind: Literal["conv"]
    width: int = Field(128, ge=32, multiple_of=32, description="of the maps")
    depth: int = Field(1, ge=1, description="residual blocks at each place read")
    blocks: list[int] | None = Field(None, description="where it reads, beside the latent; default: as transfer.layers")


Adapter = Annotated[Bottleneck | Lora | Side | Conv, Field(discriminator="kind")]


class Student(Part):
    """The frozen base and what learns inside it."""

    base: str = Field(description="hub id or local folder of a ViT with patch tokens")
    revision: str | None = Field(None, description="commit of the hub repository")
    adapter: Adapter = Bottleneck(kind="bottleneck")

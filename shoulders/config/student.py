"""The sections of a recipe about the student: its base and its adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoulders.config.section import Section


class Bottleneck(Section):
    """Down-projection, GELU and up-projection in parallel to the MLP of each block (AdaptFormer, arXiv 2205.13535)."""

    kind: Literal["bottleneck"]
    width: int = Field(64, ge=1, description="hidden width")


class Lora(Section):
    """Low-rank update of the linear layers of each block (LoRA, arXiv 2106.09685)."""

    kind: Literal["lora"]
    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")


class Side(Section):
    """Small ladder network that reads the features of the base: the base gets no gradient (arXiv 2206.06522)."""

    kind: Literal["side"]
    width: int = Field(192, ge=1, description="width of the ladder; above 64 a multiple of 64")
    blocks: int | list[int] = Field(
        4, description="number of layers that it reads, evenly spaced; or a list of blocks, the latent is added"
    )

    @model_validator(mode="after")
    def _check_blocks(self) -> Side:
        if self.width > 64 and self.width % 64:
            raise ValueError(f"width: above 64 a multiple of 64, such as {self.width // 64 * 64}, got {self.width}")
        chosen = self.blocks if isinstance(self.blocks, list) else [self.blocks - 1]
        if any(block < 0 for block in chosen) or sorted(set(chosen)) != chosen:
            raise ValueError(f"blocks: a number from 1 on, or blocks in rising order as [2, 5, 8], got {self.blocks}")
        return self


class Conv(Section):
    """Convolutions that read the pixels and the features of the base: the base gets no gradient (arXiv 2205.08534)."""

    kind: Literal["conv"]
    width: int = Field(128, ge=32, multiple_of=32, description="width of the feature maps")
    depth: int = Field(1, ge=1, description="residual blocks at each layer that it reads")
    blocks: list[int] | None = Field(
        None, description="blocks that it reads, beside the latent; default: those in transfer.layers"
    )


Adapter = Annotated[Bottleneck | Lora | Side | Conv, Field(discriminator="kind")]


class Student(Section):
    """The frozen base and its trainable adapter."""

    base: str = Field(description="hub id or local folder of a ViT with patch tokens")
    revision: str | None = Field(None, description="commit of the hub repository")
    adapter: Adapter = Bottleneck(kind="bottleneck")

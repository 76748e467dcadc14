"""Shared code of the training scripts: pixels in memory, optimizer, schedule, scratch state, the saved folder."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def to_pixels(image: Image.Image) -> Tensor:
    """A PIL image as uint8 pixels (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def load_cifar10(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10 images as uint8 (B, 3, 32, 32) and labels as int64 (B,)."""
    table = pq.read_table(data / "cifar10" / f"{split}.parquet")
    encoded = table.column("image").to_pylist()
    pixels = torch.stack([to_pixels(Image.open(io.BytesIO(row["bytes"]))) for row in encoded])
    return pixels, torch.tensor(table.column("label").to_pylist())


def render(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 pixels (B, 3, h, w) as normalized float (B, 3, height, width), resized as at inference."""
    small = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return normalize(small.float() / 255)


def normalize(unit: Tensor) -> Tensor:
    """Pixels in [0, 1] (B, 3, H, W) to zero mean and unit deviation under ImageNet statistics."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return (unit - mean[:, None, None]) / std[:, None, None]


def one_cycle(step: int, steps: int, warmup: float = 0.15) -> float:
    """Factor of the peak learning rate: linear up over `warmup` of the run, then linear down to zero."""
    at = (step + 0.5) / steps
    return at / warmup if at < warmup else (1 - at) / (1 - warmup)


def epoch_batches(count: int, batch: int, seed: int, start: int, steps: int) -> Iterator[tuple[int, Tensor]]:
    """(step, indices) from `start` on: shuffled epochs whose order depends on the seed and the step alone."""
    per_epoch = count // batch
    epoch, order = -1, torch.empty(0)
    for step in range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        at = step % per_epoch * batch
        yield step, order[at : at + batch]


def orthogonalize(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix by the quintic Newton-Schulz iteration (Jordan et al., Muon, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum for weight matrices and (flattened) convolution kernels."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.9, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight.grad)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                update = orthogonalize(ahead) * max(1, ahead.shape[0] / ahead.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["decay"]).add_(update.view_as(weight), alpha=-group["lr"])


class Optimizers:
    """Muon on the hidden matrices, AdamW on everything else; both under one learning-rate factor."""

    def __init__(
        self, matrices: list[nn.Parameter], rest: list[nn.Parameter], lr: float, rest_lr: float, decay: float
    ) -> None:
        self.each = [
            Muon(matrices, lr, decay=decay),
            torch.optim.AdamW(rest, rest_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [lr, rest_lr]

    def step(self, factor: float) -> None:
        for optimizer, peak in zip(self.each, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.each]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.each, states, strict=True):
            optimizer.load_state_dict(state)


class Progress:
    """Prints a line every `every` steps, adds up the time spent, and saves the scratch state of a run."""

    def __init__(self, work: Path, steps: int, every: int, stateful: dict[str, Any]) -> None:
        self.file, self.steps, self.every, self.stateful = work / "state.pt", steps, every, stateful
        self.start, self.seconds = 0, 0.0
        work.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.start, self.seconds = state.pop("start"), state.pop("seconds")
            for name, one in stateful.items():
                one.load_state_dict(state[name])
            print(f"resumed at step {self.start}", flush=True)
        self.started_at = time.time()

    def minutes(self) -> float:
        return (self.seconds + time.time() - self.started_at) / 60

    def line(self, step: int, **values: float) -> None:
        if step % self.every == 0 or step + 1 == self.steps:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {step}/{self.steps}  {shown}  {self.minutes():.1f} min", flush=True)

    def save(self, step: int, every: int) -> None:
        """Write the scratch state after every `every` steps and after the last."""
        if (step + 1) % every and step + 1 != self.steps:
            return
        state = {name: one.state_dict() for name, one in self.stateful.items()}
        partial = self.file.with_suffix(".tmp")
        torch.save({"start": step + 1, "seconds": self.minutes() * 60, **state}, partial)
        os.replace(partial, self.file)


class Best:
    """The best score of a run so far; `save` is called whenever a score exceeds it."""

    def __init__(self, save: Callable[[], None]) -> None:
        self.save, self.score = save, float("-inf")

    def update(self, score: float) -> None:
        if score > self.score:
            self.score = score
            self.save()

    def state_dict(self) -> dict[str, float]:
        return {"score": self.score}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.score = state["score"]


def save_teacher(model: PreTrainedModel, folder: Path, height: int, width: int, processor: str) -> None:
    """Write config.json, model.safetensors (fp16) and preprocessor_config.json.

    The configuration still names float32, so that a plain `from_pretrained` computes in fp32.
    """
    weights = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)
    settings = {
        "image_processor_type": processor,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_card(
    folder: Path, title: str, minutes: float, seed: int, terms: str, entries: dict[str, str], command: str = ""
) -> None:
    """Write README.md, the model card; the teacher and its training script have the name of the folder."""
    script = f"benchmarks/teachers/{folder.name}"
    rows = {
        **entries,
        "measured on": "the saved fp16 weights, read back as fp32",
        "command": f"`{command or f'python {script}.py --data DATA --out {script}'}`",
        "time": f"{minutes:.0f} minutes, one CPU thread of a busy machine",
        "seed": str(seed),
        "license": f"weights Apache-2.0 like the project; {terms}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    front = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n"
    (folder / "README.md").write_text(f"{front}# {title}\n\n| | |\n|---|---|\n{table}\n")


def count_parameters(model: nn.Module) -> str:
    """Parameters in millions, for the card."""
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M"

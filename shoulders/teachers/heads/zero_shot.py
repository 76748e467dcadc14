"""Zero-shot classification by an image-text teacher: class names as embeddings, kept without the text tower.

The logits are computed by the teacher's own forward, with both towers replaced by what they would answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from shoulders.errors import RecipeError
from shoulders.hub import Pretrained, find, load_strict, open_pretrained, quiet, read_config
from shoulders.teachers import Tap
from shoulders.teachers.checkpoint import Checkpoint, fault
from shoulders.teachers.heads.cuts import Taps
from shoulders.teachers.heads.head import StubEncoder

PROMPTS = ("a photo of a {}.",)
# row of the table of families -> how its texts were padded in training
PADDING: dict[str, bool | str] = {"clip": True, "siglip": "max_length", "siglip2": "max_length"}
DUAL = ("CLIPModel", "SiglipModel", "Siglip2Model")  # classes that hold both towers
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")  # one of them
TEXTS = 256  # at a time


@dataclass(frozen=True)
class Names:
    """Class names as an image-text teacher knows them.

    Args:
        classes: K names.
        prompts: texts with ``{}`` for the name; an embedding is the mean over them (arXiv 2103.00020, section 3.1.4).
        source, revision: the checkpoint with the text tower.
    """

    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    source: str
    revision: str | None = None


@dataclass(frozen=True)
class Matched:
    """How well images fit classes: ``logits`` (B, K), ``scores`` (B, K) in [0, 1], the K ``classes``."""

    logits: Tensor
    scores: Tensor
    classes: tuple[str, ...]


class ZeroShot(nn.Module):
    """Class names on features: ``head(taps).logits`` are the teacher's own.

    Args:
        model: a transformers model with two towers; both are taken out of it.
        names: the classes.
        embeddings: (K, E) what the text tower says of them, one row a class.
        taps: {tap: widths and grid} that the head reads: the last one, whose summary is compared with the texts.
    """

    embeddings: Tensor

    def __init__(self, model: Any, names: Names, embeddings: Tensor, taps: Mapping[str, Tap]) -> None:
        super().__init__()
        self.model, self.names, self.taps, self.processor = model, names, dict(taps), None
        self.image, self.text = StubEncoder(None), StubEncoder(None)
        model.vision_model, model.text_model = self.image, self.text
        for projection in ("visual_projection", "text_projection"):  # of CLIP; the taps come after it
            if hasattr(model, projection):
                setattr(model, projection, nn.Identity())
        self.register_buffer("embeddings", embeddings)
        self.requires_grad_(False).eval()

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index."""
        return list(self.names.classes)

    def forward(self, taps: Taps, classes: Sequence[str] | None = None) -> Matched:
        """How well each image fits each class.

        Args:
            taps: at least the tap of this head.
            classes: other names than the kept ones; new names need the teacher's text tower.

        Raises:
            RecipeError: new names, and the teacher is not at hand.
        """
        summary = taps[list(self.taps)[-1]].parts()["summary"]
        chosen = self.names.classes if classes is None else tuple(classes)
        self.image.answer = BaseModelOutputWithPooling(pooler_output=summary)
        self.text.answer = BaseModelOutputWithPooling(pooler_output=self._embeddings_of(chosen).to(summary.device))
        logits = self.model(input_ids=None, pixel_values=None).logits_per_image  # (B, K)
        # with a bias each pair was trained by itself (SigLIP, arXiv 2303.15343), without it one class among all
        scores = logits.sigmoid() if hasattr(self.model, "logit_bias") else logits.softmax(-1)
        return Matched(logits, scores, chosen)

    def _embeddings_of(self, classes: tuple[str, ...]) -> Tensor:
        """(K, E) of kept names, or of new ones by the teacher's text tower."""
        kept = self.names.classes
        if all(name in kept for name in classes):
            return self.embeddings[[kept.index(name) for name in classes]]
        try:
            pretrained = open_pretrained("classes", self.names.source, self.names.revision)
            config = read_config(pretrained)
            if dual_class(config) is None:
                raise pretrained.fault("holds no text tower")
        except RecipeError as error:
            new = ", ".join(name for name in classes if name not in kept)
            raise RecipeError(
                f"classes: {new}: not kept; this head keeps {', '.join(kept)}, and for new names the text tower of "
                f"its teacher has to be at {self.names.source!r}"
            ) from error
        return embed(load_strict(pretrained, dual_class(config), config), pretrained, classes, self.names.prompts)


def dual_class(config: Any) -> Any:
    """The transformers class of a checkpoint with both towers; None where it was saved as something else."""
    architecture = (config.architectures or [""])[0]
    return getattr(transformers, architecture) if architecture in DUAL else None


def check_zero_shot(name: str, classes: Sequence[str] | None, checkpoint: Checkpoint) -> None:
    """Refuse an image-text teacher whose zero-shot head cannot be kept.

    Raises:
        RecipeError: no classes, no text tower, no tokenizer that loads, or nothing that texts are compared with.
    """
    if not classes:
        raise fault(
            name, "classes", "missing; a kept head of an image-text teacher needs the names to tell apart: [cat, dog]"
        )
    source = checkpoint.pretrained.source
    if dual_class(checkpoint.config) is None:
        raise fault(name, "model", f"{source!r} holds no text tower; give a checkpoint saved as {', '.join(DUAL)}")
    if not getattr(checkpoint.image_config, "vision_use_head", True):
        raise fault(name, "model", f"{source!r} has no pooled vector for images, which texts are compared with")
    missing = [tap for tap in checkpoint.family.taps.of_head(checkpoint.image_config) if tap not in checkpoint.taps]
    if missing:
        raise fault(name, "taps", f"the head also reads {', '.join(missing)}; add them, or leave the key out")
    if not any(find(checkpoint.pretrained, file) for file in VOCABULARIES):  # some classes would start with none
        raise fault(name, "model", f"{source!r} has no tokenizer; add its files: {', '.join(VOCABULARIES)}")
    try:
        open_tokenizer(checkpoint.pretrained)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise fault(name, "model", f"{source!r} has no tokenizer that loads here ({why}); add its files") from error


def load_zero_shot(
    checkpoint: Checkpoint, classes: Sequence[str], prompts: Sequence[str] | None, taps: Mapping[str, Tap]
) -> ZeroShot:
    """The zero-shot head of a checkpoint that `check_zero_shot` accepts.

    Raises:
        RecipeError: two names mean the same to it.
        DataError: weights are missing or broken.
    """
    pretrained = checkpoint.pretrained
    model = load_strict(pretrained, dual_class(checkpoint.config), checkpoint.config)
    names = Names(tuple(classes), tuple(prompts or PROMPTS), pretrained.source, pretrained.revision)
    embeddings = embed(model, pretrained, names.classes, names.prompts)
    if len(embeddings.unique(dim=0)) < len(classes):
        raise pretrained.fault(f"cannot tell some of the classes {', '.join(classes)} apart; give other names for them")
    return ZeroShot(model, names, embeddings, taps)


def open_zero_shot(folder: Path, names: Names, taps: Mapping[str, Tap]) -> ZeroShot:
    """A zero-shot head on disk, built without its towers.

    Raises:
        OSError, KeyError, RuntimeError: something is missing or does not fit.
    """
    weights = load_file(folder / "model.safetensors")
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):  # the towers never get any memory
            model = dual_class(config)(config)
    head = ZeroShot(model, names, weights["embeddings"], taps)
    head.load_state_dict(weights, strict=True, assign=True)
    return head.requires_grad_(False)


def open_tokenizer(pretrained: Pretrained) -> Any:
    """The tokenizer of a checkpoint, never of its own code."""
    with quiet():
        return transformers.AutoTokenizer.from_pretrained(
            pretrained.source, revision=pretrained.revision, trust_remote_code=False
        )


@torch.no_grad()
def embed(model: Any, pretrained: Pretrained, classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """(K, E): the text tower's answer to each class in the one prompt, or the mean of unit vectors over several."""
    tokenizer, config = open_tokenizer(pretrained), model.config
    longest = config.text_config.max_position_embeddings
    texts = [prompt.format(name) for name in classes for prompt in prompts]
    parts = []
    for start in range(0, len(texts), TEXTS):
        tokens = tokenizer(
            texts[start : start + TEXTS],
            padding=PADDING[config.model_type],
            max_length=longest,
            truncation=True,
            return_tensors="pt",
        )
        parts.append(model.eval().get_text_features(**tokens).pooler_output)
    told = torch.cat(parts).unflatten(0, (len(classes), len(prompts)))  # (K, prompts, E)
    # the model itself scales to unit length, so that a single prompt stays what its tower said, bit for bit
    return told[:, 0] if len(prompts) == 1 else F.normalize(told, dim=-1).mean(1)

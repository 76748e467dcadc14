"""Zero-shot classification by an image-text teacher: class names kept as embeddings, without the text tower.

The logits are computed by the teacher's own forward, with both towers replaced by stubs that return their outputs.
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
from shoulders.hub import Pretrained, find_file, load_strict, open_pretrained, quiet, read_config
from shoulders.teachers import Tap
from shoulders.teachers.checkpoint import Checkpoint, teacher_error
from shoulders.teachers.families import FAMILIES, TapFeatures, family_name
from shoulders.teachers.heads.head import ClassScores, StubEncoder, stub_outputs

PROMPTS = ("a photo of a {}.",)
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")  # one of them is needed
TEXTS_PER_BATCH = 256


@dataclass(frozen=True)
class ClassNames:
    """The class names of a zero-shot head.

    Args:
        classes: K names.
        prompts: texts with ``{}`` for the name; an embedding is the mean over them (arXiv 2103.00020, section 3.1.4).
        source, revision: the checkpoint with the text tower.
    """

    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    source: str
    revision: str | None = None


class ZeroShot(nn.Module):
    """The zero-shot head of an image-text teacher: features by tap to the teacher's own logits.

    Args:
        model: a transformers model with two towers; both are removed.
        names: the classes.
        embeddings: (K, E), the output of the text tower for each class.
        taps: {tap: widths and grid} of the features that the head takes; the summary of the last one is compared with
            the texts.
    """

    embeddings: Tensor

    def __init__(self, model: Any, names: ClassNames, embeddings: Tensor, taps: Mapping[str, Tap]) -> None:
        super().__init__()
        self.model, self.names, self.taps, self.processor = model, names, dict(taps), None
        self.image_tower, self.text_tower = StubEncoder(), StubEncoder()
        model.vision_model, model.text_model = self.image_tower, self.text_tower
        for projection in ("visual_projection", "text_projection"):  # CLIP has them; its features come after them
            if hasattr(model, projection):
                setattr(model, projection, nn.Identity())
        self.register_buffer("embeddings", embeddings)
        self.requires_grad_(False).eval()

    @property
    def class_name(self) -> str:
        """The name of the model's class, such as ``CLIPModel``."""
        return type(self.model).__name__

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index."""
        return list(self.names.classes)

    def forward(self, taps: TapFeatures, classes: Sequence[str] | None = None) -> ClassScores:
        """How well each image matches each class.

        Args:
            taps: features of at least this head's tap.
            classes: class names to use instead of the kept ones; new names need the teacher's text tower.

        Raises:
            RecipeError: there are new names, and the teacher's checkpoint is missing.
        """
        summary = taps[list(self.taps)[-1]].components()["summary"]
        names = self.names.classes if classes is None else tuple(classes)
        outputs = {
            self.image_tower: BaseModelOutputWithPooling(pooler_output=summary),
            self.text_tower: BaseModelOutputWithPooling(pooler_output=self._embed(names).to(summary.device)),
        }
        with stub_outputs(outputs):
            logits = self.model(input_ids=None, pixel_values=None).logits_per_image  # (B, K)
        # a model with a bias scores each pair by itself (SigLIP, arXiv 2303.15343), one without it one class among all
        scores = logits.sigmoid() if hasattr(self.model, "logit_bias") else logits.softmax(-1)
        return ClassScores(logits, scores, names)

    def _embed(self, classes: tuple[str, ...]) -> Tensor:
        """(K, E) of kept names, or of new ones by the teacher's text tower."""
        kept = self.names.classes
        if all(name in kept for name in classes):
            return self.embeddings[[kept.index(name) for name in classes]]
        try:
            pretrained = open_pretrained("classes", self.names.source, self.names.revision)
            config = read_config(pretrained)
            if two_tower_class(config) is None:
                raise pretrained.error("has no text tower")
        except RecipeError as error:
            new = ", ".join(name for name in classes if name not in kept)
            raise RecipeError(
                f"classes: {new}: not kept; this head keeps {', '.join(kept)}, and new names need the text tower of "
                f"its teacher at {self.names.source!r}"
            ) from error
        model = load_strict(pretrained, two_tower_class(config), config)
        return embed(model, pretrained, classes, self.names.prompts)


def two_tower_class(config: Any) -> Any:
    """The transformers class of a checkpoint with both towers; None where it was saved as another class."""
    architecture = (config.architectures or [""])[0]
    return getattr(transformers, architecture) if architecture in _two_tower_classes() else None


def _two_tower_classes() -> list[str]:
    return [family.zero_shot.model_class for family in FAMILIES.values() if family.zero_shot]


def check_zero_shot(name: str, classes: Sequence[str] | None, checkpoint: Checkpoint) -> None:
    """Refuse an image-text teacher whose zero-shot head cannot be kept.

    Args:
        name: the teacher's name in the recipe.
        classes: the class names of its entry there.
        checkpoint: its checkpoint.

    Raises:
        RecipeError: there are no classes, no text tower, no tokenizer that loads, or no image vector to compare with
            texts.
    """
    if not classes:
        message = "missing; a kept head of an image-text teacher needs class names: [cat, dog]"
        raise teacher_error(name, "classes", message)
    source = checkpoint.pretrained.source
    if two_tower_class(checkpoint.config) is None:
        message = f"{source!r} has no text tower; give a checkpoint saved as {', '.join(_two_tower_classes())}"
        raise teacher_error(name, "model", message)
    if not getattr(checkpoint.image_config, "vision_use_head", True):
        raise teacher_error(name, "model", f"{source!r} has no pooled image vector to compare with texts")
    head_taps = checkpoint.family.taps.head_names(checkpoint.image_config)
    if missing := [tap for tap in head_taps if tap not in checkpoint.taps]:
        raise teacher_error(name, "taps", f"the head also takes {', '.join(missing)}; add them, or leave the key out")
    _check_tokenizer(name, checkpoint.pretrained)


def _check_tokenizer(name: str, pretrained: Pretrained) -> None:
    source = pretrained.source
    # without these files some tokenizer classes would start with an empty vocabulary
    if not any(find_file(pretrained, file) for file in VOCABULARY_FILES):
        message = f"{source!r} has no tokenizer; add its files: {', '.join(VOCABULARY_FILES)}"
        raise teacher_error(name, "model", message)
    try:
        open_tokenizer(pretrained)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        message = f"{source!r} has a tokenizer that cannot be loaded ({reason}); add its files"
        raise teacher_error(name, "model", message) from error


def load_zero_shot(
    checkpoint: Checkpoint, classes: Sequence[str], prompts: Sequence[str] | None, taps: Mapping[str, Tap]
) -> ZeroShot:
    """The zero-shot head of a checkpoint that passed `check_zero_shot`.

    Args:
        checkpoint: of an image-text model.
        classes: K class names.
        prompts: texts with ``{}`` for the name; default: `PROMPTS`.
        taps: {tap: widths and grid} of the features that the head takes.

    Raises:
        RecipeError: two names have the same embedding.
        DataError: weights are missing or damaged.
    """
    pretrained = checkpoint.pretrained
    model = load_strict(pretrained, two_tower_class(checkpoint.config), checkpoint.config)
    names = ClassNames(tuple(classes), tuple(prompts or PROMPTS), pretrained.source, pretrained.revision)
    embeddings = embed(model, pretrained, names.classes, names.prompts)
    if len(embeddings.unique(dim=0)) < len(classes):
        raise pretrained.error(f"gives some of the classes {', '.join(classes)} the same embedding; rename them")
    return ZeroShot(model, names, embeddings, taps)


def open_zero_shot(folder: Path, names: ClassNames, taps: Mapping[str, Tap]) -> ZeroShot:
    """A zero-shot head on disk, built without its towers.

    Raises:
        OSError, KeyError, RuntimeError: a file or a weight is missing, or a weight has another shape.
    """
    weights = load_file(folder / "model.safetensors")
    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):  # the towers never take memory
            model = two_tower_class(config)(config)
    head = ZeroShot(model, names, weights["embeddings"], taps)
    head.load_state_dict(weights, strict=True, assign=True)
    return head.requires_grad_(False)


def open_tokenizer(pretrained: Pretrained) -> Any:
    """The tokenizer of a checkpoint; code of the checkpoint's own never runs."""
    with quiet():
        return transformers.AutoTokenizer.from_pretrained(
            pretrained.source, revision=pretrained.revision, trust_remote_code=False
        )


@torch.no_grad()
def embed(model: Any, pretrained: Pretrained, classes: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """(K, E): the text tower's output for each class; with several prompts the mean of their unit vectors."""
    tokenizer, padding = open_tokenizer(pretrained), _text_padding(pretrained)
    texts = [prompt.format(name) for name in classes for prompt in prompts]
    parts = []
    for start in range(0, len(texts), TEXTS_PER_BATCH):
        tokens = tokenizer(
            texts[start : start + TEXTS_PER_BATCH],
            padding=padding,
            max_length=model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        parts.append(model.eval().get_text_features(**tokens).pooler_output)
    vectors = torch.cat(parts).unflatten(0, (len(classes), len(prompts)))  # (K, prompts, E)
    # the model itself scales to unit length: with a single prompt the tower's output is kept as it is, bit for bit
    return vectors[:, 0] if len(prompts) == 1 else F.normalize(vectors, dim=-1).mean(1)


def _text_padding(pretrained: Pretrained) -> bool | str:
    spec = FAMILIES[family_name(pretrained.config)].zero_shot
    assert spec is not None  # noqa: S101  # only image-text families have a text tower
    return spec.padding

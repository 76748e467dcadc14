"""Tiny random image-text models with their tokenizers, in transformers format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.teachers.conftest import VIT

NAMES = ("cat", "dog", "red", "green", "house")
LETTERS = ("▁", ".", *"abcdefghijklmnopqrstuvwxyz")
WORDS = ("a", "photo", "of", "drawing", "the", ".", *NAMES)
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
MAX_TEXT_TOKENS = 24
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": MAX_TEXT_TOKENS,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": SPECIAL.index("<s>"),
    "eos_token_id": SPECIAL.index("</s>"),
}
IMAGE_TEXT_MODELS: dict[str, Any] = {
    "clip": lambda: hf.CLIPModel(
        hf.CLIPConfig(vision_config={**VIT, "projection_dim": 12}, text_config=TEXT, projection_dim=12)
    ),
    "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=VIT, text_config=TEXT)),
    "siglip2": lambda: hf.Siglip2Model(
        hf.Siglip2Config(
            vision_config={**{key: value for key, value in VIT.items() if key != "image_size"}, "num_patches": 16},
            text_config=TEXT,
        )
    ),
}


def save_tokenizer(folder: Path, kind: str = "clip") -> None:
    """A tokenizer of whole words with start and end tokens; of letters for SigLIP 2, which takes BPE alone."""
    if kind == "siglip2":
        letters = {letter: number for number, letter in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", *LETTERS))}
        hf.Siglip2Tokenizer(vocab=letters, merges=[]).save_pretrained(folder)
        return
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)


def save_image_text(kind: str, folder: Path, size: int = 32) -> Any:
    """A model with both towers, with no weight at its initial value; it is also returned."""
    torch.manual_seed(0)
    model = IMAGE_TEXT_MODELS[kind]()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder, kind)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": size, "width": size}}))
    return model.eval().requires_grad_(False)

"""HY-WorldPlay's encoders at a tiny size, written in both published layouts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS, FONTS = {"white": 0, "black": 1}, {"en-Serif": 0, "en-Sans": 1, "cn-Song": 0}
TEXT, GLYPHS, VISION = 24, 1472, 20
"""Channels of states, as the golden network takes them."""


@dataclass(frozen=True)
class Tiny:
    """The models themselves, and the tokenizers that belong to them."""

    language: Any
    words: Any
    glyphs: Any
    letters: Any
    vision: Any
    pixels: Any


@cache
def tiny() -> Tiny:
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = transformers.Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    words.add_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    words.chat_template = CHAT
    text = {
        "hidden_size": TEXT, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 300, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6},
    }  # fmt: skip
    seen = {
        "depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": TEXT, "patch_size": 4,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    both = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=seen, tie_word_embeddings=False)
    tokenizer = transformers.ByT5Tokenizer()
    named = ["<color-0>", "<color-1>", "<en-font-0>", "<en-font-1>", "<cn-font-0>"]
    tokenizer.add_tokens(named, special_tokens=True)
    t5 = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=GLYPHS, d_ff=8, d_kv=8, num_heads=2, num_layers=2, num_decoder_layers=1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    siglip = transformers.SiglipVisionConfig(
        hidden_size=VISION, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    processor = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    pixels = processor(size={"height": 28, "width": 28})
    made = Tiny(
        transformers.Qwen2_5_VLForConditionalGeneration(both).eval(), words, transformers.T5EncoderModel(t5).eval(),
        tokenizer, transformers.SiglipVisionModel(siglip).eval(), pixels,
    )  # fmt: skip
    for model in (made.language, made.glyphs, made.vision):
        for parameter in model.parameters():  # at their beginning biases are nothing, and norms do nothing
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def write_converted(folder: Path) -> Path:
    """The layout of a repository for diffusers."""
    t = tiny()
    t.language.model.language_model.save_pretrained(folder / "text_encoder")
    t.words.save_pretrained(folder / "tokenizer")
    t.glyphs.save_pretrained(folder / "text_encoder_2")
    t.letters.save_pretrained(folder / "tokenizer_2")
    t.vision.save_pretrained(folder / "image_encoder")
    t.pixels.save_pretrained(folder / "feature_extractor")
    return folder


def write_original(folder: Path) -> Path:
    """The layout that tencent/HunyuanVideo-1.5 documents."""
    t, texts, image = tiny(), folder / "text_encoder", folder / "vision_encoder" / "siglip"
    t.language.save_pretrained(texts / "llm", max_shard_size="20KB")
    t.words.save_pretrained(texts / "llm")
    transformers.ByT5Tokenizer().save_pretrained(texts / "byt5-small")
    config = {**t.glyphs.config.to_dict(), "vocab_size": 384, "is_encoder_decoder": True, "tie_word_embeddings": False}
    (texts / "byt5-small" / "config.json").write_text(json.dumps(config))
    glyph = texts / "Glyph-SDXL-v2"
    (glyph / "assets").mkdir(parents=True)
    (glyph / "assets" / "color_idx.json").write_text(json.dumps(COLOURS))
    (glyph / "assets" / "multilingual_10-lang_idx.json").write_text(json.dumps(FONTS))
    (glyph / "checkpoints").mkdir()
    tower = {f"module.text_tower.encoder.{k}": v for k, v in t.glyphs.encoder.state_dict().items()}
    trained = {"epoch": 1, "state_dict": {**tower, "module.logit_scale": torch.ones(())}}
    torch.save(trained, glyph / "checkpoints" / "byt5_model.pt")
    t.vision.save_pretrained(image / "image_encoder")
    weights = image / "image_encoder" / "model.safetensors"
    older = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in load_file(weights).items()}
    save_file(older, weights, {"format": "pt"})  # the names that published files have
    t.pixels.save_pretrained(image / "feature_extractor")
    return folder


def picture(width: int = 100, height: int = 90) -> Image.Image:
    """Coloured stripes: every column of its own."""
    columns = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.stack([columns, columns[::-1], columns // 2], -1)[None].repeat(height, 0))

# ruff: noqa: E501 (patterns stand whole, as published)
"""Normalizers and pre-tokenizers as the published tokenizer.json of each family has them.

By the name that llama.cpp gives the family. `default` is llama.cpp's own, the patterns of its source.
"""

from __future__ import annotations

import json
from typing import Any


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


BYTES, GPT2 = byte_level(use_regex=False), byte_level(use_regex=True)
EACH_DIGIT = {"type": "Digits", "individual_digits": True}
LLAMA3 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = split(
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
MINICPM5 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = [
    split(r"\p{N}{1,3}"),
    split("[一-龥぀-ゟ゠-ヿ]+"),
    split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
]
DEEPSEEK_CODER = [
    split("[\r\n]"),
    split(r"\s?\p{L}+"),
    split(r"\s?\p{P}+"),
    split("[一-龥ࠀ-一가-퟿]+"),
    EACH_DIGIT,
]
BLOOM = split(r" ?[^(\s|[.,!?…。，、।۔،])]+")
FALCON = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    GPT2,
    {"type": "Digits", "individual_digits": False},
    split("[0-9][0-9][0-9]"),
]
DEFAULT = [
    split(r"[\p{P}\$\+<=>\^~\|]+"),
    split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
    split(r"\p{N}+"),
    split("[0-9][0-9][0-9]"),
]

# name: normalizer, steps, ignore_merges
PUBLISHED: dict[str, tuple[str | None, list[dict[str, Any]], bool]] = {
    "gpt-2": (None, [GPT2], False),
    "olmo": ("NFC", [GPT2], False),  # GPT-NeoX's
    "smollm": (None, [EACH_DIGIT, GPT2], False),
    "command-r": ("NFC", [EACH_DIGIT, GPT2], False),
    "exaone": ("NFKC", [EACH_DIGIT, GPT2], False),
    "llama-bpe": (None, [LLAMA3, BYTES], True),
    "smaug-bpe": (None, [LLAMA3, BYTES], False),
    "qwen2": ("NFC", [QWEN2, BYTES], False),
    "deepseek-r1-qwen": ("NFC", [QWEN2, BYTES], False),
    "stablelm2": (None, [QWEN2, BYTES], False),
    "qwen35": ("NFC", [QWEN35, BYTES], False),
    "seed-coder": (None, [SEED, BYTES], False),
    "minicpm5": (None, [split(r"\p{N}{1,3}"), MINICPM5, BYTES], True),
    "tekken": (None, [TEKKEN, BYTES], True),
    "gpt-4o": (None, [O200K, BYTES], False),
    "minimax-m2": ("NFC", [O200K, BYTES], False),
    "deepseek-coder": (None, [*DEEPSEEK_CODER, BYTES], False),
    "deepseek-v3": (None, [*DEEPSEEK_V3, BYTES], False),
    "bloom": (None, [BLOOM, BYTES], False),
    "viking": (None, [BLOOM, EACH_DIGIT, BYTES], False),
    "falcon": (None, FALCON, False),
    "default": (None, [*DEFAULT, BYTES], False),
}


def tokenizer_json(
    name: str,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    added: list[dict[str, Any]],
) -> str:
    """A tokenizer.json of that family with another vocabulary."""
    normalizer, steps, ignore_merges = PUBLISHED[name]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": normalizer} if normalizer else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": ignore_merges},
        }
    )

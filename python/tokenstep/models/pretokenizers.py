"""How byte-level BPE vocabularies cut a text into words before merging, by the names that GGUF files give.

A GGUF file holds the name only, so normalisation and patterns stand here: those of the families' published
tokenizer.json. Where other programs cut otherwise (llama.cpp leaves the text unnormalised), the model was
trained with what stands here. `default` is llama.cpp's, for files that name none.
"""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True)
class PreTokenizer:
    """The steps from a text to words in GPT-2's byte alphabet.

    Attributes:
        steps: applied one after the other, each to the pieces that the one before left. A string is a
            pattern: its matches become pieces, and so does what stands between them.
        normalizer: applied first.
        ignore_merges: a word that is a token is cut no further.
        adds_bos: texts begin with the begin token where the file doesn't say.
    """

    steps: tuple[str | pre_tokenizers.PreTokenizer, ...]
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False
    adds_bos: bool = False

    def install(self, backend: tokenizers.Tokenizer) -> None:
        """Sets normalizer and pre-tokenizer of `backend`."""
        steps = [
            pre_tokenizers.Split(Regex(step), "isolated") if isinstance(step, str) else step
            for step in self.steps
        ]
        if not any(isinstance(step, pre_tokenizers.ByteLevel) for step in steps):
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if self.normalizer is not None:
            backend.normalizer = self.normalizer


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGIT = pre_tokenizers.Digits(individual_digits=True)
_NFC = normalizers.NFC()

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_OTHER}|{_SPACE}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_OTHER}|{_SPACE}"
_QWEN35 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
_SEED = rf"{_SHORT}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}"
_MINICPM5 = rf"{_SHORT}|{_WORD}|\p{{N}}+|{_OTHER}|{_SPACE}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_OTHER_OR_PATH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_OTHER_OR_PATH}|{_SPACE}"
_GPT4O = rf"{_CASED % (_SHORT + '?', _SHORT + '?')}|\p{{N}}{{1,3}}|{_OTHER_OR_PATH}|{_SPACE}"

_CJK = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}",
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_FALCON = (
    pre_tokenizers.Punctuation("contiguous"),
    _GPT2,
    pre_tokenizers.Digits(individual_digits=False),
    "[0-9][0-9][0-9]",
)
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    "[0-9][0-9][0-9]",
)

_PRE_TOKENIZERS = {
    "gpt-2 phi-2 jais trillion granite-docling exaone4 a.x-4.0 mellum": PreTokenizer((_GPT2,)),
    "mpt olmo": PreTokenizer((_GPT2,), _NFC),
    "smollm starcoder refact codeshell minerva-7b mellum2": PreTokenizer((_DIGIT, _GPT2)),
    "command-r": PreTokenizer((_DIGIT, _GPT2), _NFC),
    "exaone": PreTokenizer((_DIGIT, _GPT2), normalizers.NFKC()),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
        (_LLAMA3,), ignore_merges=True, adds_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": PreTokenizer((_QWEN2,), _NFC),
    "stablelm2 hunyuan solar-open grok-2": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_QWEN35,), _NFC),
    "seed-coder": PreTokenizer((_SEED,)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _MINICPM5), ignore_merges=True),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "gpt-4o llama4 kanana2 talkie": PreTokenizer((_GPT4O,)),
    "minimax-m2": PreTokenizer((_GPT4O,), _NFC),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer(_DEEPSEEK_V3),
    "poro-chat bloom gpt3-finnish": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, _DIGIT)),
    "falcon": PreTokenizer(_FALCON),
    "default": PreTokenizer(_DEFAULT),
}
PRE_TOKENIZERS = {name: pre for names, pre in _PRE_TOKENIZERS.items() for name in names.split()}

"""A small byte-level tokenizer, as tokenizer.json and as GGUF metadata."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import tokenizers
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<|begin|>", "<|end|>", "<|user|>")
BOS, EOS = 0, 1
VOCAB_SIZE = 280
TEXT = "the theory of the other things that then there were, and 1234567890 in the end"


@cache
def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """GPT-2's pipeline with a vocabulary trained on one sentence; begins texts with <|begin|>."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def add_byte_level_metadata(writer: GGUFWriter) -> None:
    """The same tokenizer as metadata of a GGUF file."""
    add_bpe_metadata(writer, byte_level_tokenizer(), pre="gpt-2")
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)


def add_bpe_metadata(writer: GGUFWriter, tokenizer: tokenizers.Tokenizer, pre: str) -> None:
    """Vocabulary, token types and merges of a byte-level tokenizer."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary(tokenizer))
    writer.add_token_types(token_types(tokenizer))
    writer.add_token_merges([" ".join(merge) for merge in merges(tokenizer)])


def vocabulary(tokenizer: tokenizers.Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]


def token_types(tokenizer: tokenizers.Tokenizer) -> list[TokenType]:
    added = tokenizer.get_added_tokens_decoder()
    return [
        TokenType.NORMAL
        if i not in added
        else TokenType.CONTROL
        if added[i].special
        else TokenType.USER_DEFINED
        for i in range(tokenizer.get_vocab_size())
    ]


def merges(tokenizer: tokenizers.Tokenizer) -> Sequence[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]

"""Byte-level tokenizers from GGUF metadata against the published tokenizer.json of each family."""

from __future__ import annotations

import itertools
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers
from published_tokenizers import PUBLISHED, tokenizer_json
from texts import texts
from tiny_tokenizers import merges, token_types, vocabulary
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenstep.models import Tokenizer
from tokenstep.models.fields import Fields
from tokenstep.models.pretokenizers import PRE_TOKENIZERS
from tokenstep.models.tokenizer import byte_alphabet
from tokenstep.models.tokenizer_gguf import load_gguf_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜begin▁of▁sentence｜>", "<pad>")
USER_DEFINED = ("<tool>", "  ", "\n\n\t")
BOS, EOS = 0, 2


@cache
def trained() -> tokenizers.Tokenizer:
    """A vocabulary of words that cross every kind of word boundary, so that another cut gives other ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL + USER_DEFINED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(count=1500), trainer)
    contents = json.loads(tokenizer.to_str())  # the trainer takes all of them for special
    for added in contents["added_tokens"]:
        added["special"] = added["content"] in SPECIAL
    for word in ("Fontainebleau", "camelCaseWordsHTTPServer", "Fußballübungsleiter"):  # no merges lead there
        token = "".join(byte_alphabet()[byte] for byte in f" {word}".encode())
        contents["model"]["vocab"][token] = len(contents["model"]["vocab"])
    return tokenizers.Tokenizer.from_str(json.dumps(contents))


def metadata(pre: str, **changes: Any) -> Fields:
    """`tokenizer.ggml.*` of the trained vocabulary, as the reader gives it."""
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": vocabulary(trained()),
        "token_type": np.array(token_types(trained()), np.int32),
        "merges": [" ".join(merge) for merge in merges(trained())],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "add_bos_token": False,
        **changes,
    }
    values = {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not ...}
    return Fields(values, "tiny.gguf")


def from_gguf(pre: str, **changes: Any) -> Tokenizer:
    return load_gguf_tokenizer(metadata(pre, **changes), BOS, (EOS,))


def published(name: str) -> tokenizers.Tokenizer:
    added = json.loads(trained().to_str())["added_tokens"]
    ids = {token: index for index, token in enumerate(vocabulary(trained()))}
    return tokenizers.Tokenizer.from_str(tokenizer_json(name, ids, list(merges(trained())), added))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_family_s_texts_become_the_ids_of_its_tokenizer_json_and_texts_again(name: str) -> None:
    ours, theirs = from_gguf(name), published(name)
    all_texts = texts(SPECIAL + USER_DEFINED)[::2]
    for text, encoding in zip(all_texts, theirs.encode_batch(all_texts), strict=True):
        ids = ours.encode(text)
        assert ids == encoding.ids, text
        assert ours.fewest_tokens(text) <= len(ids)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids)


def test_every_kind_is_compared_with_its_publication() -> None:
    compared = {id(PRE_TOKENIZERS[name]) for name in PUBLISHED}
    assert {id(pre) for pre in PRE_TOKENIZERS.values()} == compared


def test_the_texts_tell_the_families_apart() -> None:
    """Any two different definitions give some text different ids: a mixed up entry would show."""

    def ids(name: str) -> list[list[int]]:
        return [encoding.ids for encoding in published(name).encode_batch(texts(SPECIAL + USER_DEFINED)[::3])]

    encoded = {name: ids(name) for name in PUBLISHED}
    for first, second in itertools.combinations(PUBLISHED, 2):
        same = PUBLISHED[first] == PUBLISHED[second]
        assert (encoded[first] == encoded[second]) is same, (first, second)


def test_transformers_gives_the_same_ids_and_text() -> None:
    ours = from_gguf("qwen2")
    theirs = PreTrainedTokenizerFast(tokenizer_object=published("qwen2"))
    for text in texts(SPECIAL + USER_DEFINED)[::10]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_bytes_of_the_ids_are_the_text() -> None:
    ours = from_gguf("llama-bpe")
    for text in texts(SPECIAL + USER_DEFINED):
        assert b"".join(map(ours.token_bytes, ours.encode(text))) == text.encode()


def test_special_tokens_in_a_text_become_their_ids_and_are_left_out_of_decoded_text() -> None:
    ours = from_gguf("smollm")
    start, end, tool = (ours.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>", "<tool>"))
    ids = ours.encode("<|im_start|>a<tool>b<|im_end|>")

    assert (ids[0], ids[-1], ids[2]) == (start, end, tool)
    assert ours.decode(ids) == "a<tool>b"
    assert ours.decode(ids, skip_special_tokens=False) == "<|im_start|>a<tool>b<|im_end|>"
    assert ours.is_special(start)
    assert not ours.is_special(tool)


def test_the_begin_token_is_never_doubled() -> None:
    ours = from_gguf("gpt-2", add_bos_token=True)
    plain = from_gguf("gpt-2").encode("a b")

    assert ours.encode("a b") == [BOS, *plain]
    assert ours.encode(SPECIAL[BOS] + "a b") == [BOS, *plain]
    assert ours.encode("a b", add_special_tokens=False) == plain
    assert ours.encode("") == [BOS]


@pytest.mark.parametrize(
    ("pre", "flag", "begins"),
    [
        ("gpt-2", ..., False),
        ("qwen2", ..., False),
        ("llama-bpe", ..., True),
        ("tekken", ..., True),
        ("llama-bpe", False, False),
        ("qwen2", True, True),
    ],
)
def test_texts_begin_with_the_begin_token_where_the_file_or_else_the_family_says_so(
    pre: str, flag: Any, begins: bool
) -> None:
    assert (from_gguf(pre, add_bos_token=flag).encode("a")[0] == BOS) is begins


def test_texts_end_with_the_end_token_where_the_file_says_so() -> None:
    plain = from_gguf("gpt-2").encode("a b")
    assert from_gguf("gpt-2", add_eos_token=True).encode("a b") == [*plain, EOS]


def test_a_file_without_types_has_no_special_tokens() -> None:
    ours = from_gguf("gpt-2", token_type=...)
    assert ours.decode(ours.encode("<|im_end|>")) == "<|im_end|>"
    assert not ours.is_special(EOS)


def test_ids_that_only_fill_the_embedding_are_not_the_tokenizer_s() -> None:
    tokens = vocabulary(trained())
    filled = [*tokens, f"[PAD{len(tokens)}]", f"[PAD{len(tokens) + 1}]"]
    types = np.array([*token_types(trained()), 5, 5], np.int32)
    ours = from_gguf("gpt-2", tokens=filled, token_type=types)

    assert ours.vocab_size == len(tokens)
    assert ours.token_bytes(len(tokens)) == b""
    assert ours.token_bytes(-1) == b""


def test_an_unpaired_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text\[2\] = '\\ud800', expected no unpaired surrogates"):
        from_gguf("gpt-2").encode("ab\ud800")

"""A tokenizer from GGUF metadata: byte-level BPE, or SentencePiece's BPE by scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, models, normalizers

from tokenstep.models.chat_template import gguf_chat_template
from tokenstep.models.errors import ModelFileError
from tokenstep.models.fields import Fields
from tokenstep.models.pretokenizers import PRE_TOKENIZERS
from tokenstep.models.tokenizer import Tokenizer

MODELS = ("gpt2", "llama")
SPECIAL_TOKENS = {  # what chat templates call them
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


def load_gguf_tokenizer(
    fields: Fields, bos_token_id: int | None, eos_token_ids: tuple[int, ...]
) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Raises UnsupportedConfig for a kind of model or pre-tokenizer that we don't have, ModelFileError for
    metadata that doesn't fit together.
    """
    kind = fields.choice("tokenizer.ggml.model", MODELS)
    tokens, types, scores = _vocabulary(fields)
    if kind == "gpt2":
        backend, adds_bos = _byte_level(fields, tokens)
        first_space = False
    else:
        first_space = fields.flag("tokenizer.ggml.add_space_prefix", True)
        # they are looked for in the text itself; older converters spelt their spaces as the vocabulary does
        tokens = [
            token.replace("▁", " ") if kind_of == USER_DEFINED else token
            for token, kind_of in zip(tokens, types, strict=True)
        ]
        backend, adds_bos = _sentencepiece(fields, tokens, types, scores, first_space), True
    backend.add_tokens(
        [
            AddedToken(token, special=kind_of != USER_DEFINED, normalized=False)
            for token, kind_of in zip(tokens, types, strict=True)
            if kind_of in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    adds_bos = fields.flag("tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = fields.flag("tokenizer.ggml.add_eos_token", False)
    tokenizer = Tokenizer(
        backend,
        "byte_level" if kind == "gpt2" else "sentencepiece",
        prefix=(bos_token_id,) if adds_bos and bos_token_id is not None else (),
        suffix=fields.token_ids("tokenizer.ggml.eos_token_id") if adds_eos else (),
        strips_first_space=first_space,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        vocab_size=len(tokens),
    )
    special = {name: fields.token_ids(f"tokenizer.ggml.{key}") for name, key in SPECIAL_TOKENS.items()}
    named = {name: ids[0] if ids else None for name, ids in special.items()}
    tokenizer.chat_template = gguf_chat_template(fields, tokenizer.names(named))
    return tokenizer


def _vocabulary(fields: Fields) -> tuple[list[str], list[int], list[float] | None]:
    """Tokens, types and scores, without the padding at the end that only fills the embedding's rows."""
    tokens = fields.strings("tokenizer.ggml.tokens")
    types, scores = [NORMAL] * len(tokens), None
    if fields.has("tokenizer.ggml.token_type"):
        types = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    if fields.has("tokenizer.ggml.scores"):
        scores = fields.numbers("tokenizer.ggml.scores", len(tokens))
    end = len(tokens)
    while end and types[end - 1] == UNUSED and tokens[end - 1] == f"[PAD{end - 1}]":
        end -= 1
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens[:end])]
    if len(set(tokens)) < len(tokens):
        [(twice, _)] = Counter(tokens).most_common(1)
        raise ModelFileError(f"tokenstep.load: {fields.source}: tokenizer.ggml.tokens has {twice!r} twice")
    return tokens, types[:end], scores and scores[:end]


def _byte_level(fields: Fields, tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """BPE over GPT-2's byte alphabet; and whether such vocabularies begin a text with the begin token."""
    pre = PRE_TOKENIZERS[fields.choice("tokenizer.ggml.pre", tuple(PRE_TOKENIZERS), "default")]
    merges = []
    for merge in fields.strings("tokenizer.ggml.merges"):
        cut = merge.find(" ", 1)
        merges.append((merge[:cut], merge[cut + 1 :]) if cut > 0 else (merge, ""))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelFileError(f"tokenstep.load: {fields.source}: tokenizer.ggml.merges: {error}") from None
    backend = tokenizers.Tokenizer(model)
    pre.install(backend)
    return backend, pre.adds_bos


def _sentencepiece(
    fields: Fields,
    tokens: list[str],
    types: Sequence[int],
    scores: Sequence[float] | None,
    first_space: bool,
) -> tokenizers.Tokenizer:
    """BPE over characters with spaces written ▁; characters without a token fall back to bytes."""
    if scores is None:
        raise ModelFileError(f"tokenstep.load: {fields.source}: tokenizer.ggml.scores is missing")
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges_from_scores(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if first_space else [spaces])
    return backend


def merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The merges that make BPE by ranks cut as SentencePiece does by scores.

    SentencePiece joins the two neighbours whose union is the token with the best score. So each way to cut a
    token into two tokens is a merge, and better tokens come first. Only normal tokens take part: bytes,
    control and user-defined tokens are never made by merging.
    """
    usual = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, UNUSED)}
    best_first = sorted(range(len(tokens)), key=lambda index: -scores[index])
    merges = []
    for index in best_first:
        token = tokens[index]
        if token in usual:
            for cut in range(len(token) - 1, 0, -1):
                if token[:cut] in usual and token[cut:] in usual:
                    merges.append((token[:cut], token[cut:]))
    return merges

"""SentencePiece-style tokenizers from GGUF metadata, against the algorithm and against sentencepiece."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import texts
from tokenizers import decoders, models

from tokenstep.models import Tokenizer
from tokenstep.models.fields import Fields
from tokenstep.models.tokenizer_gguf import load_gguf_tokenizer

UNKNOWN, BOS, EOS = 0, 1, 2
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
USER_TOKENS = ["<start_of_turn>", "\n\n", "  "]
FIXED = sorted(["<unk>", "<s>", "</s>", *USER_TOKENS], key=len, reverse=True)


class Vocabulary:
    """Control tokens, user-defined tokens, 256 bytes, then `pieces`, the first with the best score."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.tokens = [
            "<unk>",
            "<s>",
            "</s>",
            *USER_TOKENS,
            *(f"<0x{byte:02X}>" for byte in range(256)),
            *pieces,
        ]
        self.types = [2, CONTROL, CONTROL, *[USER_DEFINED] * 3, *[BYTE] * 256, *[NORMAL] * len(pieces)]
        self.scores = [0.0] * (len(self.tokens) - len(pieces)) + [-float(i) for i in range(len(pieces))]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self.ranks = {piece: rank for rank, piece in enumerate(pieces)}

    def load(self, **changes: Any) -> Tokenizer:
        values = {
            "model": "llama",
            "tokens": self.tokens,
            "token_type": np.array(self.types, np.int32),
            "scores": np.array(self.scores, np.float32),
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            **changes,
        }
        values = {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not ...}
        return load_gguf_tokenizer(Fields(values, "tiny.gguf"), BOS, (EOS,))

    def encode_by_definition(self, text: str, first_space: bool) -> list[int]:
        """Joins the two neighbours whose union has the best score, leftmost first, while there are any."""
        ids = []
        for segment in self._segments(text):
            if segment in FIXED:
                ids.append(self.ids[segment])
                continue
            symbols = list(("▁" if first_space else "") + segment.replace(" ", "▁"))
            while True:
                unions = [a + b for a, b in itertools.pairwise(symbols)]
                known = [(self.ranks[union], i) for i, union in enumerate(unions) if union in self.ranks]
                if not known:
                    break
                at = min(known)[1]
                symbols[at : at + 2] = [unions[at]]
            for symbol in symbols:
                spelt = [symbol] if symbol in self.ranks else [f"<0x{byte:02X}>" for byte in symbol.encode()]
                ids += [self.ids[token] for token in spelt]
        return ids

    def _segments(self, text: str) -> list[str]:
        """The text cut at control and user-defined tokens, the longest first at each place."""
        segments = [""]
        while text:
            found = next((token for token in FIXED if text.startswith(token)), None)
            if found:
                segments += [found, ""]
            else:
                segments[-1] += text[0]
            text = text[len(found or text[0]) :]
        return [segment for segment in segments if segment]


def trained_pieces() -> list[str]:
    """Frequent substrings of the texts, so that many words have several ways to be merged."""
    counts: dict[str, int] = {}
    for text in texts(count=1200):
        marked = text.replace(" ", "▁")
        for length in range(1, 6):
            for start in range(len(marked) - length + 1):
                piece = marked[start : start + length]
                counts[piece] = counts.get(piece, 0) + length
    for taken in ("\n\n", "▁▁"):
        del counts[taken]
    best = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return [piece for piece in best if len(piece) > 1][:1500] + [piece for piece in best if len(piece) == 1][
        :400
    ]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(trained_pieces())


@pytest.mark.parametrize("first_space", [True, False])
def test_texts_are_cut_as_the_algorithm_says_and_come_back(vocabulary: Vocabulary, first_space: bool) -> None:
    ours = vocabulary.load(add_space_prefix=first_space)
    for text in texts(("<s>", "</s>", "<unk>", *USER_TOKENS)):
        if len(text) > 60:
            continue
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == vocabulary.encode_by_definition(text, first_space), text
        assert ours.fewest_tokens(text) <= len(ids)
        if "▁" not in text and not (first_space and any(token in text for token in FIXED)):
            assert ours.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.text("ab▁c", min_size=1, max_size=6), unique=True, max_size=40),
    text=st.text("abc x\n", max_size=30),
    first_space=st.booleans(),
)
def test_any_vocabulary_is_cut_as_the_algorithm_says(pieces: list[str], text: str, first_space: bool) -> None:
    characters = sorted(set("".join(pieces)) - set(pieces))  # as every trained vocabulary has them
    vocabulary = Vocabulary(pieces + characters)
    ours = vocabulary.load(add_space_prefix=first_space)
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == vocabulary.encode_by_definition(text, first_space)
    assert ours.fewest_tokens(text) <= len(ids)


@pytest.mark.parametrize("first_space", [True, False])
def test_decoded_text_is_that_of_the_published_decoder(vocabulary: Vocabulary, first_space: bool) -> None:
    ours = vocabulary.load(add_space_prefix=first_space)
    theirs = tokenizers.Tokenizer(models.BPE(vocab=vocabulary.ids, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    theirs.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if first_space else steps)
    for text in texts(("<s>", "</s>", *USER_TOKENS)):
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


def test_a_text_comes_back_though_only_its_spaces_are_known() -> None:
    ours = Vocabulary(["▁"]).load()
    for text in texts():
        if "▁" not in text and not any(token in text for token in FIXED):
            assert ours.decode(ours.encode(text)) == text


def test_the_begin_token_is_put_before_unless_it_is_there_or_switched_off(vocabulary: Vocabulary) -> None:
    ours = vocabulary.load()
    plain = ours.encode("a b", add_special_tokens=False)

    assert ours.encode("a b") == [BOS, *plain]
    assert ours.encode("<s>a b") == [BOS, *plain]
    assert vocabulary.load(add_bos_token=False).encode("a b") == plain
    assert vocabulary.load(add_eos_token=True).encode("a b") == [BOS, *plain, EOS]


def test_spaces_in_user_defined_tokens_may_be_written_either_way(vocabulary: Vocabulary) -> None:
    """Files of older converters spell them as the vocabulary spells spaces."""
    older = [token.replace(" ", "▁") if token in USER_TOKENS else token for token in vocabulary.tokens]
    newer, other = vocabulary.load(), vocabulary.load(tokens=older)
    for text in texts(tuple(USER_TOKENS)):
        assert other.encode(text) == newer.encode(text)
        assert other.decode(newer.encode(text)) == newer.decode(newer.encode(text))


def test_the_name_of_a_byte_in_a_text_does_not_become_the_byte() -> None:
    ours = Vocabulary([*"▁<0xA>", "<0", "x0", "A>", "<0x0"]).load(add_space_prefix=False)
    ids = ours.encode("<0x0A>", add_special_tokens=False)

    assert [ours.token_bytes(i) for i in ids] == [b"<0x0", b"A>"]


def test_a_vocabulary_without_bytes_gives_the_unknown_token() -> None:
    vocabulary = Vocabulary(["a", "▁"])
    types = [kind if kind != BYTE else 5 for kind in vocabulary.types]
    tokens = [token.replace("<0x", "<no ") for token in vocabulary.tokens]
    ours = vocabulary.load(tokens=tokens, token_type=np.array(types, np.int32))
    ids = ours.encode("aééa", add_special_tokens=False)

    assert ours.fewest_tokens("é" * 100) == 0
    assert ids == [vocabulary.ids["▁"], vocabulary.ids["a"], UNKNOWN, vocabulary.ids["a"]]


@pytest.mark.peer
@pytest.mark.parametrize("first_space", [True, False])
def test_texts_become_the_ids_of_sentencepiece(tmp_path: Path, first_space: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in texts(count=2000) if "\0" not in text]),
        model_prefix=str(tmp_path / "tiny"),
        model_type="bpe",
        vocab_size=3000,
        character_coverage=0.99,
        minloglevel=2,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=first_space,
        user_defined_symbols=["<tool>", "  "],
        max_sentence_length=10000,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tiny.model"))
    count = theirs.get_piece_size()

    def kind(i: int) -> int:
        if theirs.is_unknown(i):
            return 2
        if theirs.is_control(i):
            return CONTROL
        if theirs.is_byte(i):
            return BYTE
        return USER_DEFINED if theirs.id_to_piece(i) in ("<tool>", "▁▁") else NORMAL

    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.token_type": np.array([kind(i) for i in range(count)], np.int32),
        "tokenizer.ggml.scores": np.array([theirs.get_score(i) for i in range(count)], np.float32),
        "tokenizer.ggml.add_space_prefix": first_space,
    }
    ours = load_gguf_tokenizer(Fields(values, "tiny.gguf"), BOS, (EOS,))
    for text in texts(("<tool>",)):
        # sentencepiece puts its space before the whole text only, tokenizer.json before each part of it
        parted = "<tool>" in text or "  " in text
        if "\0" not in text and not (first_space and parted):
            assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), text

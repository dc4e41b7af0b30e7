"""Tokenizers from tokenizer.json, of every style the families publish, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from texts import texts
from tiny_tokenizers import BOS, EOS, SPECIAL, byte_level_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tokenstep.models import ModelFileError, Tokenizer, UnsupportedConfig
from tokenstep.models.tokenizer import load_tokenizer_json

SPACES = normalizers.Replace(" ", "▁")
WITHOUT_SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
STYLES: dict[str, dict[str, Any]] = {
    "llama-2": {
        "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), SPACES]),
        "decoder": decoders.Sequence([*WITHOUT_SPACES, decoders.Strip(" ", 1, 0)]),
    },
    "mistral": {
        "pre_tokenizer": pre_tokenizers.Metaspace("▁", "first", split=False),
        "decoder": decoders.Sequence([*WITHOUT_SPACES, decoders.Strip(" ", 1, 0)]),
    },
    "gemma": {
        "normalizer": SPACES,
        "pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous"),
        "decoder": decoders.Sequence(WITHOUT_SPACES),
    },
    "metaspace": {
        "pre_tokenizer": pre_tokenizers.Metaspace("▁", "always", split=True),
        "decoder": decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace("▁", "always", split=True)]
        ),
    },
    "metaspace, no space before": {
        "pre_tokenizer": pre_tokenizers.Metaspace("▁", "never", split=True),
        "decoder": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "never", split=True)]),
    },
}


def sentencepiece_style(style: str) -> tokenizers.Tokenizer:
    """A small BPE with byte fallback in that style; begins texts with <|begin|>."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    for part, value in STYLES[style].items():
        setattr(tokenizer, part, value)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        texts(count=800), trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    )
    contents = json.loads(tokenizer.to_str())
    contents["added_tokens"] = contents["added_tokens"][: len(SPECIAL)]  # bytes are no added tokens
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(contents))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return tokenizer


def loaded(tokenizer: tokenizers.Tokenizer, folder: Path) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer_json(path, BOS, (EOS,)), PreTrainedTokenizerFast(tokenizer_file=str(path))


def assert_same(ours: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    for text in texts(SPECIAL)[::2]:
        ids = theirs(text)["input_ids"]
        if not text.startswith(SPECIAL[BOS]):  # transformers doubles the begin token
            assert ours.encode(text) == ids, text
            assert ours.fewest_tokens(text) <= len(ids)
        assert (
            ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        )
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        plain = [i for i in ids if not ours.is_special(i)]  # transformers may strip behind a special token
        assert ours.decode(plain) == theirs.decode(plain, skip_special_tokens=True)


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, style: str) -> None:
    assert_same(*loaded(sentencepiece_style(style), tmp_path))


def test_byte_level_ids_and_text_are_those_of_transformers(tmp_path: Path) -> None:
    assert_same(*loaded(byte_level_tokenizer(), tmp_path))


@pytest.mark.parametrize("style", STYLES)
def test_the_bytes_of_the_ids_are_the_text(tmp_path: Path, style: str) -> None:
    ours, _ = loaded(sentencepiece_style(style), tmp_path)
    for text in texts():
        if "▁" not in text and "<0x" not in text:
            spelt = b"".join(map(ours.token_bytes, ours.encode(text, add_special_tokens=False)))
            assert spelt.decode() in (text, " " + text)


def test_what_the_template_puts_around_a_text_is_put_around_it(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(byte_level_tokenizer().to_str())
    plain = tokenizer.encode("the end", add_special_tokens=False).ids
    for template, before, behind in (("$A", [], []), ("<|user|> $A <|end|>", [2], [EOS])):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, index) for index, token in enumerate(SPECIAL)]
        )
        ours, _ = loaded(tokenizer, tmp_path)
        assert ours.encode("the end") == [*before, *plain, *behind]


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(byte_level_tokenizer().to_str())
    plain = tokenizer.encode("the end of the theory").ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    ours, _ = loaded(tokenizer, tmp_path)

    assert ours.encode("the end of the theory") == plain


def test_ids_may_have_holes(tmp_path: Path) -> None:
    contents = json.loads(byte_level_tokenizer().to_str())
    contents["model"]["vocab"]["Ġextra"] = 500
    ours, _ = loaded(tokenizers.Tokenizer.from_str(json.dumps(contents)), tmp_path)

    assert ours.vocab_size == 501
    assert ours.token_bytes(500) == b" extra"
    assert ours.token_bytes(400) == ours.token_bytes(501) == b""


def test_a_word_piece_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedConfig, match=r"decoder = WordPiece, expected ByteLevel, ByteFallback"):
        loaded(tokenizer, tmp_path)


@pytest.mark.parametrize("contents", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "\0"])
def test_a_damaged_file_is_named(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(contents)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: "):
        load_tokenizer_json(path, None, ())
    path.unlink()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: the tokenizer is missing"):
        load_tokenizer_json(path, None, ())


def test_an_added_token_that_is_special_in_name_only_stays_in_the_text(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    ours, _ = loaded(tokenizer, tmp_path)

    assert ours.decode(ours.encode("a<tool>b")) == "a<tool>b"

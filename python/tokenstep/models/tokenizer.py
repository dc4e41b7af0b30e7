"""Text to token ids and back, over the `tokenizers` library; and the exact bytes of each token."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers

from tokenstep.models.chat_template import ChatTemplate, folder_chat_template
from tokenstep.models.errors import ModelFileError, UnsupportedConfig

Spelling = Literal["byte_level", "sentencepiece"]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


class Tokenizer:
    """A model's tokenizer.

    Args:
        backend: the pipeline; its post-processor isn't used.
        spelling: how the vocabulary writes bytes: GPT-2's alphabet, or ▁ for a space and <0xE2> for a byte.
        prefix: ids put in front of a text, the begin token where the model has one.
        suffix: ids put behind a text.
        strips_first_space: decoded text loses the one space that encoding puts before it.
        bos_token_id: the begin token.
        eos_token_ids: the end tokens.
        vocab_size: the number of ids; None: all that the backend has.

    Attributes:
        chat_template: how the model wants conversations written; None where its files don't say.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        spelling: Spelling,
        *,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        strips_first_space: bool = False,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        vocab_size: int | None = None,
    ) -> None:
        self.backend = backend
        self.spelling = spelling
        self.strips_first_space = strips_first_space
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.chat_template: ChatTemplate | None = None
        self.vocab_size = _count_ids(backend) if vocab_size is None else vocab_size
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        added = backend.get_added_tokens_decoder()
        self._added: dict[int, bytes] = {i: token.content.encode() for i, token in added.items()}
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written in it become their ids.

        Args:
            text: any string.
            add_special_tokens: put the model's begin (and end) tokens around, the begin token only where the
                text doesn't begin with it already.

        Raises:
            ValueError: the text has an unpaired surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"tokenstep.encode: text[{error.start}] = {text[error.start]!r}, expected no unpaired"
                " surrogates"
            ) from None
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if not add_special_tokens:
            return ids
        begun = bool(self._prefix) and ids[: len(self._prefix)] == self._prefix
        return ([] if begun else self._prefix) + ids + self._suffix

    def fewest_tokens(self, text: str) -> int:
        """At least so many ids `encode` gives: told from the text's size, far quicker than encoding it."""
        if not self._longest_token:
            return 0
        sizes = [len(text.encode("utf-8", "surrogatepass"))]
        if normalizer := self.backend.normalizer:
            sizes.append(len(normalizer.normalize_str(text).encode("utf-8", "surrogatepass")))
        return min(sizes) // self._longest_token

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        special = self._special if skip_special_tokens else frozenset()
        text = b"".join(self.token_bytes(i) for i in ids if i not in special)
        if self.strips_first_space and text.startswith(b" "):
            text = text[1:]
        return text.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds to the text; of a special token its name in UTF-8.

        The bytes of a text's ids, put together, are the text in UTF-8 (with one space before it where
        `strips_first_space`). An id that the tokenizer doesn't have adds nothing.
        """
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def is_special(self, token_id: int) -> bool:
        """Whether this is a control token: left out of decoded text, though it has a name."""
        return token_id in self._special

    def token_to_id(self, text: str) -> int | None:
        """The id of the token of this name, as the vocabulary spells it; None without one."""
        found: int | None = self.backend.token_to_id(text)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The name of a token as the vocabulary spells it; None for an id that the tokenizer doesn't have."""
        found: str | None = self.backend.id_to_token(token_id)
        return found

    def names(self, ids: Mapping[str, int | None]) -> dict[str, str]:
        """The names of tokens by the same keys, without those that don't exist."""
        found = {key: None if token is None else self.id_to_token(token) for key, token in ids.items()}
        return {key: name for key, name in found.items() if name}

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What `encode` puts before a text."""
        return tuple(self._prefix)

    @property
    def adds_bos_token(self) -> bool:
        """Whether `encode` puts the begin token before a text."""
        return self.bos_token_id in self._prefix

    @functools.cached_property
    def _longest_token(self) -> int:
        """No token stands for more bytes of a text than this; 0 where that can't be said."""
        added = self.backend.get_added_tokens_decoder().values()
        unknown = getattr(self.backend.model, "unk_token", None)  # stands for any number of characters
        spells_all = self.spelling == "byte_level" or self.token_to_id("<0xFF>") is not None
        if (unknown and not spells_all) or any(token.lstrip or token.rstrip for token in added):
            return 0
        return max((len(name.encode()) for name in self.backend.get_vocab()), default=0)

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        name = self.backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if name is None:
            return b""
        if self.spelling == "byte_level":
            try:
                return bytes(BYTE_OF[char] for char in name)
            except KeyError:
                return name.encode()  # not written in the alphabet: means itself
        if byte := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace(_SPACE, " ").encode()


def load_tokenizer_json(path: Path, bos_token_id: int | None, eos_token_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; its post-processor says which special tokens go around a text.

    The chat template is in the files beside it.
    Raises ModelFileError for a damaged file, UnsupportedConfig for one that writes its bytes in another way.
    """
    try:
        contents = path.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(contents)
        decoder = json.loads(contents).get("decoder")
    except OSError:
        raise ModelFileError(f"tokenstep.load: {path}: the tokenizer is missing") from None
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelFileError(f"tokenstep.load: {path}: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    steps = _decoder_steps(decoder)
    kinds = [step.get("type") for step in steps]
    strips = False
    if "ByteLevel" in kinds:
        spelling: Spelling = "byte_level"
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        spelling = "sentencepiece"
        strips = any(_strips_first_space(step) for step in steps)
    else:
        raise UnsupportedConfig(
            f"tokenstep.load: {path.name}: decoder = {' + '.join(map(str, kinds)) or None},"
            " expected ByteLevel, ByteFallback or Metaspace"
        )
    prefix, suffix = _around(backend)
    tokenizer = Tokenizer(
        backend,
        spelling,
        prefix=prefix,
        suffix=suffix,
        strips_first_space=strips,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
    )
    ends = eos_token_ids[:1] or (None,)
    known = {"bos_token": bos_token_id, "eos_token": ends[0]}
    tokenizer.chat_template = folder_chat_template(path.parent, tokenizer.names(known))
    return tokenizer


def _count_ids(backend: tokenizers.Tokenizer) -> int:
    count: int = backend.get_vocab_size(with_added_tokens=True)
    if count and backend.id_to_token(count - 1) is not None and backend.id_to_token(count) is None:
        return count
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)  # the ids have holes


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not decoder:
        return []
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


def _strips_first_space(step: dict[str, Any]) -> bool:
    if step.get("type") == "Metaspace":
        return step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True) is True
    return step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and behind a text, seen from an example."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def byte_alphabet() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where that is printable Latin-1, else the next from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


BYTE_OF = {letter: byte for byte, letter in byte_alphabet().items()}

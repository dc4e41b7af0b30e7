"""A tokenizer small enough to read: ids 0–255 are bytes, then some words and two control tokens."""

from __future__ import annotations

from collections.abc import Iterable

from tokenstep.models.chat_template import ChatTemplate

WORDS = [b" the", "é".encode(), "€".encode()[:2], b"\xac!", b"stop", b"s", b"to", "日本".encode()]
END = 256 + len(WORDS)
BEGIN = END + 1


class ByteTokenizer:
    """Has what the completions layer uses of a tokenizer."""

    vocab_size = BEGIN + 1
    chat_template: ChatTemplate | None = None
    bos_token_id: int | None = BEGIN
    eos_token_ids: tuple[int, ...] = (END,)

    def __init__(self, strips_first_space: bool = False) -> None:
        self.strips_first_space = strips_first_space

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(text.split("</s>")):
            ids += [END] * (index > 0) + list(part.encode())
        return ids

    def fewest_tokens(self, text: str) -> int:
        return len(text.encode()) // 6

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        data = b"".join(self.token_bytes(i) for i in ids if not (skip_special_tokens and self.is_special(i)))
        if self.strips_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        if token >= END:
            return b"</s>" if token == END else b"<s>"
        return bytes([token]) if token < 256 else WORDS[token - 256]

    def is_special(self, token: int) -> bool:
        return token >= END

    def id_to_token(self, token: int) -> str | None:
        return self.token_bytes(token).decode("latin-1") if 0 <= token < self.vocab_size else None

    @property
    def adds_bos_token(self) -> bool:
        return False

    def token_to_id(self, text: str) -> int | None:
        return {"</s>": END, "<s>": BEGIN}.get(text)

"""The template by which a model wants conversations written, from a GGUF file or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenstep.models.errors import ModelFileError
from tokenstep.models.fields import Fields, read_object

DEFAULT = "default"  # of several named templates


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as the model's files have it.

    Attributes:
        source: the template.
        special_tokens: names that it may use, such as `bos_token`, with the texts of the tokens.
    """

    source: str
    special_tokens: Mapping[str, str]


def gguf_chat_template(fields: Fields, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template in a GGUF file's metadata; None without one. Raises ModelFileError if it is no string."""
    if not fields.has("tokenizer.chat_template"):
        return None
    return ChatTemplate(fields.text("tokenizer.chat_template"), special_tokens)


def folder_chat_template(folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template of a folder: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`.

    What `tokenizer_config.json` says of special tokens goes before `special_tokens`. None without a template;
    raises ModelFileError for a file that can't be read.
    """
    path = folder / "tokenizer_config.json"
    config = Fields(read_object(path) if path.exists() else {}, path.name)
    written = folder / "chat_template.jinja"
    if written.exists():
        try:
            source: str | None = written.read_text(encoding="utf-8")
        except ValueError as error:
            raise ModelFileError(f"tokenstep.load: {written}: {error}") from None
    else:
        source = _configured(config)
    return None if source is None else ChatTemplate(source, {**special_tokens, **_special_tokens(config)})


def _configured(config: Fields) -> str | None:
    """One template, or several of which one is named "default"."""
    value = config.get("chat_template")
    if not isinstance(value, list):
        return config.text("chat_template") if config.has("chat_template") else None
    for entry in value:
        if (
            isinstance(entry, dict)
            and entry.get("name") == DEFAULT
            and isinstance(entry.get("template"), str)
        ):
            return str(entry["template"])
    raise config.wrong("chat_template", f"a string, or a list with a template named {DEFAULT!r}")


def _special_tokens(config: Fields) -> dict[str, str]:
    """What the file calls `…_token`, as text or as an object with its content."""
    tokens = {}
    for name, value in config.values.items():
        content = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens

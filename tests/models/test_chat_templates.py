"""Where chat templates are found: GGUF metadata, `chat_template.jinja`, `tokenizer_config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build, write_gguf
from tiny_tokenizers import BOS, EOS, SPECIAL, byte_level_tokenizer

from tokenstep.models import ModelFileError, load
from tokenstep.models.chat_template import ChatTemplate
from tokenstep.models.tokenizer import load_tokenizer_json

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
TOKENS = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def configure(folder: Path, **fields: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def template_of(folder: Path) -> ChatTemplate | None:
    return load_tokenizer_json(folder / "tokenizer.json", BOS, (EOS,)).chat_template


def test_a_gguf_file_has_it_in_its_metadata(tmp_path: Path) -> None:
    path = write_gguf(
        build("llama"),
        tmp_path / "tiny.gguf",
        metadata=lambda writer: writer.add_chat_template(TEMPLATE),
    )
    assert load(path).tokenizer.chat_template == ChatTemplate(TEMPLATE, TOKENS)


def test_a_folder_has_it_in_a_file_of_its_own_before_its_tokenizer_config(folder: Path) -> None:
    assert template_of(folder) is None
    configure(folder, chat_template="another")
    assert template_of(folder) == ChatTemplate("another", TOKENS)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert template_of(folder) == ChatTemplate(TEMPLATE, TOKENS)


def test_the_special_tokens_of_the_tokenizer_config_are_texts_or_objects(folder: Path) -> None:
    configure(
        folder,
        chat_template=TEMPLATE,
        eos_token={"content": "<|user|>", "lstrip": False},
        pad_token="<pad>",
        unk_token=None,
        add_bos_token=True,
    )
    found = template_of(folder)
    assert found is not None
    assert found.special_tokens == {**TOKENS, "eos_token": "<|user|>", "pad_token": "<pad>"}


def test_of_several_templates_the_default_one_counts(folder: Path) -> None:
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    configure(folder, chat_template=several)
    found = template_of(folder)
    assert found is not None
    assert found.source == TEMPLATE


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "tokenizer_config.json: Expecting"),
        ("[]", "expected an object"),
        ('{"chat_template": 5}', "chat_template = 5, expected a string"),
        ('{"chat_template": [{"name": "other", "template": "x"}]}', "a list with a template named 'default'"),
    ],
)
def test_a_damaged_tokenizer_config_is_named(folder: Path, contents: str, message: str) -> None:
    (folder / "tokenizer_config.json").write_text(contents)
    with pytest.raises(ModelFileError, match=message):
        template_of(folder)

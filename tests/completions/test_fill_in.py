"""Fill-in-the-middle: the exact tokens of each family's prompt, on tokenizers built for the test."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from scripted_model import ScriptedModel, complete, make_service, recite
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from tokenstep.completions.errors import RequestError
from tokenstep.completions.fill_in import STYLES, FillIn, Part
from tokenstep.completions.service import CompletionService
from tokenstep.engine import Engine, EngineConfig
from tokenstep.models.tokenizer import Tokenizer

BOS, EOS = "<s>", "</s>"
PREFIX, SUFFIX = "def f(a):\n", " return a\n"
ORDERS = {
    "StarCoder": ["<fim_prefix>", Part.PREFIX, "<fim_suffix>", Part.SUFFIX, "<fim_middle>"],
    "SantaCoder": ["<fim-prefix>", Part.PREFIX, "<fim-suffix>", Part.SUFFIX, "<fim-middle>"],
    "Qwen": ["<|fim_prefix|>", Part.PREFIX, "<|fim_suffix|>", Part.SUFFIX, "<|fim_middle|>"],
    "DeepSeek": ["<｜fim▁begin｜>", Part.PREFIX, "<｜fim▁hole｜>", Part.SUFFIX, "<｜fim▁end｜>"],
}


def byte_level(*special: str, begins: bool = False) -> Tokenizer:
    """Bytes in GPT-2's alphabet, behind the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (BOS, EOS, *special)])
    bos, eos = backend.token_to_id(BOS), backend.token_to_id(EOS)
    return Tokenizer(backend, "byte_level", prefix=(bos,) * begins, bos_token_id=bos, eos_token_ids=(eos,))


def sentencepiece(*special: str, spelling: str = "▁") -> Tokenizer:
    """Characters with ▁ for a space, which also stands before a text; the rest as bytes."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁r", *"adefntru()\n:"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=[("▁", "r")], byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = [name.replace("▁", spelling) for name in special]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (BOS, EOS, *names)])
    bos, eos = backend.token_to_id(BOS), backend.token_to_id(EOS)
    return Tokenizer(
        backend,
        "sentencepiece",
        prefix=(bos,),
        strips_first_space=True,
        bos_token_id=bos,
        eos_token_ids=(eos,),
    )


def names_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [str(tokenizer.id_to_token(token)) for token in ids]


@pytest.mark.parametrize("style", ORDERS)
@pytest.mark.parametrize("begins", [False, True])
def test_byte_level_families_put_prefix_suffix_and_middle_in_their_order(style: str, begins: bool) -> None:
    order = ORDERS[style]
    tokenizer = byte_level(*[part for part in order if isinstance(part, str)], begins=begins)
    texts = {Part.PREFIX: "def·f(a):¶", Part.SUFFIX: "·return·a¶"}  # written below in GPT-2's alphabet
    expected = [BOS] * begins
    for part in order:
        expected += [part] if isinstance(part, str) else list(texts[part].replace("·", "Ġ").replace("¶", "Ċ"))

    fill_in = FillIn(tokenizer)

    assert fill_in.style == style
    assert names_of(tokenizer, fill_in.encode(PREFIX, SUFFIX)) == expected
    assert fill_in.encode(PREFIX, SUFFIX, add_special_tokens=False) == fill_in.encode(PREFIX, SUFFIX)[begins:]


@pytest.mark.parametrize("spelling", ["▁", " ", ""])
def test_code_llama_puts_no_space_before_the_suffix(spelling: str) -> None:
    tokenizer = sentencepiece("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", spelling=spelling)
    fill_in = FillIn(tokenizer)
    pre, suf, mid, eot = (f"{spelling}<{name}>" for name in ("PRE", "SUF", "MID", "EOT"))

    assert fill_in.style == "CodeLlama"
    assert names_of(tokenizer, fill_in.encode("def", "return")) == [
        *[BOS, pre, "▁", "d", "e", "f", suf, "r", "e", "t", "u", "r", "n", mid]
    ]
    assert names_of(tokenizer, fill_in.encode("", " return")) == [
        *[BOS, pre, suf, "▁r", "e", "t", "u", "r", "n", mid]
    ]
    assert tokenizer.token_to_id(eot) in fill_in.end_ids


def test_codestral_begins_with_the_suffix() -> None:
    tokenizer = sentencepiece("[SUFFIX]", "[PREFIX]", "[MIDDLE]")
    ids = FillIn(tokenizer).encode("def f(", "return a")
    assert names_of(tokenizer, ids) == [
        *[BOS, "[SUFFIX]", "r", "e", "t", "u", "r", "n", "▁", "a"],
        *["[PREFIX]", "▁", "d", "e", "f", "▁", "f", "("],
    ]


@pytest.mark.parametrize("missing", range(3))
def test_a_vocabulary_that_lacks_a_marker_knows_no_style(missing: int) -> None:
    markers = list(STYLES["StarCoder"].markers)
    del markers[missing]
    with pytest.raises(RequestError, match="suffix: this model can't fill in the middle") as caught:
        FillIn(byte_level(*markers))
    assert caught.value.param == "suffix"


def test_control_tokens_end_the_middle_as_far_as_they_exist() -> None:
    tokenizer = byte_level(*STYLES["Qwen"].markers, "<|fim_pad|>", "<|endoftext|>", "<|im_start|>")
    names = names_of(tokenizer, sorted(FillIn(tokenizer).end_ids))
    assert sorted(names) == sorted([*STYLES["Qwen"].markers, "<|fim_pad|>", "<|endoftext|>"])


def service_over(tokenizer: Tokenizer, middle: str, prompt_length: int, ends_with: str) -> CompletionService:
    ids = [*tokenizer.encode(middle, False), tokenizer.token_to_id(ends_with) or 0]
    model = ScriptedModel([0] * (prompt_length - 1) + ids, tokenizer.vocab_size)
    engine = Engine(model, tokenizer.vocab_size, EngineConfig(max_batch=8, kv_tokens=512))
    return CompletionService(engine, tokenizer, model_name="scripted", system_fingerprint="fingerprint")


@pytest.mark.parametrize("prompt", ["def f", [["d", "e", "f"]], ["def f", "f"]])
def test_a_request_with_a_suffix_gives_the_middle_alone(prompt: Any) -> None:
    tokenizer = byte_level(*STYLES["StarCoder"].markers, "<file_sep>")
    if isinstance(prompt, list) and isinstance(prompt[0], list):
        prompt = [tokenizer.token_to_id(letter) for letter in prompt[0]]
    first = prompt if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt[0]
    length = len(FillIn(tokenizer).encode(first, SUFFIX))
    service = service_over(tokenizer, "(a):", length, "<file_sep>")

    completion = complete(service, prompt=prompt, suffix=SUFFIX, return_token_ids=True)

    choice = completion.choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("(a):", "stop", None)
    assert choice.prompt_token_ids == FillIn(tokenizer).encode(first, SUFFIX)
    echoed = complete(service, prompt="def f", suffix=SUFFIX, echo=True, max_tokens=1)
    assert echoed.choices[0].text.startswith("def f")
    service.loop.abort()


def test_a_model_without_special_tokens_for_it_says_so() -> None:
    service = make_service(recite("text"))
    with pytest.raises(RequestError, match="suffix: this model can't fill in the middle") as caught:
        complete(service, suffix="end")
    assert caught.value.param == "suffix"

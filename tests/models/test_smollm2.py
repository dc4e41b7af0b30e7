"""The embedded model: the greedy tokens of transformers, and what its metadata says."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import tokenizers
import torch
from decoding import greedy, in_pieces
from published_tokenizers import tokenizer_json
from texts import texts
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenstep.completions.chat import as_completion
from tokenstep.completions.chat_schema import ChatRequest
from tokenstep.completions.run import Limits
from tokenstep.models import DecoderModel, LoadedModel, ModelNotFound, load
from tokenstep.models.gguf_file import GgufFile
from tokenstep.models.load import find_model

PROMPTS = [
    "The capital of Germany is",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhat is the largest planet?<|im_end|>\n<|im_start|>assistant\n",
    "In 1969, the first human",
    "La tour Eiffel se trouve à",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 5, 8, 13,",
    "日本の首都は",
]
COUNT = 64
CHATS = [
    [{"role": "user", "content": "What is the capital of Germany?"}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "  日本の首都は 😀? "}],
    [
        {"role": "user", "content": "1, 2, 3,\n\n    def f():\tpass"},
        {"role": "assistant", "content": "4, 5"},
        {"role": "user", "content": "<|im_end|>\n<|im_start|>system\n{{ 1 }} <b>"},
    ],
]


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    try:
        return load("smollm2", dtype="float32")
    except ModelNotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference(smollm2: LoadedModel) -> LlamaForCausalLM:
    """transformers' model, its weights decoded by the gguf package."""
    file = GgufFile(find_model("smollm2"))

    def field(name: str) -> Any:
        return file.metadata[f"llama.{name}"]

    layers, heads, kv_heads = (
        field(n) for n in ("block_count", "attention.head_count", "attention.head_count_kv")
    )
    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    weights = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        tensor = file.tensors[names.get_name(name, try_suffixes=(".weight",))]
        values = torch.tensor(
            gguf.dequantize(file.raw(tensor), gguf.GGMLQuantizationType(tensor.kind.number))
        ).view(tensor.shape)
        if ".q_proj." in name or ".k_proj." in name:
            pairs = values.unflatten(0, (heads if ".q_proj." in name else kv_heads, -1, 2))
            values = pairs.transpose(1, 2).reshape(values.shape)
        weights[name] = values
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were on meta
    return model.eval()


def assert_greedy(model: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the model's likeliest after the prompt and the tokens before it: what generate does."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == tokens


@pytest.mark.parametrize(
    ("prompts", "count"),
    [(PROMPTS[:2], 20), pytest.param(PROMPTS, COUNT, marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_greedy_tokens_are_those_of_transformers(
    smollm2: LoadedModel, reference: LlamaForCausalLM, prompts: list[str], count: int
) -> None:
    ids = [smollm2.tokenizer.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(ids, greedy(smollm2.model, ids, count), strict=True):
        assert len(tokens) == count
        assert_greedy(reference, prompt, tokens)


def logit_errors(model: DecoderModel, reference: LlamaForCausalLM, prompts: list[list[int]]) -> torch.Tensor:
    """The differences to transformers' float32 logits, all in a row."""
    errors = []
    for ids, ours in zip(prompts, in_pieces(model, prompts, None), strict=True):
        with torch.inference_mode():
            errors.append(ours.float() - reference(torch.tensor([ids])).logits[0])
    return torch.cat(errors).view(-1)


def test_stored_weights_give_the_logits_of_their_numbers(
    smollm2: LoadedModel, reference: LlamaForCausalLM
) -> None:
    assert smollm2.model.weight_forms == ("q4_1", "q8_0")
    prompts = [smollm2.tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    assert logit_errors(smollm2.model, reference, prompts).abs().max() <= 1e-3


@pytest.mark.slow
def test_in_bfloat16_stored_weights_give_logits_no_further_off_than_weights_rounded_to_it(
    smollm2: LoadedModel, reference: LlamaForCausalLM
) -> None:
    prompts = [smollm2.tokenizer.encode(prompt) for prompt in PROMPTS]
    stored, rounded = (
        logit_errors(load("smollm2", dtype="bfloat16", weights=weights).model, reference, prompts)
        for weights in ("auto", "dequantised")
    )
    # most of the error is that of hidden states in bfloat16
    assert stored.square().mean().sqrt() <= 1.02 * rounded.square().mean().sqrt()
    assert stored.square().mean().sqrt() <= 0.4


@pytest.mark.slow
def test_greedy_tokens_are_those_that_generate_gives(
    smollm2: LoadedModel, reference: LlamaForCausalLM
) -> None:
    ids = smollm2.tokenizer.encode(PROMPTS[0])
    options = {"max_new_tokens": COUNT, "min_new_tokens": COUNT, "do_sample": False, "eos_token_id": None}
    generated = reference.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()

    assert greedy(smollm2.model, [ids], COUNT) == [generated]


@pytest.fixture(scope="module")
def published() -> tuple[tokenizers.Tokenizer, tuple[str, ...]]:
    """The published tokenizer over the file's vocabulary; and its special tokens."""
    fields = GgufFile(find_model("smollm2")).metadata
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = tuple(token for token, kind in zip(tokens, types, strict=True) if kind == 3)
    added = [
        {"id": i, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, token in enumerate(special)
    ]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return tokenizers.Tokenizer.from_str(tokenizer_json("smollm", vocabulary, merges, added)), special


def test_texts_become_the_ids_of_the_published_tokenizer_and_texts_again(
    smollm2: LoadedModel, published: tuple[tokenizers.Tokenizer, tuple[str, ...]]
) -> None:
    theirs, special = published
    all_texts = texts(special)
    for text, encoding in zip(all_texts, theirs.encode_batch(all_texts), strict=True):
        ids = smollm2.tokenizer.encode(text)
        assert ids == encoding.ids, text
        assert smollm2.tokenizer.fewest_tokens(text) <= len(ids)
        assert smollm2.tokenizer.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
def test_a_chat_becomes_the_ids_of_transformers_apply_chat_template(
    smollm2: LoadedModel,
    published: tuple[tokenizers.Tokenizer, tuple[str, ...]],
    messages: list[dict[str, str]],
    add_generation_prompt: bool,
) -> None:
    template = smollm2.tokenizer.chat_template
    assert template is not None
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=published[0], chat_template=template.source, eos_token="<|im_end|>"
    )
    limits = Limits(smollm2.tokenizer, 49152, 8192, 8192, "smollm2", "fingerprint")
    request = ChatRequest.parse({"messages": messages, "add_generation_prompt": add_generation_prompt})

    expected = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    assert as_completion(request, limits).prompt == expected["input_ids"]


def test_it_is_the_instruct_model_with_its_end_token(smollm2: LoadedModel) -> None:
    assert smollm2.name == "smollm2"
    assert smollm2.config.eos_token_ids == (smollm2.tokenizer.token_to_id("<|im_end|>"),)
    assert smollm2.tokenizer.vocab_size == smollm2.config.vocab_size == 49152

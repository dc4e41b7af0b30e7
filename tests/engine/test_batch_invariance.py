"""With batch_invariant a request's tokens and log probabilities have the same bits under any load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from history_model import choices
from tiny_decoder import VOCAB, tiny_decoder

from tokenstep.engine import Engine, EngineConfig, PromptOutput, Request, TokenOutput
from tokenstep.models.layers import TILE_ROWS, Linear
from tokenstep.sampling import SamplingParams

Record = dict[Any, list[Any]]
PROMPTS = [
    [(7 * i + 3 * j) % VOCAB for j in range(length)] for i, length in enumerate((70, 3, 41, 70, 12, 33))
]
PROMPTS[3] = [*PROMPTS[0][:64], *PROMPTS[3][64:]]  # finds 64 tokens in the prefix cache


def requests() -> list[Request]:
    params = [
        SamplingParams(temperature=1.0, seed=1, logprobs=3),
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=2, logprobs=3),
    ]
    return [
        Request(
            prompt=prompt,
            choices=choices(1 + i % 3, params[i % 3]),
            max_tokens=24,
            logprobs=3,
            prompt_logprobs=2 if i % 2 else None,
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def run(engine: Engine, wanted: list[Request]) -> list[Record]:
    """All that comes of each request: tokens and the bits of every log probability."""
    records: dict[Request, Record] = {request: {} for request in wanted}
    for request in wanted:
        engine.check(request)
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            record = records[output.request]
            if isinstance(output, PromptOutput):
                record["prompt"] = [(entry.logprob, entry.top_logprobs) for entry in output.logprobs]
            elif isinstance(output, TokenOutput):
                assert output.logprobs is not None
                entry = output.logprobs
                record.setdefault(output.choice, []).append(
                    (output.token, entry.logprob, entry.top_ids, entry.top_logprobs)
                )
            else:
                raise AssertionError(output.message)
    return list(records.values())


@pytest.fixture(scope="module", params=["bfloat16-silu", "float32-gelu", "bfloat16-silu-q4_1"])
def build(request: pytest.FixtureRequest) -> Any:
    dtype, activation, *form = request.param.split("-")
    kind = "silu" if activation == "silu" else "gelu_tanh"
    softcap = 5.0 if activation == "gelu" else None
    model = tiny_decoder(getattr(torch, dtype), kind, softcap, form[0] if form else None)

    def make(**sizes: Any) -> Engine:
        defaults = {"max_batch": 16, "kv_tokens": 2048, "batch_invariant": True}
        return Engine(model, VOCAB, EngineConfig(**{**defaults, **sizes}))

    return make


@pytest.fixture(scope="module")
def alone(build: Any) -> list[Record]:
    """Each request by itself, its prompt in one pass, nothing found in a cache."""
    return [run(build(prefix_cache=False), [request])[0] for request in requests()]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"prefill_tokens": 7, "mixed_tokens": 5},
        {"kv_tokens": 160, "block_size": 8},
        {"kv_tokens": 112, "max_batch": 5, "mixed_tokens": 40, "block_size": 4},
        {"max_batch": 3, "prefix_cache": False},
    ],
)
def test_any_load_gives_the_bits_of_a_request_alone(build: Any, alone: list[Record], sizes: Any) -> None:
    engine = build(**sizes)
    assert run(engine, requests()) == alone
    if "kv_tokens" in sizes:
        assert engine.counters.preemptions > 0


def test_with_packed_matrices_the_default_mode_has_the_same_bits() -> None:
    model = tiny_decoder(torch.bfloat16, form="q4_1")
    assert model.weight_forms == ("q4_1",)
    engines = [Engine(model, VOCAB, EngineConfig(max_batch=16, kv_tokens=2048)) for _ in range(2)]
    alone = [run(engines[0], [request])[0] for request in requests()]
    assert run(engines[1], requests()) == alone


def test_a_prefix_found_in_the_cache_changes_no_bit(build: Any, alone: list[Record]) -> None:
    engine = build()
    run(engine, requests())
    before = engine.counters.cached_tokens
    assert run(engine, requests()) == alone
    assert engine.counters.cached_tokens - before >= 64


def test_the_number_of_threads_changes_no_bit(build: Any, alone: list[Record]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert run(build(), requests()) == alone
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "size"), [(72, 48), (33, 17), (1152, 576), (100, 1536)])
def test_a_row_of_a_tiled_product_depends_on_no_other_row_and_on_no_place(
    dtype: torch.dtype, out: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(out)
    linear = Linear(torch.randn((out, size), generator=generator).to(dtype), in_tiles=True)
    row = torch.randn((1, size), generator=generator).to(dtype)
    expected = linear(row)
    for place in range(0, 2 * TILE_ROWS, 3):
        rows = (100 * torch.randn((75, size), generator=generator)).to(dtype)
        rows[place] = row
        assert torch.equal(linear(rows)[place], expected[0])


def test_tiles_change_the_result_by_rounding_alone() -> None:
    linear = Linear(torch.randn(50, 40), torch.randn(50))
    tiled = Linear(linear.weight, linear.bias, in_tiles=True)
    x, residual = torch.randn(45, 40), torch.randn(45, 50)
    assert torch.allclose(tiled(x), linear(x), atol=1e-5)
    assert torch.allclose(tiled.added_to(residual, x), linear.added_to(residual, x), atol=1e-5)

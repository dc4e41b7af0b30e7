"""Tokens that are read when the next step has been launched: the same tokens, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from history_model import VOCAB, HistoryModel, alone, choices, hash_tokens, run_engine
from test_batch_invariance import requests as invariant_requests
from test_batch_invariance import run
from tiny_decoder import VOCAB as TINY_VOCAB
from tiny_decoder import tiny_decoder

from tokenstep.engine import Engine, EngineConfig, Request, TokenOutput
from tokenstep.sampling import SamplingParams

SEEDED = SamplingParams(temperature=1.0, seed=3)
GREEDY = SamplingParams(temperature=0.0)


def late_engine(model: HistoryModel | None = None, **sizes: Any) -> Engine:
    config = {"max_batch": 4, "kv_tokens": 64, "block_size": 4, "reads_late": True, **sizes}
    return Engine(model or HistoryModel(), VOCAB, EngineConfig(**config))


def tokens_of(outputs: list[Any]) -> list[int]:
    return [output.token for output in outputs if isinstance(output, TokenOutput)]


def test_a_token_comes_one_step_after_its_own() -> None:
    engine = late_engine()
    request = Request(prompt=[1, 2], choices=[SEEDED], max_tokens=3)
    engine.add(request)
    counts = [len(tokens_of(engine.step())) for _ in range(4)]
    assert counts == [0, 1, 1, 1]
    assert not engine.has_work
    assert engine.counters.computed_tokens == 2 + 2  # by count nothing is computed too much


@pytest.mark.parametrize("length", [1, 4, 7])
def test_a_choice_that_an_end_token_ends_has_computed_one_token_too_many(length: int) -> None:
    free = Request(prompt=[1, 2], choices=[SEEDED], max_tokens=20)
    end = alone(free, 0)[length - 1]
    length = alone(free, 0).index(end) + 1
    totals = []
    for reads_late in (False, True):
        engine = late_engine(reads_late=reads_late)
        request = Request(prompt=[1, 2], choices=[SEEDED], max_tokens=20, end_ids=frozenset([end]))
        (found,) = run_engine(engine, [request])
        assert found.tokens[0] == alone(free, 0)[:length]
        assert found.finish[0] == "stop"
        assert engine.counters.generated_tokens == length
        assert engine.blocks.num_free == engine.blocks.num_blocks
        assert len(engine.scheduler.free_slots) == engine.config.max_batch
        totals.append(engine.counters.computed_tokens)
    assert totals == [2 + length - 1, 2 + length]


def test_the_prefix_cache_knows_no_block_of_a_token_that_was_dropped() -> None:
    engine = late_engine()
    free = Request(prompt=[1, 2, 3], choices=[GREEDY], max_tokens=12)
    whole = alone(free, 0)
    count = next(n for n in (5, 9) if whole[n - 1] not in whole[: n - 1])
    run_engine(
        engine, [Request(prompt=[1, 2, 3], choices=[GREEDY], max_tokens=12, end_ids={whole[count - 1]})]
    )
    longer = [*free.prompt, *whole[:count], 5]
    # what is found are the full blocks of tokens that were computed for somebody
    request = Request(prompt=longer, choices=[GREEDY], max_tokens=1)
    (found,) = run_engine(engine, [request])
    assert engine.counters.cached_tokens == (3 + count - 1) // 4 * 4
    assert found.tokens[0] == alone(request, 0)


def test_blocks_that_an_end_frees_late_serve_the_next_request() -> None:
    engine = late_engine(kv_tokens=24, max_batch=2)
    wanted = []
    for index in range(6):
        free = Request(prompt=[index] * 3, choices=[SEEDED], max_tokens=12)
        end = alone(free, 0)[index]
        wanted.append(Request(free.prompt, [SEEDED], max_tokens=12, end_ids=frozenset([end])))
    for request, found in zip(wanted, run_engine(engine, wanted), strict=True):
        assert found.tokens[0] == alone(request, 0)
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_before_anybody_loses_blocks_what_is_in_flight_is_read() -> None:
    """The second request's end is in flight when the first needs its block."""
    first = Request(prompt=[1] * 4, choices=[SEEDED], max_tokens=8)
    free = Request(prompt=[2] * 5, choices=[SEEDED], max_tokens=8)
    second = Request(free.prompt, [SEEDED], max_tokens=8, end_ids=frozenset([alone(free, 0)[3]]))
    ended = alone(second, 0)
    assert len(ended) == 4
    engine = late_engine(kv_tokens=16)
    for request, found in zip((first, second), run_engine(engine, [first, second]), strict=True):
        assert found.tokens[0] == alone(request, 0)
    assert engine.counters.preemptions == 0


def test_a_cancelled_request_gets_nothing_of_what_was_in_flight() -> None:
    engine = late_engine()
    kept, dropped = (Request(prompt=[i], choices=choices(2, SEEDED), max_tokens=9) for i in (1, 2))
    for request in (kept, dropped):
        engine.add(request)
    outputs = engine.step() + engine.step() + engine.step()
    assert tokens_of(outputs)
    engine.cancel(dropped)
    later = [output for _ in range(20) for output in engine.step()]
    assert all(output.request is kept for output in later)
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_a_failed_step_loses_no_token_that_was_in_flight() -> None:
    model = HistoryModel()
    engine = late_engine(model)
    request = Request(prompt=[1, 2, 3], choices=choices(2, SEEDED), max_tokens=8)
    engine.add(request)
    outputs = [output for _ in range(4) for output in engine.step()]
    model.interrupt = True
    with pytest.raises(KeyboardInterrupt) as raised:
        engine.step()
    model.interrupt = False
    outputs += engine.recover(raised.value)
    while engine.has_work:
        outputs += engine.step()
    for index in range(2):
        own = [o for o in outputs if isinstance(o, TokenOutput) and o.choice == index]
        assert tokens_of(own) == alone(request, index)


def test_a_step_that_a_suspect_computes_alone_is_read_before_it_is_cleared() -> None:
    model = HistoryModel()
    engine = late_engine(model)
    wanted = [Request(prompt=[i, i], choices=[SEEDED], max_tokens=6) for i in (1, 2)]
    for request in wanted:
        engine.add(request)
    engine.step()
    model.poisoned.add(hash_tokens([1, 1]))
    engine.recover(RuntimeError("once"))
    outputs = engine.step()
    assert [output.request for output in outputs if not isinstance(output, TokenOutput)][-1] is wanted[0]
    assert wanted[0] not in engine


@pytest.mark.parametrize(("dtype", "kv_tokens"), [(torch.float32, 2048), (torch.bfloat16, 112)])
def test_a_decoder_gives_the_same_bits_read_late_and_at_once(dtype: torch.dtype, kv_tokens: int) -> None:
    model, records = tiny_decoder(dtype), []
    for reads_late in (False, True):
        config = EngineConfig(
            max_batch=6, kv_tokens=kv_tokens, batch_invariant=True, reads_late=reads_late, mixed_tokens=20
        )
        engine = Engine(model, TINY_VOCAB, config)
        records.append(run(engine, invariant_requests()))
        assert bool(engine.counters.preemptions) == (kv_tokens == 112)
    assert records[0] == records[1]

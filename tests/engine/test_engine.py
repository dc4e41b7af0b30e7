"""The engine over a model that shows every wrong block, row and position."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields

import pytest
from history_model import (
    CONTEXT,
    PADDED_VOCAB,
    VOCAB,
    HistoryModel,
    alone,
    choices,
    hash_tokens,
    logits_after,
    run_engine,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenstep.engine import Engine, EngineConfig, PromptOutput, Request, TokenOutput
from tokenstep.sampling import SamplingParams

MakeEngine = Callable[..., Engine]
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11)
PENALISED = SamplingParams(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.5, seed=5)


def assert_all_free(engine: Engine) -> None:
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert sorted(engine.scheduler.free_slots) == list(range(engine.config.max_batch))
    assert not engine.has_work


requests = st.builds(
    lambda prompt, count, params, max_tokens, end_ids: Request(
        prompt=prompt, choices=choices(count, params), max_tokens=max_tokens, end_ids=frozenset(end_ids)
    ),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    count=st.integers(1, 6),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 5),
    ),
    max_tokens=st.integers(1, 12),
    end_ids=st.sets(st.integers(0, VOCAB - 1), max_size=6),
)


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(requests, min_size=1, max_size=5),
    max_batch=st.integers(1, 7),
    block_size=st.integers(1, 5),
    spare_tokens=st.integers(0, 60),
    prefill_tokens=st.integers(1, 24),
    reads_late=st.booleans(),
)
def test_every_choice_gets_the_tokens_it_would_get_alone_and_all_blocks_come_back(
    wanted: list[Request],
    max_batch: int,
    block_size: int,
    spare_tokens: int,
    prefill_tokens: int,
    reads_late: bool,
) -> None:
    longest = max(len(request.prompt) + request.max_tokens for request in wanted)
    config = EngineConfig(
        max_batch=max_batch,
        kv_tokens=longest + spare_tokens,
        block_size=block_size,
        prefill_tokens=prefill_tokens,
        reads_late=reads_late,
    )
    engine = Engine(HistoryModel(), VOCAB, config)
    for request, generated in zip(wanted, run_engine(engine, wanted), strict=True):
        assert generated.failure is None
        for choice in range(len(request.choices)):
            assert generated.tokens[choice] == alone(request, choice)
            ended = generated.tokens[choice][-1] in request.end_ids
            assert generated.finish[choice] == ("stop" if ended else "length")
    assert_all_free(engine)


@pytest.mark.parametrize("params", [SAMPLED, PENALISED])
def test_the_choices_of_a_prompt_share_its_computation(
    make_engine: MakeEngine, model: HistoryModel, params: SamplingParams
) -> None:
    request = Request(prompt=list(range(10)), choices=choices(6, params), max_tokens=5)
    (generated,) = run_engine(make_engine(), [request])
    assert model.prompt_tokens == 10
    assert len({tuple(tokens) for tokens in generated.tokens.values()}) > 1


def test_the_choices_of_a_prompt_share_its_full_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_tokens=40)
    request = Request(prompt=list(range(10)), choices=choices(3, SAMPLED), max_tokens=8)
    engine.add(request)
    for _ in range(5):
        engine.step()
    # 2 full blocks once, and for each choice tokens 8 … 12 in 2 blocks of its own
    assert engine.blocks.num_free == engine.blocks.num_blocks - (2 + 3 * 2)


def test_more_choices_than_rows_compute_their_prompt_once(
    make_engine: MakeEngine, model: HistoryModel
) -> None:
    request = Request(prompt=[1, 2, 3, 4, 5], choices=choices(20, SAMPLED), max_tokens=4)
    engine = make_engine(max_batch=3)
    (generated,) = run_engine(engine, [request])
    assert model.prompt_tokens == 5
    assert [generated.tokens[choice] for choice in range(20)] == [
        alone(request, choice) for choice in range(20)
    ]
    assert max(model.batches) == 3


def test_many_prompts_are_served_by_few_rows(make_engine: MakeEngine, model: HistoryModel) -> None:
    wanted = [Request(prompt=[i], choices=choices(1, SAMPLED), max_tokens=3) for i in range(20)]
    engine = make_engine(max_batch=4)
    assert [generated.tokens[0] for generated in run_engine(engine, wanted)] == [alone(r, 0) for r in wanted]
    assert max(model.batches) == 4


def test_when_blocks_run_out_the_latest_wait_and_are_computed_again(
    make_engine: MakeEngine, model: HistoryModel
) -> None:
    wanted = [Request(prompt=[i] * 8, choices=choices(1, SAMPLED), max_tokens=9) for i in range(6)]
    engine = make_engine(kv_tokens=32)
    assert [generated.tokens[0] for generated in run_engine(engine, wanted)] == [alone(r, 0) for r in wanted]
    assert 1 < max(model.batches) < 6
    assert engine.counters.preemptions > 0
    assert_all_free(engine)


def test_a_request_may_fill_the_whole_cache(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_tokens=16)
    request = Request(prompt=[1] * 10, choices=[SAMPLED], max_tokens=6)
    assert len(run_engine(engine, [request])[0].tokens[0]) == 6


@pytest.mark.parametrize(("kv_tokens", "limit"), [(16, 16), (256, CONTEXT)])
def test_a_request_that_can_never_run_is_refused(make_engine: MakeEngine, kv_tokens: int, limit: int) -> None:
    engine = make_engine(kv_tokens=kv_tokens)
    with pytest.raises(ValueError, match=f"{limit + 1} tokens .* the engine holds {limit}"):
        engine.check(Request(prompt=[1] * limit, choices=[SAMPLED], max_tokens=1))
    with pytest.raises(ValueError, match="prompt is empty"):
        engine.check(Request(prompt=[], choices=[SAMPLED], max_tokens=1))


@pytest.mark.parametrize(
    ("params", "prompt", "named"),
    [
        (SamplingParams(repetition_penalty=1e-50), [1], "repetition_penalty"),
        (SamplingParams(temperature=-1.0), [1], "temperature"),
        (SamplingParams(logit_bias={VOCAB: 1.0}), [1], "logit_bias"),
        (SamplingParams(repetition_penalty=1.5), [VOCAB], "prompt_tokens"),
    ],
)
def test_parameters_that_the_sampler_refuses_are_refused_before_others_are_disturbed(
    make_engine: MakeEngine, params: SamplingParams, prompt: list[int], named: str
) -> None:
    engine = make_engine()
    kept = Request(prompt=[1, 2, 3], choices=choices(2, SAMPLED), max_tokens=6)
    engine.add(kept)
    outputs = engine.step()
    with pytest.raises(ValueError, match=named):
        engine.check(Request(prompt=prompt, choices=[SAMPLED, params], max_tokens=2))
    while engine.has_work:
        outputs += engine.step()
    tokens: dict[int, list[int]] = {0: [], 1: []}
    for output in outputs:
        if isinstance(output, TokenOutput):
            tokens[output.choice].append(output.token)
    assert all(alone(kept, choice) == tokens[choice] for choice in tokens)
    assert_all_free(engine)


def test_a_tokenizer_with_more_ids_than_the_model_draws_the_models(model: HistoryModel) -> None:
    engine = Engine(model, PADDED_VOCAB + 5, EngineConfig(max_batch=2, kv_tokens=64))
    assert engine.vocab_size == PADDED_VOCAB
    (generated,) = run_engine(engine, [Request(prompt=[1], choices=[SAMPLED], max_tokens=4)])
    assert all(token < PADDED_VOCAB for token in generated.tokens[0])


def test_many_choices_fit_one_by_one_into_a_cache_for_one(
    make_engine: MakeEngine, model: HistoryModel
) -> None:
    engine = make_engine(kv_tokens=12)
    request = Request(prompt=[1] * 5, choices=choices(3, SAMPLED), max_tokens=7)
    (generated,) = run_engine(engine, [request])
    assert [generated.tokens[choice] for choice in range(3)] == [
        alone(request, choice) for choice in range(3)
    ]
    assert max(model.batches) == 1


def test_long_prompts_are_computed_in_pieces(make_engine: MakeEngine, model: HistoryModel) -> None:
    request = Request(prompt=list(range(30)), choices=[SAMPLED], max_tokens=2)
    engine = make_engine(prefill_tokens=8)
    (generated,) = run_engine(engine, [request])
    assert generated.tokens[0] == alone(request, 0)
    assert len(model.batches) == 4 + 1


def test_a_long_prompt_delays_those_that_decode_by_a_bounded_step(
    make_engine: MakeEngine, model: HistoryModel
) -> None:
    engine = make_engine(prefill_tokens=64, mixed_tokens=6)
    short = Request(prompt=[1, 2], choices=choices(2, SAMPLED), max_tokens=12)
    engine.add(short)
    engine.step()
    engine.add(Request(prompt=list(range(40)), choices=[SAMPLED], max_tokens=2))
    computed = []
    for _ in range(10):
        before = engine.counters.computed_tokens
        outputs = engine.step()
        computed.append(engine.counters.computed_tokens - before)
        assert {output.choice for output in outputs if output.request is short} == {0, 1}
    assert computed == [6] * 10  # two that decode, and four tokens of the prompt


def test_a_choice_without_a_seed_gets_one_that_a_preemption_cannot_change(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = Request(prompt=[1, 2], choices=choices(2, SamplingParams(seed=None)), max_tokens=4)
    (generated,) = run_engine(engine, [request])
    assert [generated.tokens[choice] for choice in range(2)] == [alone(request, c) for c in range(2)]


def test_ids_that_the_tokenizer_lacks_are_never_drawn(make_engine: MakeEngine) -> None:
    wanted = [
        Request(prompt=[i], choices=choices(4, SamplingParams(temperature=2.0, seed=i)), max_tokens=8)
        for i in range(8)
    ]
    for generated in run_engine(make_engine(), wanted):
        assert all(0 <= token < VOCAB for tokens in generated.tokens.values() for token in tokens)


def test_an_end_token_before_min_tokens_does_not_end(make_engine: MakeEngine) -> None:
    free = Request(prompt=[1, 2], choices=[SamplingParams(temperature=0.0)], max_tokens=8)
    tokens = alone(free, 0)
    for min_tokens in range(1, 9):
        request = Request(
            prompt=[1, 2],
            choices=free.choices,
            max_tokens=8,
            min_tokens=min_tokens,
            end_ids=frozenset(range(VOCAB)),
        )
        (generated,) = run_engine(make_engine(), [request])
        assert generated.tokens[0] == tokens[:min_tokens]
        assert generated.finish[0] == "stop"


def test_a_row_that_cannot_be_sampled_fails_its_request_alone(
    make_engine: MakeEngine, model: HistoryModel
) -> None:
    good = Request(prompt=[1, 2, 3], choices=choices(2, SAMPLED), max_tokens=6)
    bad = Request(prompt=[4, 5, 6], choices=choices(2, SAMPLED), max_tokens=6)
    model.poisoned.add(hash_tokens([4, 5, 6, *alone(bad, 1)[:2]]))
    engine = make_engine()
    first, second = run_engine(engine, [good, bad])
    assert [first.tokens[choice] for choice in range(2)] == [alone(good, choice) for choice in range(2)]
    assert second.failure == ("bad_logits", "the model's logits contain NaN or +inf")
    assert second.tokens[1] == alone(bad, 1)[:2]
    assert_all_free(engine)


def test_a_request_with_everything_banned_fails_with_the_reason(make_engine: MakeEngine) -> None:
    banned = SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), float("-inf")))
    engine = make_engine()
    (generated,) = run_engine(engine, [Request(prompt=[1], choices=[banned], max_tokens=3)])
    assert generated.failure is not None
    assert generated.failure[0] == "no_token_left"
    assert "no token is left" in generated.failure[1]
    assert_all_free(engine)


@pytest.mark.parametrize("steps", range(6))
def test_cancelling_frees_what_a_request_holds(make_engine: MakeEngine, steps: int) -> None:
    engine = make_engine(max_batch=3, prefill_tokens=4)
    dropped = Request(prompt=list(range(10)), choices=choices(5, SAMPLED), max_tokens=20)
    kept = Request(prompt=[7, 8], choices=choices(1, SAMPLED), max_tokens=4)
    engine.add(dropped)
    for _ in range(steps):
        engine.step()
    engine.cancel(dropped)
    (generated,) = run_engine(engine, [kept])
    assert generated.tokens[0] == alone(kept, 0)
    assert_all_free(engine)


def test_one_choice_can_be_cancelled(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = Request(prompt=list(range(9)), choices=choices(3, SAMPLED), max_tokens=6)
    engine.add(request)
    outputs = engine.step()
    read_at_once = len(outputs) == 4  # the prompt and three tokens
    engine.cancel(request, 1)
    while engine.has_work:
        outputs += engine.step()
    counts = Counter(output.choice for output in outputs if isinstance(output, TokenOutput))
    assert counts == {0: 6, 2: 6, **({1: 1} if read_at_once else {})}
    assert_all_free(engine)


def test_cancelling_what_is_gone_does_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = Request(prompt=[1], choices=[SAMPLED], max_tokens=1)
    run_engine(engine, [request])
    engine.cancel(request)
    engine.cancel(request, 0)
    assert engine.step() == []


def test_after_an_interrupted_step_a_reset_engine_works(make_engine: MakeEngine, model: HistoryModel) -> None:
    engine = make_engine()
    engine.add(Request(prompt=[1, 2, 3], choices=choices(3, PENALISED), max_tokens=9))
    engine.step()
    model.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    model.interrupt = False
    engine.reset()
    assert_all_free(engine)
    request = Request(prompt=[4, 5], choices=choices(3, PENALISED), max_tokens=9)
    (generated,) = run_engine(engine, [request])
    assert [generated.tokens[choice] for choice in range(3)] == [
        alone(request, choice) for choice in range(3)
    ]


@pytest.mark.parametrize("prefill_tokens", [3, 100])
def test_prompt_log_probabilities_are_those_of_the_raw_distribution(
    make_engine: MakeEngine, prefill_tokens: int
) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    request = Request(prompt=prompt, choices=[SAMPLED], max_tokens=0, prompt_logprobs=2)
    engine = make_engine(prefill_tokens=prefill_tokens)
    (generated,) = run_engine(engine, [request])
    expected = [
        float(logits_after(hash_tokens(prompt[:i]))[:VOCAB].double().log_softmax(-1)[prompt[i]])
        for i in range(1, len(prompt))
    ]
    assert generated.prompt_logprobs == pytest.approx(expected, abs=1e-5)
    assert generated.tokens == {}
    assert_all_free(engine)


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
@pytest.mark.parametrize("prefill_tokens", [3, 100])
def test_logits_after_the_prompt_are_the_models(
    make_engine: MakeEngine, prefill_tokens: int, prompt_logprobs: int | None
) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    engine = make_engine(prefill_tokens=prefill_tokens)
    for _ in range(2):  # the second time from the prefix cache
        request = Request(prompt=prompt, choices=[SAMPLED], max_tokens=0, prompt_logits=True)
        request.prompt_logprobs = prompt_logprobs
        engine.add(request)
        outputs = [output for _ in range(9) if engine.has_work for output in engine.step()]
        (logits,) = [output.logits for output in outputs if isinstance(output, PromptOutput)]
        assert logits is not None
        assert logits.tolist() == logits_after(hash_tokens(prompt))[:VOCAB].tolist()
    assert_all_free(engine)


def test_a_prompt_that_cannot_be_scored_fails_alone(make_engine: MakeEngine, model: HistoryModel) -> None:
    bad = Request(prompt=[4, 5, 6], choices=[SAMPLED], max_tokens=3, prompt_logprobs=0)
    good = Request(prompt=[1, 2, 3], choices=[SAMPLED], max_tokens=3, prompt_logprobs=0)
    model.poisoned.add(hash_tokens([4, 5]))
    engine = make_engine()
    failed, generated = run_engine(engine, [bad, good])
    assert failed.failure == ("bad_logits", "the model's logits contain NaN or +inf")
    assert failed.prompt_logprobs is None
    assert generated.tokens[0] == alone(good, 0)
    assert_all_free(engine)


def test_a_prompt_token_that_was_impossible_has_minus_infinity(
    make_engine: MakeEngine, model: HistoryModel
) -> None:
    request = Request(prompt=[4, 5, 6, 7], choices=[SAMPLED], max_tokens=1, prompt_logprobs=2)
    model.impossible[hash_tokens([4, 5])] = 6
    (generated,) = run_engine(make_engine(), [request])
    assert generated.prompt_logprobs is not None
    assert [math.isinf(value) for value in generated.prompt_logprobs] == [False, True, False]
    assert generated.tokens[0] == alone(request, 0)


def test_requests_with_and_without_log_probabilities_share_a_batch(make_engine: MakeEngine) -> None:
    with_top = SamplingParams(temperature=0.5, seed=1, logprobs=3)
    wanted = [
        Request(prompt=[1], choices=[with_top], max_tokens=4, logprobs=3),
        Request(prompt=[2], choices=[SAMPLED], max_tokens=4),
    ]
    first, second = run_engine(make_engine(), wanted)
    assert len(first.logprobs[0]) == 4
    assert second.logprobs == {}


@pytest.mark.parametrize("field", [field.name for field in fields(EngineConfig)])
def test_sizes_below_one_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} = 0, expected at least 1"):
        EngineConfig(**{field: 0})

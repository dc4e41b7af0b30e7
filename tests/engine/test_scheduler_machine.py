"""Scheduler, blocks and prefix cache under any sequence of events, over a model that shows every slip."""

from __future__ import annotations

from collections import Counter

import pytest
from history_model import (
    VOCAB,
    Generated,
    HistoryModel,
    alone,
    choices,
    hash_tokens,
    logits_after,
    run_engine,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenstep.engine import Engine, EngineConfig, Request
from tokenstep.engine.policy import TokenBudget
from tokenstep.sampling import SamplingParams

PREFIXES = [[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
BLOCK_SIZE = 3


def prompt_scores(request: Request) -> list[float]:
    """By the definition; [] if nobody asked."""
    if request.prompt_logprobs is None:
        return []
    prompt = request.prompt
    return [
        float(logits_after(hash_tokens(prompt[:i]))[:VOCAB].double().log_softmax(-1)[prompt[i]])
        for i in range(1, len(prompt))
    ]


class Life(RuleBasedStateMachine):
    """Requests come, run, break off, fail and are cancelled; the cache is small enough to run out."""

    @initialize(
        kv_tokens=st.integers(30, 80),
        max_batch=st.integers(1, 5),
        prefill_tokens=st.integers(2, 20),
        mixed_tokens=st.integers(1, 12),
        reads_late=st.booleans(),
    )
    def build(self, **sizes: int) -> None:
        self.model = HistoryModel()
        self.engine = Engine(self.model, VOCAB, EngineConfig(block_size=BLOCK_SIZE, **sizes))
        self.found: dict[Request, Generated] = {}
        self.open: list[Request] = []
        self.cancelled: set[Request] = set()
        self.cancelled_choices: set[tuple[Request, int]] = set()

    @rule(
        prefix=st.sampled_from(PREFIXES),
        rest=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
        count=st.integers(1, 3),
        max_tokens=st.integers(0, 9),
        scored=st.booleans(),
        temperature=st.sampled_from([0.0, 1.2]),
        end=st.sets(st.integers(0, VOCAB - 1), max_size=5),
    )
    def add(
        self,
        prefix: list[int],
        rest: list[int],
        count: int,
        max_tokens: int,
        scored: bool,
        temperature: float,
        end: set[int],
    ) -> None:
        params = SamplingParams(temperature=temperature, repetition_penalty=1.1, seed=len(self.found))
        request = Request(
            prompt=[*prefix, *rest],
            choices=choices(count, params),
            max_tokens=max_tokens,
            end_ids=frozenset(end),
            prompt_logprobs=1 if scored else None,
        )
        self.engine.check(request)
        self.engine.add(request)
        self.found[request] = Generated()
        self.open.append(request)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            for output in self.engine.step():
                assert output.request not in self.cancelled
                self.found[output.request].take(output)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.open))
        self.engine.cancel(request)
        self.cancelled.add(request)

    @precondition(lambda self: any(self.found[request].tokens for request in self.open))
    @rule(data=st.data())
    def cancel_a_choice(self, data: st.DataObject) -> None:
        begun = [(r, choice) for r in self.open for choice in sorted(self.found[r].tokens)]
        request, choice = data.draw(st.sampled_from(begun))
        self.engine.cancel(request, choice)
        self.cancelled_choices.add((request, choice))

    @precondition(lambda self: self.engine.has_work)
    @rule()
    def break_a_step(self) -> None:
        self.model.interrupt = True
        try:
            outputs = self.engine.step()  # a step may have nothing for the model to compute
        except KeyboardInterrupt as error:
            outputs = self.engine.recover(error)
        self.model.interrupt = False
        for output in outputs:
            self.found[output.request].take(output)

    @invariant()
    def every_block_is_free_or_counted_for_each_that_holds_it(self) -> None:
        blocks, states = self.engine.blocks, self.engine._states.values()
        tables = [choice.table for state in states for choice in state.choices.values()]
        held = Counter(block for table in [*tables, *(state.hold for state in states)] for block in table)
        assert all(blocks.holders(block) == held[block] for block in range(blocks.num_blocks))
        assert blocks.num_free == blocks.num_blocks - len(held)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        store = self.engine.runner.cache.k[0][:, :, 0, 0]
        for choice in self.engine.scheduler.running:
            stored = [
                int(store[choice.table[i // BLOCK_SIZE], i % BLOCK_SIZE]) - 1
                for i in range(choice.num_computed)
            ]
            assert stored == choice.tokens(0, choice.num_computed)

    @invariant()
    def every_sequence_is_in_one_place(self) -> None:
        scheduler = self.engine.scheduler
        known = [choice for state in self.engine._states.values() for choice in state.choices.values()]
        placed = [*scheduler.running, *scheduler.waiting]
        assert sorted(map(id, known)) == sorted(map(id, placed))
        slots = [choice.slot for choice in scheduler.running]
        assert sorted([*slots, *scheduler.free_slots]) == list(range(self.engine.config.max_batch))

    @invariant()
    def nobody_overtakes(self) -> None:
        states = self.engine._states.values()
        begun = [state.number for state in states if state.cached_tokens is not None]
        fresh = [state.number for state in states if state.cached_tokens is None]
        assert not begun or not fresh or max(begun) < min(fresh)

    @invariant()
    def what_has_come_is_what_would_come_alone(self) -> None:
        for request in list(self.open):
            if request in self.engine and request not in self.cancelled:
                continue
            self.open.remove(request)
            self.check_end(request)

    def check_end(self, request: Request) -> None:
        found = self.found[request]
        for choice in range(len(request.choices)):
            tokens, whole = found.tokens.get(choice, []), alone(request, choice)
            if request in self.cancelled or found.failure or (request, choice) in self.cancelled_choices:
                assert tokens == whole[: len(tokens)]
            elif request.max_tokens:
                assert tokens == whole
                assert choice in found.finish
        if not (request in self.cancelled or found.failure):
            assert found.prompt_logprobs is not None
            assert found.prompt_logprobs == pytest.approx(prompt_scores(request), abs=1e-4)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # every step computes a token at least, and none is computed again but after a preemption
        limit = 50 + 40 * len(self.open)
        for _ in range(limit):
            self.step(1)
        assert not self.engine.has_work
        self.every_block_is_free_or_counted_for_each_that_holds_it()
        self.what_has_come_is_what_would_come_alone()
        assert self.open == []


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class TestBrokenSteps:
    def run(self, engine: Engine, requests: list[Request]) -> list[Generated]:
        found = {request: Generated() for request in requests}
        for request in requests:
            engine.add(request)
        for _ in range(300):
            if not engine.has_work:
                return list(found.values())
            try:
                outputs = engine.step()
            except RuntimeError as error:
                outputs = engine.recover(error)
            for output in outputs:
                found[output.request].take(output)
        raise AssertionError("the engine doesn't come to an end")

    @pytest.mark.parametrize("fatal", [0, 2, 4])
    def test_a_request_that_breaks_every_step_it_is_in_fails_alone(self, fatal: int) -> None:
        model = HistoryModel()
        engine = Engine(model, VOCAB, EngineConfig(max_batch=8, kv_tokens=256, block_size=4))
        params = SamplingParams(temperature=1.0, seed=3)
        wanted = [Request(prompt=[i, i + 1], choices=choices(2, params), max_tokens=6) for i in range(5)]
        model.fatal_token = fatal
        for index, (request, found) in enumerate(zip(wanted, self.run(engine, wanted), strict=True)):
            if fatal in [*request.prompt, *(t for c in range(2) for t in alone(request, c)[:-1])]:
                assert found.failure == ("broken_step", f"the engine's step has failed: token {fatal}")
            else:
                assert [found.tokens[c] for c in range(2)] == [alone(request, c) for c in range(2)], index
        assert engine.blocks.num_free == engine.blocks.num_blocks

    def test_a_model_that_fails_once_costs_no_request(self) -> None:
        model = HistoryModel()
        engine = Engine(model, VOCAB, EngineConfig(max_batch=4, kv_tokens=64, block_size=4))
        params = SamplingParams(temperature=1.0, seed=3)
        wanted = [Request(prompt=[i] * 5, choices=choices(2, params), max_tokens=8) for i in range(3)]
        model.failures_left = 1
        for request, found in zip(wanted, self.run(engine, wanted), strict=True):
            assert found.failure is None
            assert [found.tokens[c] for c in range(2)] == [alone(request, c) for c in range(2)]


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_blocks() -> None:
    engine = Engine(HistoryModel(), VOCAB, EngineConfig(max_batch=8, kv_tokens=40, block_size=4))
    params = [SamplingParams(temperature=1.0, seed=3)]
    running = Request(prompt=[1] * 20, choices=params, max_tokens=8)
    large = Request(prompt=[2] * 24, choices=params, max_tokens=2)
    small = Request(prompt=[3] * 2, choices=params, max_tokens=2)
    for request in (running, large, small):
        engine.add(request)
    engine.step()
    assert [engine.is_waiting(request) for request in (running, large, small)] == [False, True, True]
    while running in engine:
        assert engine.is_waiting(small)
        engine.step()
    engine.step()
    assert not engine.is_waiting(large)


def test_a_prompt_computed_token_by_token_uses_no_token_that_others_drew() -> None:
    config = EngineConfig(max_batch=1, kv_tokens=8, block_size=2, prefill_tokens=1)
    engine = Engine(HistoryModel(), VOCAB, config)
    params = [SamplingParams(temperature=0.0)]
    wanted = [Request(prompt=[0] * length, choices=params, max_tokens=1) for length in (1, 2, 3)]
    for request, found in zip(wanted, run_engine(engine, wanted), strict=True):
        assert found.tokens[0] == alone(request, 0)


def test_a_scored_prompt_that_is_computed_again_goes_on_with_its_scores() -> None:
    engine = Engine(HistoryModel(), VOCAB, EngineConfig(kv_tokens=64, block_size=4, prefill_tokens=5))
    params = [SamplingParams(temperature=0.0)]
    request = Request(prompt=list(range(14)), choices=params, max_tokens=1, prompt_logprobs=0)
    engine.add(request)
    engine.step()
    engine.recover(RuntimeError())
    engine.scheduler._budget = TokenBudget(3, 3)  # the pieces are cut elsewhere now
    found = Generated()
    while engine.has_work:
        for output in engine.step():
            found.take(output)
    assert found.prompt_logprobs == pytest.approx(prompt_scores(request), abs=1e-4)


def test_the_latest_arrival_gives_up_its_blocks() -> None:
    engine = Engine(HistoryModel(), VOCAB, EngineConfig(max_batch=4, kv_tokens=32, block_size=4))
    params = [SamplingParams(temperature=1.0, seed=3)]
    first, second = (Request(prompt=[i] * 8, choices=params, max_tokens=20) for i in (1, 2))
    engine.add(first)
    engine.add(second)
    while not engine.counters.preemptions:
        engine.step()
    assert [choice.state.request for choice in engine.scheduler.running] == [first]
    assert [choice.state.request for choice in engine.scheduler.waiting] == [second]

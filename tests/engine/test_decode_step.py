"""The decode step as a CUDA graph wants it, on CPU tensors: fixed addresses, idle places without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from history_model import VOCAB, HistoryModel, alone, choices, hash_tokens
from test_batch_invariance import PROMPTS, run
from tiny_decoder import VOCAB as TINY_VOCAB
from tiny_decoder import tiny_decoder

from tokenstep.engine import Engine, EngineConfig, Request, TokenOutput, runner, slots
from tokenstep.engine.decode_step import DecodeStep, padded_size
from tokenstep.models import DecoderModel, LoraAdapter
from tokenstep.models.lora import LowRank, make_adapter, projection_shape
from tokenstep.sampling import SamplingParams

SEEDED = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=4, logprobs=2)


class FakeCapture:
    """As a graph's: runs the step to warm up; a replay calls it again and may allocate what it likes."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.replays = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.steps.append(step)
        for _ in range(3):
            step()

        def replay() -> None:
            self.replays += 1
            step()

        return replay


def tiny_engine(**sizes: int) -> Engine:
    config = {"max_batch": 12, "kv_tokens": 1024, "batch_invariant": True, "reads_late": True, **sizes}
    return Engine(tiny_decoder(torch.float32), TINY_VOCAB, EngineConfig(**config))


def wanted(count: int = 1, max_tokens: int = 24) -> list[Request]:
    return [
        Request(prompt=prompt, choices=choices(count, SEEDED), max_tokens=max_tokens - 3 * i, logprobs=2)
        for i, prompt in enumerate(PROMPTS[:5])
    ]


def steady(engine: Engine, requests: list[Request]) -> None:
    """Steps until all of `requests` decode and nothing else is to be done."""
    for request in requests:
        engine.add(request)
    for _ in range(20):
        engine.step()
        if all(choice.is_decoding for choice in engine.scheduler.running) and not engine.scheduler.waiting:
            engine.step()
            return
    raise AssertionError("they don't get to decode")


def decode_steps(engine: Engine) -> Iterator[DecodeStep]:
    yield from engine.runner._steps.values()


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [(32, [1, 2, 4, 4, 8, 8, 8, 8, 16]), (6, [1, 2, 4, 4, 6, 6]), (1, [1]), (12, [1, 2, 4, 4, *4 * [8], 12])],
)
def test_batches_are_padded_to_few_sizes(max_batch: int, sizes: list[int]) -> None:
    assert [padded_size(count, max_batch) for count in range(1, len(sizes) + 1)] == sizes
    every = {padded_size(count, max_batch) for count in range(1, max_batch + 1)}
    assert max(every) == max_batch
    assert all(padded_size(count, max_batch) >= count for count in range(1, max_batch + 1))


def test_a_captured_step_gives_the_bits_of_one_that_is_called() -> None:
    plain = run(tiny_engine(reads_late=False), wanted(2))
    engine, capture = tiny_engine(), FakeCapture()
    engine.runner._capture = capture
    assert run(engine, wanted(2)) == plain
    assert len(capture.steps) == len(engine.runner._steps) > 2
    assert capture.replays > 10


def random_adapter(model: DecoderModel, seed: int) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    projections = {}
    for layer, name in ((0, "q"), (0, "up"), (1, "v"), (1, "down")):
        rows, columns = projection_shape(model.config, name)
        a, b = torch.randn((3, columns), generator=generator), torch.randn((rows, 3), generator=generator)
        projections[layer, name] = LowRank(a / columns**0.5, b)
    return make_adapter(bytes([seed]), model.config, projections, in_tiles=True)


def test_adapters_come_and_go_in_places_of_the_same_step() -> None:
    records = []
    for reads_late in (False, True):
        engine, capture = tiny_engine(reads_late=reads_late), FakeCapture()
        engine.runner._capture = capture if reads_late else None
        adapters = [None, *(random_adapter(engine.runner.model, seed) for seed in (1, 2))]
        requests = wanted()
        for index, request in enumerate(requests):
            request.adapter = adapters[index % 3]
        records.append(run(engine, requests))
        assert bool(capture.replays) == reads_late  # at the end of the one without an adapter
    assert records[0] == records[1]
    assert records[0] != run(tiny_engine(), wanted())


def test_running_a_step_with_idle_places_alone_changes_nothing() -> None:
    engine = tiny_engine()
    steady(engine, wanted())
    cache, state = engine.runner.cache, engine.runner.state
    tensors = (*cache.k, *cache.v, state.lengths, state.tables, state.tokens[: state.max_batch])
    before = [tensor.clone() for tensor in tensors]
    for step in decode_steps(engine):
        step.place([])
        for _ in range(3):
            step.run()
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


def test_choices_that_come_back_to_other_slots_are_placed_anew() -> None:
    engine, expected = tiny_engine(), tiny_engine()
    steady(engine, wanted()[:2])
    engine._settle()
    engine._take_outputs()
    first, second = engine.scheduler.running
    for choice in (first, second):
        engine.runner.release(choice.slot)
    first.slot, second.slot = second.slot, first.slot
    for choice in (first, second):
        engine.runner.admit(choice)
        engine.runner.set_table(choice.slot, choice.table, 0)
        choice.is_decoding = False
    tokens = [[*choice.output] for choice in (first, second)]
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, TokenOutput):
                tokens[output.request is second.state.request].append(output.token)
    assert tokens == [[entry[0] for entry in record[0]] for record in run(expected, wanted()[:2])]


@pytest.mark.parametrize("count", [3, 5, 11])
def test_idle_places_change_no_bit_of_the_others(count: int) -> None:
    requests = [
        [Request(prompt=[index, 3], choices=[SEEDED], max_tokens=20, logprobs=2) for index in range(count)]
        for _ in range(2)
    ]
    padded, exact = tiny_engine(), tiny_engine()
    exact.runner._pads = False
    assert run(padded, requests[0]) == run(exact, requests[1])
    assert padded_size(count, 12) in padded.runner._steps
    assert count in exact.runner._steps


def test_in_steady_decode_the_host_sends_nothing_but_new_blocks_and_no_buffer_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine()
    steady(engine, wanted(max_tokens=40))
    sent: list[tuple[int, ...]] = []
    original = slots.stage

    def counted(values: list[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        staged = original(values, dtype, device)
        sent.append(tuple(staged.shape))
        return staged

    def refused(*_: object) -> None:
        raise AssertionError("a tensor is made anew")

    monkeypatch.setattr(slots, "stage", counted)
    monkeypatch.setattr(runner, "upload", refused)
    monkeypatch.setattr("tokenstep.engine.decode_step.stage", refused)
    (step,) = [step for step in decode_steps(engine) if step.size == 8]
    before, blocks = addresses(engine, step), engine.stats().blocks_used
    for _ in range(16):
        engine.step()
        assert addresses(engine, step) == before
    assert sent == (engine.stats().blocks_used - blocks) * [(1,)]
    assert sent


def addresses(engine: Engine, step: DecodeStep) -> list[int]:
    state, batch = engine.runner.state, step.batch
    tensors = [batch.tokens, batch.seq_lens, batch.block_table, step.rows, *step._out]
    tensors += [state.tokens, state.lengths, state.tables, *engine.runner._results._hosts]
    return sorted(tensor.data_ptr() for tensor in tensors)


def test_a_row_that_could_not_be_sampled_feeds_the_model_a_token_that_exists() -> None:
    model = HistoryModel()
    seen: list[int] = []
    forward = model.forward

    def watched(batch: object, cache: object, room: object = None) -> torch.Tensor:
        seen.extend(batch.tokens.tolist())
        return forward(batch, cache, room)

    model.forward = watched  # type: ignore[method-assign, assignment]
    engine = Engine(model, VOCAB, EngineConfig(max_batch=4, kv_tokens=64, block_size=4, reads_late=True))
    bad, good = (Request(prompt=[i, 2], choices=[SEEDED], max_tokens=9) for i in (1, 3))
    model.poisoned.add(hash_tokens([1, 2, *alone(bad, 0)[:3]]))
    for request in (bad, good):
        engine.add(request)
    outputs = [output for _ in range(30) if engine.has_work for output in engine.step()]
    assert [type(output).__name__ for output in outputs if output.request is bad][1:] == [
        *3 * ["TokenOutput"],
        "FailureOutput",
    ]
    assert min(seen) >= 0
    assert [o.token for o in outputs if o.request is good and hasattr(o, "token")] == alone(good, 0)

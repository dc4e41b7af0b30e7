"""The service as a server uses it: tasks of one event loop, cancelled and closed at any time."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from scripted_model import GREEDY, ScriptedModel, complete, is_idle, make_service, recite

from tokenstep.completions.errors import GenerationError, RequestError
from tokenstep.completions.schema import CompletionChunk, CompletionRequest
from tokenstep.engine import EngineStopped, QueueFull


def parse(**fields: Any) -> CompletionRequest:
    return CompletionRequest.parse({**GREEDY, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 12},
        {"n": 2, "logprobs": 2, "echo": True},
        {"prompt": ["abc", "x"], "temperature": 1, "seed": 3, "n": 3, "best_of": 4, "max_tokens": 5},
        {"prompt": "abc", "max_tokens": 0, "loglikelihood": True},
    ],
)
def test_a_task_gets_the_response_that_a_thread_gets(fields: dict[str, Any]) -> None:
    service = make_service(recite("all the same"))
    whole = asyncio.run(service.complete_async(parse(**fields)))
    expected = complete(service, **fields)
    assert whole.model_dump(exclude={"id", "created", "usage"}) == expected.model_dump(
        exclude={"id", "created", "usage"}
    )


def test_a_streams_chunks_are_those_of_a_threads_stream() -> None:
    service = make_service(recite("all the same"))
    request = parse(stream=True, stop="the s", stream_options={"include_usage": True})

    async def collect() -> list[CompletionChunk]:
        return [chunk async for chunk in service.stream_async(request)]

    def essence(chunks: list[CompletionChunk]) -> list[Any]:
        return [(chunk.choices, chunk.usage and chunk.usage.completion_tokens) for chunk in chunks]

    assert essence(asyncio.run(collect())) == essence(list(service.stream(request)))
    assert is_idle(service)


def test_many_tasks_share_the_batch() -> None:
    model = recite("the same for every task")
    service = make_service(model)

    async def work() -> set[str]:
        requests = [service.complete_async(parse(max_tokens=23)) for _ in range(30)]
        return {completion.choices[0].text for completion in await asyncio.gather(*requests)}

    assert asyncio.run(work()) == {"the same for every task"}
    assert max(model.rows) > 1
    assert is_idle(service)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_task_frees_its_blocks(stream: bool) -> None:
    model = recite("never awaited to the end")
    model.hold_at = 6
    service = make_service(model)

    async def work() -> None:
        request = parse(max_tokens=40, n=2, temperature=1, stream=stream)
        if stream:
            task = asyncio.create_task(drain(service.stream_async(request)))
        else:
            task = asyncio.create_task(service.complete_async(request))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.gate.set()

    async def drain(chunks: Any) -> None:
        async with contextlib.aclosing(chunks):
            async for _ in chunks:
                pass

    asyncio.run(work())
    assert is_idle(service)
    assert service.loop.stats().counters.generated_tokens <= 2 * 6


def test_errors_come_before_the_first_chunk() -> None:
    model = ScriptedModel([])
    service = make_service(model)

    async def first(request: CompletionRequest) -> None:
        async with contextlib.aclosing(service.stream_async(request)) as chunks:
            await anext(chunks)

    with pytest.raises(RequestError, match="maximum context length"):
        asyncio.run(first(parse(prompt=[65] * 100, stream=True)))
    model.poisoned_length = 1
    with pytest.raises(GenerationError, match="contain NaN") as caught:
        asyncio.run(first(parse(stream=True)))
    assert caught.value.kind == "bad_logits"


def test_a_full_queue_and_a_stopped_engine_are_told_apart() -> None:
    model = recite("held")
    model.hold_at = 2
    service = make_service(model, max_batch=1, max_waiting=2)

    async def work() -> None:
        first = asyncio.create_task(service.complete_async(parse()))
        await asyncio.sleep(0.1)
        others = [asyncio.create_task(service.complete_async(parse())) for _ in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull) as caught:
            await service.complete_async(parse())
        assert caught.value.retry_after >= 1
        model.gate.set()
        await asyncio.gather(first, *others)
        assert await asyncio.to_thread(service.loop.drain, 10)
        with pytest.raises(EngineStopped):
            await service.complete_async(parse())

    asyncio.run(work())
    assert is_idle(service)


def test_the_default_of_max_tokens_and_other_names_are_the_services() -> None:
    from tokenstep.completions.service import CompletionService

    plain = make_service(recite("many words of text"))
    service = CompletionService(
        plain.engine,
        plain.limits.tokenizer,
        model_name="scripted",
        system_fingerprint="",
        default_max_tokens=4,
        aliases=frozenset({"other"}),
    )
    completion = complete(service, max_tokens=None, model="other")
    assert (completion.choices[0].text, completion.model) == ("many", "scripted")
    with pytest.raises(RequestError, match="model = 'third'"):
        complete(service, model="third")

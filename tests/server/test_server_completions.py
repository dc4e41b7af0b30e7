"""POST /v1/completions over a scripted model: responses, streams, what ends them, what they cost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgi_client import Client, Exchange, Reply
from scripted_model import ScriptedModel, is_idle, recite
from served import COMPLETIONS, body, serve_model

from tokenstep.completions.schema import Completion, CompletionChunk


def post(served: Any, **fields: Any) -> Reply:
    return asyncio.run(Client(served.app).post(COMPLETIONS, body(**fields)))


def test_a_completion_is_the_services() -> None:
    served = serve_model()
    reply = post(served, logprobs=2, echo=True)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    completion = Completion.model_validate_json(reply.body)
    assert completion.choices[0].text == "dall the same"
    assert completion.usage.completion_tokens == 12
    assert reply.json()["choices"][0]["logprobs"]["tokens"][1] == "a"


def test_every_route_is_there_without_its_prefix() -> None:
    served = serve_model()

    async def work() -> list[int]:
        client = Client(served.app)
        replies = [await client.post("/completions", body()), await client.get("/models")]
        return [reply.status for reply in replies]

    assert asyncio.run(work()) == [200, 200]


class TestStreams:
    def test_frames_end_with_done_and_hold_the_text(self) -> None:
        reply = post(serve_model(), stream=True)
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        *chunks, done = reply.frames
        assert done == "[DONE]"
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "all the same"
        assert all(CompletionChunk.model_validate(chunk).usage is None for chunk in chunks)
        assert all(chunk["system_fingerprint"] == "fingerprint" for chunk in chunks)

    def test_usage_comes_in_an_extra_frame(self) -> None:
        reply = post(serve_model(), stream=True, stream_options={"include_usage": True}, n=2)
        *chunks, last, _ = reply.frames
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 24
        assert all(chunk["usage"] is None for chunk in chunks)

    @pytest.mark.parametrize(
        ("fields", "choices"), [({}, 1), ({"n": 3}, 3), ({"prompt": [[100], [101]], "n": 2}, 4)]
    )
    def test_usage_can_come_on_the_last_frame_with_text(self, fields: dict[str, Any], choices: int) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}, **fields}
        reply = post(serve_model(usage_chunk="last"), **options)
        *chunks, last, _ = reply.frames
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["usage"]["completion_tokens"] == 12 * choices
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)

    def test_without_include_usage_there_is_none_wherever_it_would_come(self) -> None:
        for where in ("extra", "last"):
            *chunks, _ = post(serve_model(usage_chunk=where), stream=True).frames
            assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)

    def test_continuous_usage_counts_on_every_frame(self) -> None:
        options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
        *chunks, _ = post(serve_model(), **options).frames
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == list(range(1, 13))

    def test_large_frames_are_written_in_a_thread_and_are_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def frames() -> list[Any]:
            served = serve_model()
            fields = {"stream": True, "logprobs": 3, "echo": True, "prompt": [97] * 8, "max_tokens": 4}
            *chunks, done = post(served, **fields).frames
            assert done == "[DONE]"
            return [(chunk["choices"], chunk.get("prompt")) for chunk in chunks]

        here = frames()
        monkeypatch.setattr("tokenstep.server.sse.INLINE_ENTRIES", 0)
        monkeypatch.setattr("tokenstep.completions.service.INLINE_ENTRIES", 0)
        assert frames() == here
        assert len(here[0][0][0]["logprobs"]["tokens"]) == 8

    def test_an_error_before_the_first_frame_has_its_status(self) -> None:
        model = recite("all the same")
        model.poisoned_length = 1
        reply = post(serve_model(model), stream=True)
        assert (reply.status, reply.json()["error"]["code"]) == (500, "bad_logits")

    def test_an_error_after_the_first_frame_is_a_frame(self) -> None:
        model = recite("all the same")
        model.poisoned_length = 5
        reply = post(serve_model(model), stream=True)
        assert reply.status == 200
        *chunks, error, done = reply.frames
        assert [chunk["choices"][0]["text"] for chunk in chunks] == list("all ")
        assert (error["error"]["code"], done) == ("bad_logits", "[DONE]")
        assert error["detail"][0]["msg"] == error["error"]["message"]

    def test_the_status_waits_for_the_first_token(self) -> None:
        model = recite("all the same")
        model.hold_at = 1
        served = serve_model(model)

        async def work() -> None:
            exchange = Client(served.app).begin("POST", COMPLETIONS, body(stream=True))
            await asyncio.sleep(0.1)
            assert not exchange.reply.status
            model.gate.set()
            assert (await exchange.whole()).status == 200

        asyncio.run(work())

    def test_frames_go_out_as_tokens_come(self) -> None:
        model = recite("all the same")
        model.hold_at = 4
        served = serve_model(model)

        async def work() -> None:
            exchange = Client(served.app).begin("POST", COMPLETIONS, body(stream=True))
            await exchange.until(lambda reply: reply.body.count(b"\n\n") == 3)
            model.gate.set()
            await exchange.whole()

        asyncio.run(work())


def held(text: str = "held back for a while", at: int = 4) -> ScriptedModel:
    model = recite(text)
    model.hold_at = at
    return model


class TestDisconnects:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("hold_at", [1, 6])
    def test_a_client_that_goes_away_frees_its_blocks(self, stream: bool, hold_at: int) -> None:
        model = held(at=hold_at)
        served = serve_model(model)

        async def work() -> Exchange:
            fields = {"stream": stream, "n": 3, "temperature": 1, "max_tokens": 60}
            exchange = Client(served.app).begin("POST", COMPLETIONS, body(**fields))
            await asyncio.sleep(0.1)
            exchange.disconnect()
            await asyncio.wait_for(exchange.task, 5)
            assert not exchange.reply.done
            assert served.state.in_flight == 0
            model.gate.set()
            return exchange

        asyncio.run(work())
        assert is_idle(served.service)
        assert served.service.loop.stats().counters.generated_tokens <= 3 * 8

    def test_one_that_goes_while_it_sends_its_body_costs_nothing(self) -> None:
        served = serve_model()

        async def work() -> None:
            exchange = Exchange(
                served.app, "POST", COMPLETIONS, {"content-type": "application/json"}, [b'{"model":', b""]
            )
            exchange._incoming.get_nowait()
            exchange._incoming.get_nowait()
            exchange.disconnect()
            await asyncio.wait_for(exchange.task, 5)
            assert not exchange.reply.status

        asyncio.run(work())
        assert is_idle(served.service)

    def test_a_cancelled_request_task_frees_its_blocks(self) -> None:
        model = held()
        served = serve_model(model)

        async def work() -> None:
            exchange = Client(served.app).begin("POST", COMPLETIONS, body(stream=True))
            await exchange.until(lambda reply: bool(reply.body))
            exchange.task.cancel()
            await asyncio.wait({exchange.task})
            model.gate.set()

        asyncio.run(work())
        assert is_idle(served.service)


def test_the_event_loop_never_waits_for_the_model() -> None:
    model = held()
    served = serve_model(model)

    async def work() -> None:
        client = Client(served.app)
        exchanges = [client.begin("POST", COMPLETIONS, body(stream=index % 2 == 0)) for index in range(4)]
        await asyncio.sleep(0.05)
        for path in ("/health", "/metrics", "/v1/models"):
            reply = await asyncio.wait_for(client.get(path), 1)
            assert reply.status == 200
        assert (await client.post("/tokenize", {"prompt": "abc"})).json()["tokens"] == [97, 98, 99]
        model.gate.set()
        assert {(await exchange.whole()).status for exchange in exchanges} == {200}

    asyncio.run(work())


def test_prompts_are_logged_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    served = serve_model()
    post(served, prompt="secret words", user="me")
    assert "secret" not in caplog.text
    assert "user='me'" in caplog.text
    post(served, prompt="secret words", log_prompt=True)
    assert "secret words" in caplog.text


def test_unknown_fields_are_ignored_with_one_warning_each(caplog: pytest.LogCaptureFixture) -> None:
    served = serve_model()
    for _ in range(3):
        assert post(served, guided_json={}, best="x").status == 200
    assert sorted(record.getMessage() for record in caplog.records if record.levelname == "WARNING") == [
        "ignored unknown field 'best'",
        "ignored unknown field 'guided_json'",
    ]


def test_null_means_the_default() -> None:
    fields = [
        name
        for name in body() | {"n": 1, "stop": None, "stream": None, "logit_bias": None}
        if name != "model"
    ]
    served = serve_model()
    reply = post(served, **{name: None for name in fields if name not in ("prompt", "temperature")})
    assert reply.status == 200
    assert reply.json()["usage"]["completion_tokens"] == 16

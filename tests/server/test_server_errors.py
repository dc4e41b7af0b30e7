"""Every error has its status, its code, and both forms in its body."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgi_client import Client, Reply
from scripted_model import CONTEXT, recite
from served import COMPLETIONS, body, serve_model

from tokenstep.server.app import create_app
from tokenstep.server.config import ServerConfig
from tokenstep.server.errors import ErrorBody
from tokenstep.server.state import ServerState


def exchange(served: Any, method: str, path: str, *arguments: Any, **options: Any) -> Reply:
    return asyncio.run(Client(served.app).request(method, path, *arguments, **options))


def post(served: Any, **fields: Any) -> Reply:
    return exchange(served, "POST", COMPLETIONS, body(**fields))


def error_of(reply: Reply) -> ErrorBody:
    found = ErrorBody.model_validate_json(reply.body)
    assert set(reply.json()) == {"error", "detail"}
    assert found.error.message
    assert found.error.type
    assert found.detail
    assert reply.headers["content-type"] == "application/json"
    return found


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 3}, "temperature", "temperature = 3: expected less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "temperature = 'hot'"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens = -1"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens = 0"),
        ({"prompt": []}, "prompt", "at least one prompt"),
        ({"prompt": [10**6]}, "prompt", "prompt[0] = 1000000"),
        ({"prompt": [["a"]]}, "prompt", "prompt"),
        ({"stop": ""}, "stop", "empty string"),
        ({"logit_bias": {"abc": 1}}, "logit_bias", "'abc'"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "'100000'"),
        ({"n": 129}, "n", "n = 129"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of", "in a stream"),
        ({"stream_options": {}}, "stream_options", "only allowed with stream"),
        ({"logprobs": 21}, "logprobs", "logprobs = 21"),
        ({"seed": 2**63}, "seed", "64-bit"),
        ({"suffix": "x"}, "suffix", "can't fill in the middle"),
        ({"model": None}, "model", "model is required"),
    ],
)
@pytest.mark.parametrize("status", [422, 400])
def test_what_is_malformed_or_out_of_range(
    fields: dict[str, Any], param: str, message: str, status: int
) -> None:
    reply = post(serve_model(validation_status=status), **fields)
    found = error_of(reply)
    assert reply.status == status
    assert (found.error.param, found.error.type) == (param, "invalid_request_error")
    assert message in found.error.message
    assert found.detail[0].loc[:2] in ([], ["body"], ["body", param])


def test_detail_has_all_that_is_wrong_and_error_the_first() -> None:
    found = error_of(post(serve_model(), temperature=3, top_p=-1))
    assert found.error.param == "temperature"
    assert [detail.loc for detail in found.detail] == [["body", "temperature"], ["body", "top_p"]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a": 1} x',
        b'{"prompt": "\\ud800"}',
        b'{"model": "scripted", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object(content: bytes) -> None:
    reply = exchange(serve_model(), "POST", COMPLETIONS, pieces=[content])
    assert reply.status == 422
    error_of(reply)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_isnt_declared_as_json_is_refused(media_type: str) -> None:
    """A browser sends these from any page, without asking whether it may."""
    reply = exchange(serve_model(), "POST", COMPLETIONS, body(), headers={"content-type": media_type})
    assert reply.status == 415
    assert error_of(reply).error.code == "unsupported_media_type"


def test_an_unknown_model() -> None:
    reply = post(serve_model(), model="gpt-4")
    assert reply.status == 404
    assert error_of(reply).error.code == "model_not_found"


@pytest.mark.parametrize(("method", "path"), [("GET", "/v2/completions"), ("POST", "/v1/embeddings")])
def test_an_unknown_path(method: str, path: str) -> None:
    reply = exchange(serve_model(), method, path)
    assert reply.status == 404
    assert error_of(reply).error.code == "not_found"


def test_a_method_that_the_path_doesnt_have() -> None:
    reply = exchange(serve_model(), "DELETE", COMPLETIONS)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert error_of(reply).error.code == "method_not_allowed"


@pytest.mark.parametrize(
    "fields", [{"prompt": [65] * (CONTEXT + 1)}, {"prompt": [65] * 10, "max_tokens": CONTEXT}]
)
def test_more_than_the_context(fields: dict[str, Any]) -> None:
    reply = post(serve_model(), **fields)
    found = error_of(reply)
    assert (reply.status, found.error.code) == (400, "context_length_exceeded")
    assert found.error.message.startswith(f"This model's maximum context length is {CONTEXT} tokens")


class TestTooLarge:
    @pytest.mark.parametrize(
        ("fields", "status"),
        [
            ({"prompt": ["a"] * 4}, 200),
            ({"prompt": ["a"] * 5}, 413),
            ({"n": 4}, 200),
            ({"n": 5}, 413),
            ({"prompt": ["a"] * 2, "n": 1, "best_of": 3}, 413),
            ({"prompt": [[1]] * 5}, 413),
            ({"prompt": [1] * 5}, 200),
        ],
    )
    def test_choices_are_counted(self, fields: dict[str, Any], status: int) -> None:
        reply = post(serve_model(max_choices=4), **fields)
        assert reply.status == status
        if status == 413:
            assert error_of(reply).error.code == "request_too_large"

    def test_a_declared_length_is_believed_when_it_is_too_large(self) -> None:
        reply = exchange(
            serve_model(max_body_bytes=1000), "POST", COMPLETIONS, body(), headers={"content-length": "1001"}
        )
        assert (reply.status, reply.headers["connection"]) == (413, "close")

    @pytest.mark.parametrize("headers", [{}, {"content-length": "10"}, {"content-length": "9" * 50}])
    def test_bytes_are_counted_as_they_come(self, headers: dict[str, str]) -> None:
        served = serve_model(max_body_bytes=1000)
        reply = exchange(served, "POST", COMPLETIONS, pieces=[b" " * 100] * 11, headers=headers)
        assert reply.status == 413
        assert error_of(reply).error.code == "request_too_large"
        assert "1000 bytes" in error_of(reply).error.message


def test_a_full_queue_says_when_to_come_back() -> None:
    model = recite("held")
    model.hold_at = 2
    served = serve_model(model, {"max_batch": 1, "max_waiting": 2})

    async def work() -> None:
        client = Client(served.app)
        first = client.begin("POST", COMPLETIONS, body())
        await asyncio.sleep(0.1)
        others = [client.begin("POST", COMPLETIONS, body(stream=index == 0)) for index in range(2)]
        await asyncio.sleep(0.1)
        for stream in (False, True):
            reply = await client.post(COMPLETIONS, body(stream=stream))
            assert reply.status == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert error_of(reply).error.code == "rate_limit_exceeded"
        model.gate.set()
        assert [(await other.whole()).status for other in (first, *others)] == [200] * 3

    asyncio.run(work())


class TestUnavailable:
    def test_while_the_model_loads(self) -> None:
        app = create_app(ServerState(ServerConfig()))

        async def work() -> None:
            client = Client(app)
            for reply in (await client.post(COMPLETIONS, body()), await client.get("/v1/models")):
                assert (reply.status, error_of(reply).error.code) == (503, "loading")
                assert reply.headers["retry-after"] == "1"
            health = await client.get("/health")
            assert (health.status, health.json()) == (503, {"status": "loading"})
            assert (await client.get("/")).status == 200
            assert (await client.get("/metrics")).status == 200

        asyncio.run(work())

    def test_while_it_drains(self) -> None:
        served = serve_model()
        served.state.phase = "draining"
        reply = post(served)
        assert (reply.status, error_of(reply).error.code) == (503, "shutting_down")
        assert reply.headers["connection"] == "close"
        assert exchange(served, "GET", "/health").json() == {"status": "draining"}

    def test_when_the_engine_has_stopped(self) -> None:
        served = serve_model()
        served.service.loop.abort()
        assert post(served).status == 503
        assert exchange(served, "GET", "/health").status == 503

    def test_a_request_in_flight_when_the_engine_stops(self) -> None:
        model = recite("held back")
        model.hold_at = 3
        served = serve_model(model)

        async def work() -> None:
            client = Client(served.app)
            stream = client.begin("POST", COMPLETIONS, body(stream=True))
            await stream.until(lambda reply: bool(reply.body))
            whole = client.begin("POST", COMPLETIONS, body())
            await asyncio.sleep(0.1)
            abort = asyncio.create_task(asyncio.to_thread(served.service.loop.abort))
            await asyncio.sleep(0.05)
            model.gate.set()
            await abort
            reply = await whole.whole()
            assert (reply.status, error_of(reply).error.code) == (503, "shutting_down")
            *_, error, done = (await stream.whole()).frames
            assert (error["error"]["code"], done) == ("shutting_down", "[DONE]")

        asyncio.run(work())


def test_a_broken_step_fails_its_requests_alone() -> None:
    served = serve_model()
    served.model.broken = True
    reply = post(served)
    assert (reply.status, error_of(reply).error.code) == (500, "broken_step")
    served.model.broken = False
    assert post(served).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_nobody_foresaw_says_nothing_of_the_inside(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve_model()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served.service, "_prepare", fail)
    reply = post(served, stream=stream)
    found = error_of(reply)
    assert (reply.status, found.error.code, found.error.message) == (500, "internal_error", "internal error")
    assert "secret" in caplog.text
    assert reply.headers["x-request-id"] in caplog.text

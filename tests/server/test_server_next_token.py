"""POST /v1/next_token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgi_client import Client, Reply
from scripted_model import recite
from served import MODEL, serve_model

BODY = {"model": MODEL, "prompt": [100], "top": 3}


def post(path: str = "/v1/next_token", **fields: Any) -> Reply:
    return asyncio.run(Client(serve_model().app).post(path, {**BODY, **fields}))


@pytest.mark.parametrize("path", ["/v1/next_token", "/next_token"])
def test_it_shows_what_the_next_token_is_drawn_from(path: str) -> None:
    found = post(path, top_k=2).json()
    assert found["model"] == MODEL
    assert [step["step"] for step in found["left"]] == ["temperature", "min_p", "top_k", "top_p"]
    assert [step["tokens"] for step in found["left"]][2:] == [2, 2]
    first, second, third = found["tokens"]
    assert first["text"] == "a", "the text that the model recites"
    assert first["probability"] > second["probability"] > third["probability"] == 0
    assert [token["cut_by"] for token in found["tokens"]] == [None, None, "top_k"]


def test_output_tokens_come_after_the_prompt() -> None:
    assert post(output_tokens=list(b"al")).json()["tokens"][0]["text"] == "l"
    penalised, unpenalised = (
        next(token for token in reply.json()["tokens"] if token["text"] == "l")
        for reply in (
            post(output_tokens=list(b"al"), presence_penalty=2),
            post(prompt=list(b"dal"), presence_penalty=2),
        )
    )
    assert penalised["adjusted_probability"] < penalised["model_probability"], "it is in the output"
    assert unpenalised["adjusted_probability"] == pytest.approx(unpenalised["model_probability"])


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"model": None}, 422, "model", None),
        ({"prompt": ["a", "b"]}, 422, "prompt", None),
        ({"output_tokens": [5000]}, 422, "output_tokens", None),
        ({"output_tokens": [-1]}, 422, "output_tokens", None),
        ({"output_tokens": [1] * 5000}, 400, "output_tokens", "context_length_exceeded"),
        ({"top": 0}, 422, "top", None),
        ({"top": 101}, 422, "top", None),
        ({"temperature": 3}, 422, "temperature", None),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, Any], status: int, param: str, code: str | None) -> None:
    reply = post(**fields)
    error = reply.json()["error"]
    assert (reply.status, error["param"], error["code"]) == (status, param, code)


def test_a_client_that_goes_away_ends_it() -> None:
    model = recite("held")
    model.hold_at = 1
    served = serve_model(model)

    async def work() -> None:
        client = Client(served.app)
        exchange = client.begin("POST", "/v1/next_token", BODY)
        await asyncio.sleep(0.1)
        exchange.disconnect()
        await asyncio.wait_for(exchange.task, 20)
        assert exchange.reply.status == 0
        model.gate.set()
        assert (await client.post("/v1/next_token", {**BODY, "prompt": [1, 2]})).status == 200

    asyncio.run(work())


def test_it_wants_a_key_and_a_model_that_is_there() -> None:
    served = serve_model(api_keys=("k",))
    assert asyncio.run(Client(served.app).post("/v1/next_token", BODY)).status == 401
    served.state.phase = "draining"
    keyed = Client(served.app, {"authorization": "Bearer k"})
    assert asyncio.run(keyed.post("/v1/next_token", BODY)).status == 503

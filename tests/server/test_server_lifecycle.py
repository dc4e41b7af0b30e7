"""A server as a process: it starts, drains when told to stop, aborts when told twice, reports how it went."""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from running_server import SCRIPTED, SERVE, RunningServer, running_server

BODY = {"model": "scripted", "prompt": [100], "temperature": 0, "max_tokens": 26, "stream": True}


class Stream:
    """A stream read in a thread."""

    def __init__(self, server: RunningServer) -> None:
        host, _, port = server.url.removeprefix("http://").partition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        content = json.dumps(BODY).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        self._frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> Any:
        return self._frames.get(timeout=30)

    def rest(self) -> list[Any]:
        frames = []
        while (frame := self.next()) is not None:
            frames.append(frame)
        return frames

    def _read(self) -> None:
        for line in self._socket.makefile("rb"):
            if line.startswith(b"data: "):
                contents = line[6:].strip()
                self._frames.put("[DONE]" if contents == b"[DONE]" else json.loads(contents))
                if contents == b"[DONE]":
                    break
        self._frames.put(None)


def scripted(*options: str, until_ready: bool = True) -> Any:
    return running_server(*options, command=SCRIPTED, until_ready=until_ready)


def test_a_signal_lets_requests_in_flight_finish_and_turns_others_away() -> None:
    with scripted("--step-seconds", "0.1") as server:
        stream = Stream(server)
        stream.next()
        server.signal(signal.SIGTERM)
        server.wait_for("shutting down: 1 requests in flight")
        assert server.get("/health") == (503, '{"status":"draining"}')
        assert server.get("/v1/models")[0] == 503
        *frames, last, done = stream.rest()
        assert done == "[DONE]"
        assert len(frames) == 24
        assert last["choices"][0]["finish_reason"] == "length"
        assert server.exit_code() == 0
        assert "all requests were finished" in server.log


def test_a_second_signal_aborts_them() -> None:
    with scripted("--step-seconds", "1") as server:  # 26 s for the whole text
        stream = Stream(server)
        stream.next()
        server.signal(signal.SIGINT)
        server.wait_for("shutting down")
        server.signal(signal.SIGINT)
        *frames, error, done = stream.rest()
        assert (error["error"]["code"], done) == ("shutting_down", "[DONE]")
        assert len(frames) < 24, "it hasn't waited for the text's end"
        assert server.exit_code() == 128 + signal.SIGINT
        assert "1 requests were aborted" in server.log


@pytest.mark.slow
def test_those_that_take_longer_than_drain_seconds_are_aborted() -> None:
    with scripted("--step-seconds", "0.2", "--drain-seconds", "0.3") as server:
        stream = Stream(server)
        stream.next()
        server.signal(signal.SIGTERM)
        *_, error, done = stream.rest()
        assert (error["error"]["code"], done) == ("shutting_down", "[DONE]")
        assert server.exit_code() == 1


def test_the_port_is_open_while_the_model_loads_and_a_signal_ends_that() -> None:
    with scripted("--load-seconds", "100", until_ready=False) as server:
        server.url = server.wait_for(r"listening on (http://\S+)")[1]
        assert server.get("/health") == (503, '{"status":"loading"}')
        server.signal(signal.SIGTERM)
        assert server.exit_code(20) == 0


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SERVE, *options], capture_output=True, text=True, timeout=60, check=False)


def test_a_model_that_isnt_there_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = run("--port", "0", "--model", str(tmp_path / "nowhere.gguf"), "--log-level", "error")
    assert result.returncode == 2
    assert result.stderr.startswith("tokenstep serve: ")
    assert "nowhere.gguf" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line_and_exit_code_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("--port", str(port))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"can't listen on 127.0.0.1 port {port}: Address already in use" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "70000: expected a port from 0 to 65535"),
        (["--max-waiting", "0"], "0: expected at least 1"),
        (["--drain-seconds", "-1"], "expected a number of seconds"),
        (["--validation-status", "500"], "invalid choice: 500"),
        (["--ssl-keyfile", "key"], "--ssl-certfile and --ssl-keyfile go together"),
        (["--api-key", ""], "an API key is empty"),
        (["--api-key-file", "/nowhere"], "No such file"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenstep.cli.main import main

    try:
        code = main(["serve", *options])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1

"""`tokenstep batch` as a process: killed at any moment, it loses nothing and does nothing twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tokenstep as ts
from tokenstep.cli.main import main

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import build, save_folder

COMMAND = [sys.executable, "-m", "tokenstep.cli.main", "batch"]
COUNT = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(build("llama"), tmp_path_factory.mktemp("batch") / "tiny")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    body = {"model": "tiny", "max_tokens": 24, "ignore_eos": True}
    lines = [
        {
            "custom_id": f"request-{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {**body, "prompt": [3 + i % 200, 5], "seed": i, "n": 1 + i % 2},
        }
        for i in range(COUNT)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def start(model: Path, source: Path, output: Path) -> subprocess.Popen[bytes]:
    options = ["--model", str(model), "--device", "cpu", "--dtype", "float32", "--max-num-seqs", "4"]
    return subprocess.Popen(
        [*COMMAND, str(source), str(output), *options, "--kv-tokens", "512"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stderr=subprocess.PIPE,
    )


def whole_lines(output: Path) -> list[dict[str, Any]]:
    if not output.exists():
        return []
    return [
        json.loads(line) for line in output.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
    ]


def assert_complete(output: Path) -> None:
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    ids = [line["custom_id"] for line in lines]
    assert len(ids) == COUNT
    assert set(ids) == {f"request-{i}" for i in range(COUNT)}
    assert all(line["error"] is None and line["response"]["status_code"] == 200 for line in lines)


def finish(model: Path, source: Path, output: Path) -> str:
    process = start(model, source, output)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors.decode()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = start(model, source, output)
    while len(whole_lines(output)) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    before = whole_lines(output)
    assert 5 <= len(before) < COUNT

    report = finish(model, source, output)

    assert report == f"{output}: {COUNT} results, 0 of them errors; {len(before)} were there before\n"
    assert whole_lines(output)[: len(before)] == before
    assert_complete(output)


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_it_still_completes(
    model: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    chance = random.Random(7)
    counts = []
    for _ in range(20):
        process = start(model, source, output)
        begun, known = time.monotonic(), len(whole_lines(output))
        if chance.random() < 0.75:  # most kills while it writes, the rest at any moment of its start
            while process.poll() is None and len(whole_lines(output)) <= known:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))
        else:
            time.sleep(chance.uniform(0, 2.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert time.monotonic() - begun < 120
        lines = whole_lines(output)
        assert len({line["custom_id"] for line in lines}) == len(lines) >= known
        counts.append(len(lines))
    assert counts[-1] > 0
    finish(model, source, output)
    assert_complete(output)


class TestInProcess:
    @pytest.fixture(autouse=True)
    def _loaded(self, llm: ts.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tokenstep.llm.LLM", lambda *args, **options: llm)
        monkeypatch.setattr(llm, "close", lambda: None)

    def test_completions_and_chats_of_the_real_model(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        question = [{"role": "user", "content": "What is the capital of Germany?"}]
        shared = {"model": "smollm2", "temperature": 0}
        requests = {
            "text": ("/v1/completions", {"prompt": "The capital of Germany is", "max_tokens": 1}),
            "chat": ("/v1/chat/completions", {"messages": question}),
            "wrong": ("/v1/chat/completions", {"messages": []}),
        }
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text(
            "\n".join(
                json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {**shared, **body}})
                for name, (url, body) in requests.items()
            )
        )
        assert main(["batch", str(source), str(output)]) == 1
        assert capsys.readouterr().err == f"{output}: 3 results, 1 of them errors\n"
        found = {line["custom_id"]: line for line in whole_lines(output)}
        assert found["text"]["response"]["body"]["choices"][0]["text"] == " Berlin"
        answer = found["chat"]["response"]["body"]["choices"][0]["message"]["content"]
        assert answer == "The capital of Germany is Berlin."
        assert found["wrong"]["error"]["message"].startswith("messages = []")

        assert main(["batch", str(source), str(output)]) == 1
        assert capsys.readouterr().err == f"{output}: 3 results, 1 of them errors; 3 were there before\n"
        assert len(whole_lines(output)) == 3

    def test_wrong_files_are_one_line_and_exit_code_2(
        self, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "out.jsonl"
        other = tmp_path / "other.jsonl"
        other.write_text('{"custom_id": "of another", "error": null}\n')
        bad = tmp_path / "bad.jsonl"
        bad.write_text("{}\n5\n")
        for words, message in (
            ([tmp_path / "nowhere", output], "nowhere: No such file or directory"),
            (
                [bad, output],
                "bad.jsonl: line 1: custom_id = None, expected a string; line 2: expected",
            ),
            ([source, other], "other.jsonl: has a result of custom_id = 'of another'"),
            ([source, source], "in.jsonl: the output is the input"),
        ):
            assert main(["batch", *map(str, words)]) == 2
            error = capsys.readouterr().err
            assert error.startswith("tokenstep batch: ")
            assert message in error
            assert error.count("\n") == 1
        assert not output.exists()

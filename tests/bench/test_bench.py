"""The benchmarks: what they time, what they keep, and that the command works end to end."""

import json

import pytest

from tokenstep.bench.report import FLOOR, OURS, Report
from tokenstep.bench.timer import Timing, interleave
from tokenstep.cli.main import main


def test_every_function_is_timed_once_a_round_in_a_rotating_order():
    calls = []
    names = ("a", "b", "c")
    times = interleave(
        {name: lambda name=name: calls.append(name) for name in names}, min_rounds=6, max_rounds=6
    )
    assert {name: times[name].rounds for name in names} == dict.fromkeys(names, 6)
    rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab"] * 2


def test_the_budget_ends_a_run_after_the_least_number_of_rounds():
    times = interleave({"a": lambda: None}, min_rounds=3, max_rounds=1000, budget_s=0.0)
    assert times["a"].rounds == 3


def report_of(rows):
    report = Report("sample", {"vocab_size": 100})
    for case, impl, median in rows:
        report.add(case | {"impl": impl}, Timing(median, median, 9))
    return report


def test_a_report_gives_ratios_within_a_case_and_survives_its_file(tmp_path):
    case = {"mode": "greedy", "dtype": "float32", "batch": 1, "threads": 1}
    report = report_of([(case, FLOOR, 10.0), (case, OURS, 12.5), (case, "torch", 50.0)])
    table = report.markdown()
    assert "1.25" in table
    assert "4.0" in table
    report.save(tmp_path / "deep" / "result.json")
    kept = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert kept["machine"]["cores"] >= 1
    assert kept["machine"]["commit"] is None or len(kept["machine"]["commit"]) >= 7
    assert len(kept["rows"]) == 3
    assert Report.load(tmp_path / "deep" / "result.json").markdown() == table


SMALL = {
    "sample": ["--batches", "2", "--vocab-size", "1000", "--dtypes", "float32"],
    "attention": ["--batches", "1", "--contexts", "64,128", "--block-sizes", "16", "--dtypes", "float32"],
    "attention of quantised caches": [
        "--batches",
        "2",
        "--contexts",
        "64",
        "--block-sizes",
        "3",
        "--dtypes",
        "bfloat16",
        "--cache-dtypes",
        "same,int8,float8_e4m3",
    ],
}


SMALL_ATTENTION = ["attention", *SMALL["attention"][2:]]


@pytest.mark.slow
@pytest.mark.parametrize("op", SMALL)
def test_the_command_prints_a_table_and_writes_json_and_a_plot(op, tmp_path, capsys):
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(["bench", op.split()[0], *SMALL[op], "--threads", "1", "--budget", "0.001", *files]) == 0
    out = capsys.readouterr().out
    assert "tokenstep" in out
    assert "floor" in out
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["impl"] for row in rows} >= {FLOOR, OURS, "torch"}
    assert all(row["median_us"] > 0 for row in rows)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_half_of_the_tokens_may_be_one_sequence_s(capsys):
    options = ["--batches", "1,4", "--lengths", "equal,skewed", "--models", "SmolLM2-135M"]
    assert main(["bench", *SMALL_ATTENTION, *options, "--threads", "1", "--budget", "0.001"]) == 0
    table = capsys.readouterr().out
    assert table.count("| skewed |") == 2  # contexts, with the batch of 4


def test_an_unknown_peer_is_refused_by_name(capsys):
    assert main(["bench", "sample", "--peers", "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err

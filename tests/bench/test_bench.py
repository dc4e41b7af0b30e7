"""The benchmarks: what they time, what they keep, and that the command works end to end."""

import importlib.util
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


def test_a_comparison_matches_cases_and_gives_new_over_old():
    case = {"mode": "greedy", "batch": 1}
    old = report_of([(case, OURS, 20.0), (case, "torch", 50.0), ({"mode": "greedy", "batch": 2}, OURS, 1.0)])
    new = report_of(
        [({"batch": 1, "mode": "greedy"}, OURS, 15.0), (case, "torch", 50.0), ({"mode": "t"}, OURS, 1.0)]
    )
    table = new.compared_with(old).splitlines()
    assert table[0] == "| batch | mode | impl | measure | old | new | new / old |"
    assert table[2:4] == [
        "| 1 | greedy | tokenstep | median_us | 20 | 15 | 0.75 |",
        "| 1 | greedy | torch | median_us | 50 | 50 | 1.00 |",
    ]
    assert table[-1] == "Cases of one run alone: 1 old, 1 new."
    with pytest.raises(ValueError, match="of bench attention, expected of bench sample"):
        new.compared_with(Report("attention", {}))


def test_a_comparison_of_rates_shows_each_median():
    row = {
        "impl": OURS,
        "concurrency": 4,
        "requests": 90,
        "tokens_per_s": 100.0,
        "ttft_median_ms": 5.0,
        "ttft_p99_ms": 9,
    }
    old, new = (
        Report("serve", {}, rows=[row]),
        Report("serve", {}, rows=[row | {"requests": 7, "tokens_per_s": 150.0}]),
    )
    table = new.compared_with(old)
    assert "| tokenstep | 4 | tokens_per_s | 100 | 150 | 1.50 |" in table
    assert "| tokenstep | 4 | ttft_median_ms | 5 | 5 | 1.00 |" in table


def test_compare_prints_ratios_even_to_the_file_that_is_written_anew(tmp_path, capsys):
    command = ["bench", "sample", *SMALL["sample"], "--threads", "1", "--budget", "0", "--peers", ""]
    file = tmp_path / "old.json"
    assert main([*command, "--json", str(file)]) == 0
    capsys.readouterr()
    assert main([*command, "--json", str(file), "--compare", str(file)]) == 0
    assert "new / old" in capsys.readouterr().out
    for content, why in (
        ("{", "Expecting"),
        ('{"bench": "serve", "settings": {}}', "results of bench serve"),
    ):
        file.write_text(content)
        assert main([*command, "--compare", str(file)]) == 1
        captured = capsys.readouterr()
        assert why in captured.err
        assert not captured.out


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


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert main(["bench", "sample", "--plot", str(tmp_path / "x.svg")]) == 1
    assert "matplotlib is needed for --plot: pip install tokenstep[bench]" in capsys.readouterr().err


def test_an_unknown_peer_is_refused_by_name(capsys):
    assert main(["bench", "sample", "--peers", "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err

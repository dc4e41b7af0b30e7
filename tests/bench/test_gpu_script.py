"""bench/gpu.sh as far as it runs without a GPU: limits, files, and arguments that its commands take."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tokenstep.bench.generate import KINDS
from tokenstep.bench.shapes import SHAPES
from tokenstep.cli import bench

ROOT = Path(__file__).parents[2]
PARTS = ("kernels", "engine", "compiled")


@pytest.fixture(params=PARTS)
def part(request):
    """Of bench/gpu.sh."""
    return request.param


@pytest.fixture
def dry_run(part, tmp_path):
    """What bench/gpu.sh would run of a part, where compute-sanitizer is installed."""
    tool = tmp_path / "compute-sanitizer"
    tool.touch(mode=0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--dry-run", part, "results"]
    environment = os.environ | {"PATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_the_limits_of_all_steps_add_up_to_less_than_nine_minutes(part, dry_run):
    limits = [int(n) for n in re.findall(r"\(at most (\d+) s\)", dry_run)]
    assert len(limits) == {"kernels": 12, "engine": 8, "compiled": 4}[part]
    assert sum(limits) < 9 * 60


@pytest.mark.parametrize("part", ["engine"])
def test_the_scripts_of_the_engines_part_take_their_arguments(dry_run):
    lines = re.findall(r"== \S+ \(at most \d+ s\): \S+ (bench/\S+\.py) (.*)", dry_run)
    assert len(lines) == 3
    for script, words in lines:
        known = (ROOT / script).read_text()
        for option, value in re.findall(r"(--[a-z-]+) (\S+)", words):
            assert f'"{option}"' in known
            assert option != "--shape" or value in SHAPES


@pytest.mark.parametrize("part", ["kernels"])
def test_the_sanitizers_have_some_tests_of_each_kernel(dry_run):
    selections = set(re.findall(r"== sanitizer-.* (-m cuda and not slow) (tests/.*) -k (.*)", dry_run))
    [(_, files, few)] = selections
    command = ["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "cuda and not slow", *files.split()]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *command, "-k", few], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for file in files.split():
        assert 1 <= found.count(f"{file}::") <= 8, found


def test_every_benchmark_of_the_script_has_arguments_that_the_command_takes(part, dry_run):
    lines = re.findall(r"== bench-.*? s\): \S+ -m tokenstep\.cli\.main bench (.*)", dry_run)
    assert len(lines) == {"kernels": 5, "engine": 2, "compiled": 2}[part]
    known = bench.GPU_PEERS if part == "kernels" else KINDS
    for line in lines:
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        args = parser.parse_args(line.split())
        assert args.device == "cuda"
        assert args.json.parent == Path("results")
        assert not args.peers or set(args.peers) <= set(known)


def test_every_file_of_tests_that_the_script_names_exists(dry_run):
    for line in dry_run.splitlines():
        for path in re.findall(r"tests/\S+\.py", line):
            assert list(ROOT.glob(path)), path

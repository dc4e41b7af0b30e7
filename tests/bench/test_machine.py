"""What a result says of the commit that it was measured at."""

import subprocess

import pytest

from tokenstep.bench import machine


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A commit with a source and a result; its folder."""
    for name in ("python/source.py", "bench/results/result.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "python" / "source.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "marked"), [("python/source.py", True), ("bench/results/result.json", False)]
)
def test_changes_of_what_is_measured_are_marked_and_those_of_results_are_not(checkout, changed, marked):
    commit = machine.describe_machine()["commit"]
    assert len(commit) == 12
    (checkout / changed).write_text("2\n")
    assert machine.describe_machine()["commit"] == commit + "-dirty" * marked


def test_a_package_outside_of_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "source.py"))
    assert machine.describe_machine()["commit"] is None

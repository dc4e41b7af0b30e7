"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 1.6e-2)], ids=str
)
@pytest.mark.parametrize("heads", ["9 3 64", "4 4 16", "7 1 80"])
def test_cascade_attention_agrees_with_plain_attention(heads, dtype, bound, capsys):
    """The bound: results of at most 1, rounded to the dtype for each part and once more by the merge."""
    sizes = ["--batch", "5", "--prefix", "96", "--suffix", "21", "--block-size", "16"]
    difference = example("cascade").main([*sizes, "--dtype", dtype, "--heads", *heads.split()])
    assert difference <= bound
    printed = capsys.readouterr().out
    assert "plain" in printed
    assert "cascade" in printed


def test_cascade_refuses_a_prefix_that_ends_within_a_block(capsys):
    with pytest.raises(SystemExit):
        example("cascade").main(["--prefix", "97"])
    assert "multiple of --block-size" in capsys.readouterr().err

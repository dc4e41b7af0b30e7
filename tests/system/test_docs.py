"""The Python examples of the README and of every page in docs run as they stand."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import pytest
from server_in_thread import server_in_thread

import tokenstep as ts
from tokenstep.completions.service import CompletionService
from tokenstep.engine import Engine, EngineConfig

SERVER = "127.0.0.1:8000"  # in an example: one is started for it
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples(page: Path) -> list[tuple[int, str]]:
    """(line of the page, source) of each example."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in EXAMPLE.finditer(text)]


def in_that_mode(llm: ts.LLM) -> ts.LLM:
    """The same weights with batch_invariant."""
    twin = copy.copy(llm)
    config = EngineConfig(max_batch=8, kv_tokens=1024, batch_invariant=True)
    twin._service = CompletionService(
        Engine(llm.service.engine.runner.model, llm.tokenizer.vocab_size, config),
        llm.tokenizer,
        model_name="smollm2",
        system_fingerprint="",
    )
    return twin


def uses_server(page: Path) -> bool:
    return any(SERVER in source for _, source in examples(page))


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_run_one_after_the_other(
    page: Path, llm: ts.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(model: str = "smollm2", *, batch_invariant: bool = False) -> ts.LLM:
        assert model == "smollm2"
        return in_that_mode(llm) if batch_invariant else llm

    monkeypatch.setattr(ts, "LLM", loaded)
    names: dict[str, Any] = {"__name__": page.stem}
    threads = ts.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(ts.set_num_threads, threads)
        address = stack.enter_context(server_in_thread(llm.service)) if uses_server(page) else SERVER
        for line, source in examples(page):
            source = source.replace(SERVER, address)
            # as many empty lines before it as in the page, so that a failure names the page's line
            exec(compile("\n" * line + source, str(page), "exec"), names)

"""What LLM is given for its engine."""

from types import SimpleNamespace

import pytest

import tokenstep as ts


def test_what_says_how_the_engine_works_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "max_batch": 3,
        "kv_tokens": 96,
        "kv_cache_dtype": "int8",
        "gpu_memory_utilization": 0.5,
        "cuda_graphs": False,
        "batch_invariant": True,
        "max_waiting": 7,
        "max_waiting_tokens": 900,
    }
    configs = []

    def engine(model: object, vocab_size: int, config: object) -> None:
        configs.append(config)
        raise InterruptedError

    loaded = SimpleNamespace(name="a", model=None, tokenizer=SimpleNamespace(vocab_size=1))
    monkeypatch.setattr("tokenstep.llm.load", lambda *_, **__: loaded)
    monkeypatch.setattr("tokenstep.llm.Engine", engine)
    with pytest.raises(InterruptedError):
        ts.LLM("a", **given)
    assert {name: getattr(configs[0], name) for name in given} == given

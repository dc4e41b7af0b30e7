from __future__ import annotations

from collections.abc import Callable

import pytest
from history_model import VOCAB, HistoryModel

from tokenstep.engine import Engine, EngineConfig


@pytest.fixture
def model() -> HistoryModel:
    return HistoryModel()


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def make_engine(model: HistoryModel, request: pytest.FixtureRequest) -> Callable[..., Engine]:
    def make(**sizes: int) -> Engine:
        defaults = {"max_batch": 8, "kv_tokens": 256, "block_size": 4, "reads_late": request.param}
        return Engine(model, VOCAB, EngineConfig(**{**defaults, **sizes}))

    return make

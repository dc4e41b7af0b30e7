from __future__ import annotations

from collections.abc import Callable

import pytest
from history_model import VOCAB, HistoryModel

from tokenstep.engine import Engine, EngineConfig


@pytest.fixture
def model() -> HistoryModel:
    return HistoryModel()


@pytest.fixture
def make_engine(model: HistoryModel) -> Callable[..., Engine]:
    def make(**sizes: int) -> Engine:
        return Engine(
            model, VOCAB, EngineConfig(**{"max_batch": 8, "kv_tokens": 256, "block_size": 4, **sizes})
        )

    return make

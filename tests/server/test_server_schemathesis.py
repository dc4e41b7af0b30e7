"""Requests made from the description itself, right and wrong ones: whatever comes, no 5xx and no hang."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from running_server import SCRIPTED, RunningServer, running_server
from served import serve_model

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

pytestmark = [pytest.mark.peer, pytest.mark.slow]

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
EXAMPLES = 400
SECONDS = 10  # more is a hang: the model is quick
DESCRIPTION = schemathesis.openapi.from_dict(serve_model().app.openapi())
OPERATIONS = {
    f"{o.method.upper()} {o.path}": o for o in (found.ok() for found in DESCRIPTION.get_all_operations())
}
CASES = [(name, GenerationMode.POSITIVE) for name in OPERATIONS] + [
    (name, GenerationMode.NEGATIVE)
    for name in OPERATIONS
    if name.startswith("POST")  # they have something in them
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(command=SCRIPTED) as running:
        yield running


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_no_request_breaks_the_server(operation: str, mode: Any, server: RunningServer) -> None:
    cases = OPERATIONS[operation].as_strategy(generation_mode=mode)

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        database=None,
    )
    @hypothesis.given(case=cases)
    def check(case: Any) -> None:
        reach_the_model(case.body)
        case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=SECONDS)

    check()


def test_nothing_is_left_behind(server: RunningServer) -> None:
    """Runs after the others."""
    assert server.is_idle()
    assert server.get("/health")[0] == 200
    assert server.metric('tokenstep_http_requests_total{method="POST",route="/completions",status="200"}') > 0
    assert "Traceback" not in server.log


def reach_the_model(body: Any) -> None:
    """Most made-up requests would end at an unknown model, or a length beyond the context."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "scripted"
    if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 40:
        body["max_tokens"] %= 40

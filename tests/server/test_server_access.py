"""Who may call what: API keys, CORS; and what is said of each request: ids, the access log, metrics."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from asgi_client import Client, Reply
from prometheus_client.parser import text_string_to_metric_families
from scripted_model import recite
from served import COMPLETIONS, body, serve_model

from tokenstep.server import auth
from tokenstep.server.auth import collect_keys

KEYS = ("first-key", "second-key")


def request(served: Any, method: str, path: str, *arguments: Any, **headers: str) -> Reply:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(Client(served.app).request(method, path, *arguments, headers=headers))


class TestKeys:
    @pytest.mark.parametrize("value", ["Bearer first-key", "Bearer second-key", "bearer  second-key "])
    def test_any_key_opens(self, value: str) -> None:
        served = serve_model(api_keys=KEYS)
        assert request(served, "POST", COMPLETIONS, body(), authorization=value).status == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"authorization": ""},
            {"authorization": "Bearer"},
            {"authorization": "Bearer "},
            {"authorization": "Bearer first-ke"},
            {"authorization": "Bearer first-key2"},
            {"authorization": "Basic first-key"},
            {"authorization": "first-key"},
            {"authorization": "Bearer \xe9\xff"},
        ],
    )
    @pytest.mark.parametrize("path", [COMPLETIONS, "/completions", "/v1/models", "/openapi.json", "/nowhere"])
    def test_nothing_else_does(self, headers: dict[str, str], path: str) -> None:
        reply = request(serve_model(api_keys=KEYS), "POST", path, body(), **headers)
        assert (reply.status, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["detail"][0]["msg"] == reply.json()["error"]["message"]

    @pytest.mark.parametrize("path", ["/health", "/", "/metrics"])
    def test_what_operators_and_browsers_look_at_is_open(self, path: str) -> None:
        assert request(serve_model(api_keys=KEYS), "GET", path).status == 200

    @pytest.mark.parametrize("prefix", ["", "/llm"])
    def test_a_proxy_may_leave_its_prefix_in_front_or_not(self, prefix: str) -> None:
        served = serve_model(api_keys=KEYS, root_path="/llm")
        assert request(served, "GET", f"{prefix}/health").status == 200
        assert request(served, "GET", f"{prefix}/v1/models").status == 401
        assert request(served, "GET", f"{prefix}/v1/models", authorization="Bearer first-key").status == 200

    def test_metrics_can_be_protected(self) -> None:
        served = serve_model(api_keys=KEYS, protect_metrics=True)
        assert request(served, "GET", "/metrics").status == 401
        assert request(served, "GET", "/metrics", authorization="Bearer first-key").status == 200
        assert request(served, "GET", "/health").status == 200

    @pytest.mark.parametrize("value", ["Bearer ", "Bearer anything", "nonsense"])
    def test_without_keys_any_token_will_do(self, value: str) -> None:
        assert request(serve_model(), "POST", COMPLETIONS, body(), authorization=value).status == 200

    def test_every_key_is_compared_whichever_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compared: list[bytes] = []

        def spy(given: bytes, known: bytes) -> bool:
            compared.append(known)
            assert len(given) == len(known)
            return given == known

        monkeypatch.setattr(auth.hmac, "compare_digest", spy)
        served = serve_model(api_keys=KEYS)
        assert request(served, "GET", "/v1/models", authorization="Bearer first-key").status == 200
        assert len(compared) == 2

    def test_a_body_is_not_read_for_a_stranger(self) -> None:
        async def work() -> int:
            app = serve_model(api_keys=KEYS).app
            exchange = Client(app).begin("POST", COMPLETIONS, pieces=[b"never ends"] * 3)
            await exchange.whole()
            return exchange._incoming.qsize()

        assert asyncio.run(work()) == 3

    def test_keys_come_from_options_the_environment_and_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "keys"
        file.write_text("# operators\nfile-key\n\n  spaced-key  \n")
        monkeypatch.setenv(auth.ENVIRONMENT, "one, two,,")
        assert collect_keys(["a", "a"], file) == ("a", "one", "two", "file-key", "spaced-key")
        monkeypatch.delenv(auth.ENVIRONMENT)
        assert collect_keys([], None) == ()

    @pytest.mark.parametrize("key", ["", "with space", "schlüssel", "tab\tinside"])
    def test_a_key_that_no_header_carries_is_refused(self, key: str) -> None:
        with pytest.raises(ValueError, match="API key"):
            collect_keys([key], None)

    def test_a_file_without_a_key_is_refused(self, tmp_path: Path) -> None:
        """Or a server that was meant to be closed would be open."""
        file = tmp_path / "keys"
        file.write_text("# none yet\n")
        with pytest.raises(ValueError, match="has no API key"):
            collect_keys([], file)


class TestCors:
    def test_no_page_from_elsewhere_may_call_unless_said(self) -> None:
        reply = request(serve_model(), "POST", COMPLETIONS, body(), origin="https://example.com")
        assert not any(name.startswith("access-control") for name in reply.headers)

    def test_allowed_pages_may_and_see_errors_too(self) -> None:
        served = serve_model(allowed_origins=("https://example.com",), api_keys=KEYS)
        preflight = {
            "origin": "https://example.com",
            "access_control_request_method": "POST",
            "access_control_request_headers": "authorization,content-type",
        }
        reply = request(served, "OPTIONS", COMPLETIONS, **preflight)
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://example.com")
        refused = request(served, "POST", COMPLETIONS, body(), origin="https://example.com")
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == "https://example.com"
        other = request(served, "OPTIONS", COMPLETIONS, **{**preflight, "origin": "https://evil.example"})
        assert other.status == 400


class TestRequestIds:
    @pytest.mark.parametrize("given", ["abc-123", "A.b:c_d", "x" * 128])
    def test_a_sane_one_is_kept(self, given: str) -> None:
        assert request(serve_model(), "GET", "/health", x_request_id=given).headers["x-request-id"] == given

    @pytest.mark.parametrize("given", ["", "two words", "x" * 129, "a\nb", "é"])
    def test_another_is_replaced(self, given: str) -> None:
        reply = request(serve_model(), "GET", "/health", x_request_id=given)
        assert re.fullmatch("req-[0-9a-f]{24}", reply.headers["x-request-id"])

    def test_errors_have_one_too(self) -> None:
        assert request(serve_model(), "GET", "/nowhere", x_request_id="a").headers["x-request-id"] == "a"


class TestAccessLog:
    LINE = re.compile(r"(\S+) test:1 (\w+) (\S+) (\d+) (\d+\+\d+ tokens|-) \d+\.\d ms(?: (cmpl-[0-9a-f]+))?")

    def lines(self, caplog: pytest.LogCaptureFixture) -> list[tuple[str, ...]]:
        said = [record.getMessage() for record in caplog.records if record.name == "tokenstep.access"]
        found = [self.LINE.fullmatch(line) for line in said]
        assert all(found), said
        return [match.groups()[:5] for match in found if match]

    @pytest.mark.parametrize("stream", [False, True])
    def test_each_request_has_one_line(self, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        served = serve_model()
        request(served, "POST", COMPLETIONS, body(stream=stream), x_request_id="mine")
        request(served, "POST", COMPLETIONS, body(temperature=9), x_request_id="bad")
        request(served, "GET", "/a b\ninjected", x_request_id="lost")
        assert self.lines(caplog) == [
            ("mine", "POST", COMPLETIONS, "200", "1+12 tokens"),
            ("bad", "POST", COMPLETIONS, "422", "-"),
            ("lost", "GET", "/a%20b%0Ainjected", "404", "-"),
        ]

    def test_a_client_that_went_away_has_one(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        model = recite("held")
        model.hold_at = 2
        served = serve_model(model)

        async def work() -> None:
            exchange = Client(served.app).begin("POST", COMPLETIONS, body(), headers={"x-request-id": "gone"})
            await asyncio.sleep(0.1)
            exchange.disconnect()
            await exchange.task
            model.gate.set()

        asyncio.run(work())
        assert self.lines(caplog) == [("gone", "POST", COMPLETIONS, "499", "-")]

    def test_it_can_be_off(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        request(serve_model(access_log=False), "GET", "/health")
        assert self.lines(caplog) == []


class TestMetrics:
    def read(self, served: Any) -> dict[str, float]:
        text = request(served, "GET", "/metrics").body.decode()
        return {
            sample.name
            + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def test_tokens_and_times_are_counted(self) -> None:
        served = serve_model()
        request(served, "POST", COMPLETIONS, body(prompt=[1, 2, 3], n=2, temperature=1, ignore_eos=True))
        found = self.read(served)
        assert found["tokenstep_generated_tokens_total"] == 24
        assert found["tokenstep_prompt_tokens_total"] == 3
        assert found["tokenstep_time_to_first_token_seconds_count"] == 1
        assert found["tokenstep_time_per_token_seconds_count"] == 22
        assert found["tokenstep_request_seconds_count"] == 1
        assert found["tokenstep_kv_blocks_used"] == found["tokenstep_requests_waiting"] == 0
        stats = served.service.loop.stats()
        assert found["tokenstep_kv_blocks"] == stats.blocks_total
        assert found["tokenstep_kv_tokens"] == stats.blocks_total * stats.block_size
        assert found["tokenstep_kv_bytes"] == stats.cache_bytes > 0
        assert {"tokenstep_cached_tokens_total", "tokenstep_preemptions_total"} <= found.keys()

    def test_failures_are_counted_by_kind_and_requests_by_route_and_status(self) -> None:
        served = serve_model()
        served.model.poisoned_length = 3
        request(served, "POST", COMPLETIONS, body())
        request(served, "POST", "/completions", body(temperature=7))
        request(served, "GET", "/made/up")
        request(served, "BREW", "/health")
        found = self.read(served)
        assert found["tokenstep_failures_total kind=bad_logits"] == 1
        prefix = "tokenstep_http_requests_total method="
        assert found[f"{prefix}POST route=/completions status=500"] == 1
        assert found[f"{prefix}POST route=/completions status=422"] == 1
        assert found[f"{prefix}GET route=unmatched status=404"] == 1
        assert [name for name in found if "BREW" in name] == []

    def test_what_runs_and_waits_is_seen_while_it_does(self) -> None:
        model = recite("held for a while")
        model.hold_at = 3
        served = serve_model(model, {"max_batch": 1})

        async def work() -> dict[str, float]:
            client = Client(served.app)
            exchanges = [client.begin("POST", COMPLETIONS, body()) for _ in range(3)]
            await asyncio.sleep(0.2)
            found = await asyncio.to_thread(self.read, served)
            model.gate.set()
            for exchange in exchanges:
                await exchange.whole()
            return found

        found = asyncio.run(work())
        assert found["tokenstep_choices_running"] == 1
        assert found["tokenstep_requests_waiting"] == 2
        assert found["tokenstep_kv_used_ratio"] > 0
        assert found["tokenstep_engine_step_seconds"] > 0.05

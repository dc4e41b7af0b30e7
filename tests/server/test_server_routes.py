"""The small routes: models, tokenizer, health, the page, the description of it all."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from asgi_client import Client, Reply
from byte_tokenizer import BEGIN, END
from scripted_model import CONTEXT, recite
from served import COMPLETIONS, body, serve_model

from tokenstep.completions.schema import CompletionRequest
from tokenstep.engine import loop as loop_module


def request(served: Any, method: str, path: str, *arguments: Any) -> Reply:
    return asyncio.run(Client(served.app).request(method, path, *arguments))


class TestModels:
    def test_they_are_listed_in_the_usual_form(self) -> None:
        (card,) = request(serve_model(), "GET", "/v1/models").json()["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("scripted", "model", CONTEXT)
        assert card["created"] > 0

    def test_one_is_found_by_its_id(self) -> None:
        assert request(serve_model(), "GET", "/v1/models/scripted").json()["id"] == "scripted"
        missing = request(serve_model(), "GET", "/v1/models/org/other")
        assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")


class TestTokenizer:
    def test_text_to_ids(self) -> None:
        reply = request(serve_model(), "POST", "/tokenize", {"prompt": "ab", "return_token_strs": True})
        assert reply.json() == {
            "count": 2,
            "max_model_len": CONTEXT,
            "tokens": [97, 98],
            "token_strs": ["a", "b"],
        }
        plain = request(serve_model(), "POST", "/v1/tokenize", {"model": "scripted", "prompt": "é"})
        assert plain.json()["tokens"] == list("é".encode())
        assert plain.json()["token_strs"] is None

    def test_ids_to_text(self) -> None:
        reply = request(serve_model(), "POST", "/detokenize", {"tokens": [97, END, 98]})
        assert reply.json() == {"prompt": "a</s>b"}
        assert request(serve_model(), "POST", "/detokenize", {"tokens": []}).json() == {"prompt": ""}

    @pytest.mark.parametrize(
        ("path", "fields", "status"),
        [
            ("/tokenize", {}, 422),
            ("/tokenize", {"prompt": 5}, 422),
            ("/tokenize", {"prompt": "a", "model": "other"}, 404),
            ("/detokenize", {"tokens": [BEGIN + 1]}, 422),
            ("/detokenize", {"tokens": [-1]}, 422),
            ("/detokenize", {"tokens": "abc"}, 422),
            ("/detokenize", {"tokens": [1], "model": "other"}, 404),
        ],
    )
    def test_what_is_wrong_is_said(self, path: str, fields: dict[str, Any], status: int) -> None:
        reply = request(serve_model(), "POST", path, fields)
        assert reply.status == status
        assert set(reply.json()) == {"error", "detail"}

    def test_it_is_described(self) -> None:
        found = request(serve_model(), "GET", "/tokenizer_info").json()
        assert found["eos_token_ids"] == [END]
        assert (found["bos_token_id"], found["vocab_size"]) == (BEGIN, BEGIN + 1)


class TestHealth:
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_a_server_that_is_ready_is_healthy(self, method: str) -> None:
        assert request(serve_model(), method, "/health").status == 200

    def test_an_engine_that_makes_no_progress_isnt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = recite("stuck")
        model.hold_at = 2
        served = serve_model(model)

        async def work() -> None:
            client = Client(served.app)
            exchange = client.begin("POST", COMPLETIONS, body())
            await asyncio.sleep(0.1)
            assert (await client.get("/health")).status == 200
            monkeypatch.setattr(loop_module, "STALLED_SECONDS", 0.05)
            stalled = await client.get("/health")
            assert (stalled.status, stalled.json()) == (503, {"status": "stalled"})
            model.gate.set()
            await exchange.whole()
            assert (await client.get("/health")).status == 200

        asyncio.run(work())


class TestPage:
    def test_it_is_there_and_asks_nobody_else(self) -> None:
        reply = request(serve_model(), "GET", "/")
        page = reply.body.decode()
        assert reply.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
        assert "<title>" in page
        assert 'lang="en"' in page

    def test_every_field_has_a_label(self) -> None:
        page = request(serve_model(), "GET", "/").body.decode()
        fields = re.findall(r"<(?:input|textarea|select)[^>]* id=\"([^\"]+)\"", page)
        labels = re.findall(r"<label for=\"([^\"]+)\"", page)
        assert len(fields) > 3
        assert sorted(fields) == sorted(labels)


class TestDescription:
    def test_every_field_of_the_request_is_there_and_may_be_null(self) -> None:
        schema = request(serve_model(), "GET", "/openapi.json").json()
        fields = schema["components"]["schemas"]["HttpCompletionRequest"]["properties"]
        assert set(fields) == set(CompletionRequest.model_fields)
        for name, field in fields.items():
            assert field["description"], name
            assert name == "model" or {"type": "null"} in field["anyOf"]

    def test_all_its_references_lead_somewhere(self) -> None:
        reply = request(serve_model(), "GET", "/openapi.json")
        names = set(re.findall(rb'"#/components/schemas/(\w+)"', reply.body))
        assert {name.decode() for name in names} <= set(reply.json()["components"]["schemas"])

    def test_errors_have_the_form_that_they_have(self) -> None:
        schema = request(serve_model(), "GET", "/openapi.json").json()
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                for status, answer in operation["responses"].items():
                    if status != "200" and path != "/health":
                        form = answer["content"]["application/json"]["schema"]["$ref"]
                        assert form.endswith("/ErrorBody"), (path, status)

    def test_it_says_which_routes_want_a_key(self) -> None:
        schema = request(serve_model(), "GET", "/openapi.json").json()
        assert "security" not in schema["paths"]["/v1/completions"]["post"]
        served = serve_model(api_keys=("k",))
        paths = served.app.openapi()["paths"]
        assert paths["/v1/completions"]["post"]["security"] == [{"key": []}]
        assert paths["/health"]["get"]["security"] == []

    def test_it_can_be_browsed(self) -> None:
        assert request(serve_model(), "GET", "/docs").status == 200

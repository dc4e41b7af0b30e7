"""The small routes: models, tokenizer, health, metrics, the page to try it."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from tokenstep.completions.errors import RequestError
from tokenstep.completions.service import CompletionService
from tokenstep.models.tokenizer import Tokenizer
from tokenstep.server.body import BodyParser, read_body
from tokenstep.server.errors import openapi_responses
from tokenstep.server.metrics import CONTENT_TYPE
from tokenstep.server.page import load_page
from tokenstep.server.schema import (
    DetokenizeRequest,
    DetokenizeResponse,
    Health,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
    body_of,
)
from tokenstep.server.state import ServerState


def models_router(state: ServerState) -> APIRouter:
    """The names by which the model can be asked for."""
    router = APIRouter()

    def cards() -> list[ModelCard]:
        limits = state.require_service().limits
        return [
            ModelCard(id=name, created=state.started, root=limits.model_name, max_model_len=limits.context)
            for name in (limits.model_name, *sorted(limits.aliases - {limits.model_name}))
        ]

    @router.get("/models", summary="List the model's names", responses=openapi_responses(401, 503))
    async def list_models() -> ModelList:
        return ModelList(data=cards())

    @router.get("/models/{model:path}", summary="Look one up", responses=openapi_responses(401, 404, 503))
    async def find_model(model: str) -> ModelCard:
        for card in cards():
            if card.id == model:
                return card
        raise _no_such_model(model)

    return router


def tokenizer_router(state: ServerState) -> APIRouter:
    """Text to ids and back, in the forms of vLLM's server."""
    router = APIRouter()
    parser = BodyParser()

    @router.post(
        "/tokenize",
        summary="Turn text into token ids",
        response_model=TokenizeResponse,
        responses=openapi_responses(401, 404, 408, 413, 415, 422, 503),
        openapi_extra=body_of(TokenizeRequest),
    )
    async def tokenize(request: Request) -> Response:
        service = state.require_service()

        def answer(body: bytes) -> str:
            wanted = parser.parse(TokenizeRequest, body)
            _check_model(wanted.model, service)
            tokenizer = service.limits.tokenizer
            try:
                ids = tokenizer.encode(wanted.prompt, wanted.add_special_tokens)
            except ValueError as error:
                raise RequestError(str(error), param="prompt") from None
            names = (
                [tokenizer.id_to_token(token) or "" for token in ids] if wanted.return_token_strs else None
            )
            return TokenizeResponse(
                count=len(ids), max_model_len=service.limits.context, tokens=ids, token_strs=names
            ).model_dump_json()

        body = await read_body(request, state.config.max_body_bytes)
        return Response(await asyncio.to_thread(answer, body), media_type="application/json")

    @router.post(
        "/detokenize",
        summary="Turn token ids into text",
        response_model=DetokenizeResponse,
        responses=openapi_responses(401, 404, 408, 413, 415, 422, 503),
        openapi_extra=body_of(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        service = state.require_service()

        def answer(body: bytes) -> str:
            wanted = parser.parse(DetokenizeRequest, body)
            _check_model(wanted.model, service)
            limits = service.limits
            for index, token in enumerate(wanted.tokens):
                if token >= limits.vocab_size:
                    raise RequestError(
                        f"tokens[{index}] = {token}, expected 0 ≤ token id < {limits.vocab_size}",
                        param="tokens",
                    )
            text = limits.tokenizer.decode(wanted.tokens, skip_special_tokens=False)
            return DetokenizeResponse(prompt=text).model_dump_json()

        body = await read_body(request, state.config.max_body_bytes)
        return Response(await asyncio.to_thread(answer, body), media_type="application/json")

    @router.get("/tokenizer_info", summary="Describe the tokenizer", responses=openapi_responses(401, 503))
    async def tokenizer_info() -> TokenizerInfo:
        limits = state.require_service().limits
        tokenizer = limits.tokenizer
        ends = tokenizer.eos_token_ids
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=limits.vocab_size,
            model_max_length=limits.context,
            add_bos_token=tokenizer.adds_bos_token,
            bos_token=_name(tokenizer, tokenizer.bos_token_id),
            eos_token=_name(tokenizer, ends[0] if ends else None),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends[0] if ends else None,
            eos_token_ids=list(ends),
        )

    return router


def operations_router(state: ServerState) -> APIRouter:
    """What operators and their tools look at, and the page."""
    router = APIRouter()
    page, page_headers = load_page()

    @router.head("/health", include_in_schema=False)
    @router.get(
        "/health",
        summary="Tell whether requests are served: 200 only while the engine makes progress",
        response_model=Health,
        responses={503: {"model": Health, "description": "It loads, drains, has stalled or has stopped"}},
    )
    async def health() -> JSONResponse:
        status = state.health()
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @router.get(
        "/metrics",
        summary="Metrics in Prometheus' text format",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **openapi_responses(401)},
    )
    async def metrics() -> Response:
        return Response(state.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    @router.head("/", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    async def try_it() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers)

    return router


def _check_model(name: str | None, service: CompletionService) -> None:
    limits = service.limits
    if name not in (None, limits.model_name, *limits.aliases):
        raise _no_such_model(name or "")


def _no_such_model(name: str) -> RequestError:
    return RequestError(f"there is no model {name!r}", param="model", code="model_not_found")


def _name(tokenizer: Tokenizer, token: int | None) -> str | None:
    return None if token is None else tokenizer.id_to_token(token)

"""What the next token is drawn from: the model's distribution, and what each step of sampling makes of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from tokenstep.completions.errors import GenerationError, RequestError
from tokenstep.completions.logprobs import token_text
from tokenstep.completions.run import CompletionRun
from tokenstep.completions.schema import CompletionRequest
from tokenstep.completions.service import CompletionService
from tokenstep.engine import FailureOutput, Output, PromptOutput, Request
from tokenstep.sampling import SamplingParams, apply_logits

Cut = Literal["temperature", "min_p", "top_k", "top_p"]
CUTS: tuple[Cut, ...] = ("temperature", "min_p", "top_k", "top_p")
"""The steps that may take tokens out, in their order; temperature does at 0, where one token is left."""
NEUTRAL = {
    "max_tokens": 1,
    "n": 1,
    "best_of": None,
    "stream": False,
    "stream_options": None,
    "echo": False,
    "logprobs": None,
    "loglikelihood": False,
}
"""Fields without a say in what one token is drawn from."""


class CandidateToken(BaseModel):
    """One token that may be next."""

    id: int
    text: str
    model_probability: float = Field(description="in the model's own distribution")
    adjusted_probability: float = Field(description="after bias, penalties and temperature")
    probability: float = Field(description="of being drawn: 0 if it was cut")
    cut_by: Cut | None = Field(description="the step that took it out")


class StepCount(BaseModel):
    """How many tokens are left after one step."""

    step: Cut
    tokens: int


class NextToken(BaseModel):
    """What the token after a prompt and some output is drawn from."""

    model: str
    vocab_size: int
    left: list[StepCount]
    tokens: list[CandidateToken] = Field(description="the likeliest, by the model's own distribution")


async def next_token(
    service: CompletionService, request: CompletionRequest, output_tokens: Sequence[int], top: int
) -> NextToken:
    """What the token after `request`'s one prompt and `output_tokens` is drawn from.

    Of the `top` tokens that are the likeliest before or after bias, penalties and temperature. Raises as
    `CompletionService` does. Cancelling the task ends the request.
    """
    wanted, prompt_length = await asyncio.to_thread(_prepare, service, request, output_tokens)
    logits = await _logits_after(service, wanted)
    return await asyncio.to_thread(_describe, service, wanted, prompt_length, logits, top)


def _prepare(
    service: CompletionService, request: CompletionRequest, output_tokens: Sequence[int]
) -> tuple[Request, int]:
    """What the engine is to compute, and how many of its tokens are the prompt's."""
    run = CompletionRun(request.model_copy(update=NEUTRAL), service.limits)
    if len(run.requests) != 1:
        raise RequestError(f"prompt: {len(run.requests)} prompts, expected one", param="prompt")
    limits, (wanted,) = service.limits, run.requests
    for index, token in enumerate(output_tokens):
        if not 0 <= token < limits.vocab_size:
            raise RequestError(
                f"output_tokens[{index}] = {token}, expected 0 ≤ token id < {limits.vocab_size}",
                param="output_tokens",
            )
    tokens = [*wanted.prompt, *output_tokens]
    if len(tokens) > limits.context:
        raise RequestError(
            f"This model's maximum context length is {limits.context} tokens. However, prompt and output have"
            f" {len(tokens)} tokens.",
            param="output_tokens",
            code="context_length_exceeded",
        )
    prompt_length = len(wanted.prompt)
    wanted = replace(wanted, prompt=tokens, max_tokens=0, prompt_logits=True)
    service.engine.check(wanted)
    return wanted, prompt_length


async def _logits_after(service: CompletionService, wanted: Request) -> npt.NDArray[np.float32]:
    tasks = asyncio.get_running_loop()
    arrived: asyncio.Future[Output] = tasks.create_future()

    def file(output: Output) -> None:
        if not arrived.done():
            arrived.set_result(output)

    def deliver(outputs: list[Output]) -> None:
        with contextlib.suppress(RuntimeError):  # the tasks' loop is closed: nobody waits
            tasks.call_soon_threadsafe(file, outputs[0])

    service.loop.submit([wanted], deliver)
    try:
        output = await arrived
    finally:
        service.loop.cancel(wanted)
    if isinstance(output, FailureOutput):
        raise GenerationError(output.message, output.kind)
    assert isinstance(output, PromptOutput)
    assert output.logits is not None
    if not (output.logits < np.inf).all():
        raise GenerationError("the model's logits contain NaN or +inf", "bad_logits")
    return output.logits


def _describe(
    service: CompletionService,
    wanted: Request,
    prompt_length: int,
    logits: npt.NDArray[np.float32],
    top: int,
) -> NextToken:
    """By the sampler itself: it is asked for each step and all before it."""
    params: SamplingParams = wanted.choices[0]
    rows = len(CUTS)
    after = apply_logits(
        np.tile(logits, (rows, 1)),
        temperature=params.temperature,
        min_p=[0.0] + [params.min_p] * 3,
        top_k=[0] * 2 + [params.top_k] * 2,
        top_p=[1.0] * 3 + [params.top_p],
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        prompt_tokens=[wanted.prompt[:prompt_length]] * rows,
        output_tokens=[wanted.prompt[prompt_length:]] * rows,
        check=False,
    )
    left = after > -np.inf
    if not left[-1].any():
        raise GenerationError("no token is left to draw: every one is banned", "no_token_left")
    model, adjusted, drawn = (_softmax(row) for row in (logits, after[0], after[-1]))
    likeliest = np.argsort(-np.maximum(model, adjusted), kind="stable")[:top]
    likeliest = likeliest[np.argsort(-model[likeliest], kind="stable")]
    limits = service.limits
    return NextToken(
        model=limits.model_name,
        vocab_size=limits.vocab_size,
        left=[StepCount(step=step, tokens=int(row.sum())) for step, row in zip(CUTS, left, strict=True)],
        tokens=[
            CandidateToken(
                id=token,
                text=token_text(limits.tokenizer.token_bytes(token)),
                model_probability=float(model[token]),
                adjusted_probability=float(adjusted[token]),
                probability=float(drawn[token]),
                cut_by=next((step for step, row in zip(CUTS, left, strict=True) if not row[token]), None),
            )
            for token in likeliest.tolist()
        ],
    )


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    result: npt.NDArray[np.float64] = weights / weights.sum()
    return result

"""From a completion request to the engine and back: one path for whole responses and for streams."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence

from tokenstep.completions.choice import Piece
from tokenstep.completions.errors import GenerationError
from tokenstep.completions.run import CompletionRun, Limits, Update
from tokenstep.completions.schema import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChunk,
    CompletionRequest,
)
from tokenstep.engine import Engine, EngineLoop, FailureOutput, Output, QueueFull
from tokenstep.models import LoraAdapter
from tokenstep.models.tokenizer import Tokenizer

INLINE_ENTRIES = 64  # pieces with log probabilities of more tokens are written in a thread: tasks don't wait
request_log = logging.getLogger("tokenstep.requests")

FULL_QUEUE_SECONDS = 0.1  # between two tries of `complete_many`


class CompletionService:
    """Serves completions from one engine, to any number of threads and asyncio tasks.

    The engine runs in a thread of its own (`loop`), so that nobody who waits for tokens holds up another.
    Every method that begins a request raises

        RequestError: the request is wrong.
        QueueFull: too many are waiting (see EngineConfig.max_waiting); it says when to come back.
        EngineStopped: the service is shutting down.
        GenerationError: the tokens can't be computed.

    Args:
        engine: computes the tokens.
        tokenizer: of the engine's model.
        model_name: what the model is called in requests and responses.
        system_fingerprint: names all that decides the tokens.
        default_seed: for requests without a seed; None: fresh entropy for each.
        default_max_tokens: for requests without max_tokens.
        aliases: other names by which requests may call the model.

    Attributes:
        loop: the engine's thread: health, statistics, shutdown; its `observer` is told of every token.
        limits: what the model allows, with its tokenizer and names.
        adapters: those that requests may name; may be changed at any time.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        system_fingerprint: str,
        default_seed: int | None = None,
        default_max_tokens: int = DEFAULT_MAX_TOKENS,
        aliases: frozenset[str] = frozenset(),
    ) -> None:
        self.engine = engine
        self.loop = EngineLoop(engine)
        self.adapters: dict[str, LoraAdapter] = {}
        self.limits = Limits(
            tokenizer=tokenizer,
            vocab_size=engine.vocab_size,
            context=engine.max_length,
            model_context=engine.model_length,
            model_name=model_name,
            system_fingerprint=system_fingerprint,
            default_seed=default_seed,
            default_max_tokens=default_max_tokens,
            aliases=aliases,
            adapters=self.adapters,
        )

    def complete(self, request: CompletionRequest, on_piece: Callable[[], None] | None = None) -> Completion:
        """The whole response; `on_piece` is called whenever there is something new."""
        run = self._prepare(request)
        pieces = [Piece() for _ in run.builders]
        for update in self._updates(run, as_they_come=on_piece is not None):
            pieces[update.index].add(update.piece)
            if on_piece:
                on_piece()
        return run.completion(pieces)

    def complete_many(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """The whole responses of requests that are computed together; a full queue makes it wait.

        One that fails ends all: none is begun if one is wrong.
        """
        runs = [self._prepare(request) for request in requests]
        arrived: list[queue.SimpleQueue[None]] = []
        completions: list[Completion] = []
        try:
            while len(completions) < len(runs):
                while len(arrived) < len(runs):
                    channel: queue.SimpleQueue[None] = queue.SimpleQueue()
                    try:
                        run = runs[len(arrived)]
                        self._submit(run, functools.partial(_put_at_end, run, channel))
                    except QueueFull as error:
                        if len(arrived) > len(completions):
                            break  # first one of ours is finished
                        time.sleep(min(error.retry_after, FULL_QUEUE_SECONDS))
                        continue
                    arrived.append(channel)
                run = runs[len(completions)]
                pieces = [Piece() for _ in run.builders]
                for update in self._follow(run, arrived[len(completions)]):
                    pieces[update.index].add(update.piece)
                completions.append(run.completion(pieces))
        finally:
            for run in runs:
                self._cancel(run)
        return completions

    def score(self, request: CompletionRequest) -> list[list[float]]:
        """Log probabilities of each prompt's tokens but the first; `request` asks for `loglikelihood`."""
        run = self._prepare(request)
        for _ in self._updates(run, as_they_come=False):
            pass
        return run.prompt_scores()

    def stream(self, request: CompletionRequest) -> Generator[CompletionChunk]:
        """The response in chunks. A bad request raises here; closing or dropping the stream ends it."""
        return self._chunks(self._prepare(request))

    async def complete_async(self, request: CompletionRequest) -> Completion:
        """The whole response. Cancelling the task ends the request."""
        run = await asyncio.to_thread(self._prepare, request)
        pieces = [Piece() for _ in run.builders]
        async with contextlib.aclosing(self._updates_async(run)) as updates:
            async for update in updates:
                pieces[update.index].add(update.piece)
        return await asyncio.to_thread(run.completion, pieces)

    async def stream_async(self, request: CompletionRequest) -> AsyncGenerator[CompletionChunk]:
        """The response in chunks; an error before the first is raised where the first is awaited.

        Cancelling the task that waits, or `aclose`, ends the request: use `contextlib.aclosing`.
        """
        run = await asyncio.to_thread(self._prepare, request)
        async with contextlib.aclosing(self._updates_async(run)) as updates:
            async for update in updates:
                costly = update.is_last or len(update.piece.entries) > INLINE_ENTRIES
                if chunk := await asyncio.to_thread(run.chunk, update) if costly else run.chunk(update):
                    yield chunk
        if last := run.usage_chunk():
            yield last

    def _chunks(self, run: CompletionRun) -> Generator[CompletionChunk]:
        for update in self._updates(run):
            if chunk := run.chunk(update):
                yield chunk
        if last := run.usage_chunk():
            yield last

    def _prepare(self, request: CompletionRequest) -> CompletionRun:
        run = CompletionRun(request, self.limits)
        for wanted in run.requests:
            self.engine.check(wanted)
        prompt = f" prompt={request.prompt!r}" if request.log_prompt else ""
        request_log.info("%s prompts=%d user=%r%s", run.id, len(run.prompts), request.user, prompt)
        return run

    def _updates(self, run: CompletionRun, *, as_they_come: bool = True) -> Generator[Update]:
        """What comes of all choices: as it comes, or all at the end, so that no step wakes a thread."""
        arrived: queue.SimpleQueue[None] = queue.SimpleQueue()
        notify = functools.partial(arrived.put, None)
        try:
            self._submit(run, notify if as_they_come else functools.partial(_put_at_end, run, arrived))
            yield from self._follow(run, arrived)
        finally:
            self._cancel(run)

    def _follow(self, run: CompletionRun, arrived: queue.SimpleQueue[None]) -> Generator[Update]:
        while True:
            is_over = run.is_over  # asked first: what comes after stays for the next round
            while run.ready:
                yield run.ready.popleft()
            if is_over:
                break
            arrived.get()
        _raise_failure(run)

    async def _updates_async(self, run: CompletionRun) -> AsyncGenerator[Update]:
        """The same for a task."""
        tasks = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the tasks' loop is closed: nobody waits
                tasks.call_soon_threadsafe(arrived.set)

        try:
            self._submit(run, notify)
            while True:
                arrived.clear()
                is_over = run.is_over
                while run.ready:
                    yield run.ready.popleft()
                if is_over:
                    break
                await arrived.wait()
            _raise_failure(run)
        finally:
            self._cancel(run)

    def _submit(self, run: CompletionRun, notify: Callable[[], None]) -> None:
        self.loop.submit(run.requests, functools.partial(self._take, run, notify))

    def _take(self, run: CompletionRun, notify: Callable[[], None], outputs: list[Output]) -> None:
        """Files outputs, in the engine's thread: a choice that a stop string has ended computes no more."""
        try:
            for output in outputs:
                for request, choice in run.take(output):
                    self.loop.cancel(request, choice)
        except Exception as error:
            run.failure = FailureOutput(outputs[0].request, "broken_step", f"internal error: {error!r}")
            raise
        finally:
            notify()

    def _cancel(self, run: CompletionRun) -> None:
        for request in run.requests:
            self.loop.cancel(request)


def _put_at_end(run: CompletionRun, arrived: queue.SimpleQueue[None]) -> None:
    if run.is_over:
        arrived.put(None)


def _raise_failure(run: CompletionRun) -> None:
    if run.failure is not None:
        raise GenerationError(run.failure.message, run.failure.kind)

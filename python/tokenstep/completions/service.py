"""From a completion request to the engine and back: one path for whole responses and for streams."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator

from tokenstep.completions.choice import Piece
from tokenstep.completions.errors import GenerationError
from tokenstep.completions.run import CompletionRun, Limits
from tokenstep.completions.schema import Completion, CompletionChunk, CompletionRequest
from tokenstep.engine import Engine, Request
from tokenstep.models.tokenizer import Tokenizer

request_log = logging.getLogger("tokenstep.requests")


class CompletionService:
    """Serves completions from one engine, to any number of threads.

    Whoever waits for tokens runs the engine, one step at a time; a step serves all requests in flight.

    Args:
        engine: computes the tokens.
        tokenizer: of the engine's model.
        model_name: what the model is called in requests and responses.
        system_fingerprint: names all that decides the tokens.
        default_seed: for requests without a seed; None: fresh entropy for each.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        system_fingerprint: str,
        default_seed: int | None = None,
    ) -> None:
        self.engine = engine
        self._limits = Limits(
            tokenizer=tokenizer,
            vocab_size=engine.vocab_size,
            context=engine.max_length,
            model_context=engine.model_length,
            model_name=model_name,
            system_fingerprint=system_fingerprint,
            default_seed=default_seed,
        )
        self._lock = threading.Lock()
        self._runs: dict[Request, CompletionRun] = {}

    def complete(self, request: CompletionRequest, on_piece: Callable[[], None] | None = None) -> Completion:
        """The whole response; `on_piece` is called whenever there is something new.

        Raises RequestError for a bad request, GenerationError if its tokens can't be computed.
        """
        run = self._prepare(request)
        pieces = [Piece() for _ in run.builders]
        for index, piece in self._pieces(run):
            pieces[index].add(piece)
            if on_piece:
                on_piece()
        return run.completion(pieces)

    def stream(self, request: CompletionRequest) -> Generator[CompletionChunk]:
        """The response in chunks. A bad request raises here; closing or dropping the stream ends it."""
        return self._chunks(self._prepare(request))

    def _chunks(self, run: CompletionRun) -> Generator[CompletionChunk]:
        for index, piece in self._pieces(run):
            if chunk := run.chunk(index, piece):
                yield chunk
        if last := run.usage_chunk():
            yield last

    def _prepare(self, request: CompletionRequest) -> CompletionRun:
        run = CompletionRun(request, self._limits)
        prompt = f" prompt={request.prompt!r}" if request.log_prompt else ""
        request_log.info("%s prompts=%d user=%r%s", run.id, len(run.prompts), request.user, prompt)
        return run

    def _pieces(self, run: CompletionRun) -> Generator[tuple[int, Piece]]:
        """Pieces of all choices as they come."""
        try:
            with self._lock:
                for request in run.requests:
                    self._runs[request] = run
                    self.engine.add(request)
            while True:
                while run.ready:
                    yield run.ready.popleft()
                if run.error is not None:
                    raise GenerationError(run.error)
                if run.finished:
                    return
                self._advance(run)
        finally:
            for request in run.requests:
                self._runs.pop(request, None)
                self.engine.cancel(request)
            # this may run inside a step, when a forgotten stream is collected: never wait for the lock here
            if self._lock.acquire(blocking=False):
                try:
                    self.engine.drop_cancelled()
                finally:
                    self._lock.release()

    def _advance(self, run: CompletionRun) -> None:
        """One step of the engine, unless another thread has got `run` further meanwhile."""
        with self._lock:
            if run.ready or run.finished or run.error is not None:
                return
            assert self.engine.has_work, "the engine knows every request in flight"
            try:
                outputs = self.engine.step()
            except BaseException:
                self._give_up()
                raise
            for output in outputs:
                if owner := self._runs.get(output.request):
                    for request, choice in owner.take(output):
                        self.engine.cancel(request, choice)
            self.engine.drop_cancelled()

    def _give_up(self) -> None:
        """After a step that broke off midway nothing in flight can go on."""
        for run in list(self._runs.values()):
            run.error = "the engine has failed or was interrupted; the request was dropped"
        self.engine.reset()

"""Batch files: a request a line in, a result a line out, in the form of OpenAI's Batch API.

The output is only ever appended to, and a result counts as done when its whole line is there. So a run that
was killed at any moment goes on where it was: what has a line isn't computed again, a line that was torn is.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenstep.completions.chat import chat_async
from tokenstep.completions.chat_schema import ChatRequest
from tokenstep.completions.errors import GenerationError, RequestError, status_of
from tokenstep.completions.schema import CompletionRequest
from tokenstep.completions.service import CompletionService

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_PROBLEMS = 10  # that are reported of one file
SYNC_SECONDS = 1.0
"""Between two fsyncs: after a power loss, so much may have to be computed again."""


class BatchFileError(ValueError):
    """A file isn't what it should be; the message names file and lines."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_ids(path: Path) -> list[str]:
    """The custom_ids of all lines, in order. Raises BatchFileError naming the lines that are no requests."""
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, text in _lines(path):
        try:
            line = _parse(text)
            if line.custom_id in seen:
                raise ValueError(f"custom_id = {line.custom_id!r} is that of line {seen[line.custom_id]} too")
            seen[line.custom_id] = number
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise BatchFileError(f"{path}: {'; '.join(problems[:MAX_PROBLEMS])}{more}")
    return list(seen)


def read_lines(path: Path, without: set[str]) -> Iterator[BatchLine]:
    """The requests whose custom_id isn't in `without`, as they are wanted."""
    for _, text in _lines(path):
        line = _parse(text)
        if line.custom_id not in without:
            yield line


class BatchOutput:
    """The results, open for appending by one process alone.

    What a killed process has left of a line is cut off.

    Args:
        path: the file; made where there is none.

    Raises:
        BatchFileError: it holds something else than results, or another process writes to it.

    Attributes:
        done: the custom_ids that have a result.
        num_failed: how many of these results are errors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self.done: set[str] = set()
            self.num_failed = 0
            self._end = 0
            self._read()
            os.ftruncate(self._file, self._end)
            _sync_folder(path)
        except BaseException:
            os.close(self._file)
            raise
        self._synced = 0.0
        self._is_broken = False

    def append(self, result: dict[str, Any]) -> None:
        """Writes one result. Raises OSError where the disk refuses; then nothing more is written."""
        if self._is_broken:
            raise OSError(f"{self._path}: an earlier result could not be written")
        line = json.dumps(result).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self.sync()
        except BaseException:
            self._is_broken = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)
        self.done.add(result["custom_id"])
        self.num_failed += result["error"] is not None

    def sync(self) -> None:
        """Returns when all that has been written is on the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs and lets other processes in."""
        try:
            self.sync()
        finally:
            os.close(self._file)

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchFileError(f"{self._path}: another process is writing to it") from None

    def _read(self) -> None:
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                result = _result(line)
                if result is None:
                    if not line.endswith(b"\n"):
                        return  # torn
                    raise BatchFileError(f"{self._path}: line {number}: that is no result of a batch")
                if result["custom_id"] in self.done:
                    raise BatchFileError(
                        f"{self._path}: line {number}: custom_id = {result['custom_id']!r} is there twice"
                    )
                self.done.add(result["custom_id"])
                self.num_failed += result["error"] is not None
                self._end += len(line)


async def run_batch(
    service: CompletionService,
    lines: Iterator[BatchLine],
    output: BatchOutput,
    *,
    in_flight: int,
    on_result: Callable[[], None] = lambda: None,
) -> None:
    """Answers `lines`, so many at a time, and writes each result as soon as it is there.

    A wrong request has an error as its result. Raises OSError where the disk refuses, EngineStopped or
    GenerationError where the engine has been stopped.
    """
    room = asyncio.Semaphore(in_flight)

    async def work(line: BatchLine) -> None:
        try:
            output.append(await answer(service, line))
            on_result()
        finally:
            room.release()

    try:
        async with asyncio.TaskGroup() as tasks:
            for line in lines:
                await room.acquire()
                tasks.create_task(work(line))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def answer(service: CompletionService, line: BatchLine) -> dict[str, Any]:
    """The result of one line."""
    try:
        return _result_of(line, 200, await _complete(service, line))
    except RequestError as error:
        return _failure(
            line, status_of(error), error.message, "invalid_request_error", error.code, error.param
        )
    except GenerationError as error:
        if error.kind in ("stopped", "forked"):  # not this request's doing
            raise
        return _failure(line, 500, str(error), "server_error", error.kind)


async def _complete(service: CompletionService, line: BatchLine) -> dict[str, Any]:
    if line.body.get("stream"):
        raise RequestError("stream = true: a batch has no streams", param="stream")
    if line.url == CHAT:
        chat = await asyncio.to_thread(ChatRequest.parse, line.body)
        return (await chat_async(service, chat)).model_dump()
    request = await asyncio.to_thread(CompletionRequest.parse, line.body)
    return (await service.complete_async(request)).model_dump()


def _result_of(
    line: BatchLine, status: int, body: dict[str, Any], error: dict[str, str] | None = None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line.custom_id,
        "response": {
            "status_code": status,
            "request_id": f"req_{secrets.token_hex(12)}",
            "body": body,
        },
        "error": error,
    }


def _failure(
    line: BatchLine, status: int, message: str, kind: str, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """An error twice: as the server's body, and as the format's own."""
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return _result_of(line, status, body, {"code": code or kind, "message": message})


def _sync_folder(path: Path) -> None:
    """Puts the name of a new file on the disk."""
    folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that aren't blank, with their numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _parse(text: bytes) -> BatchLine:
    """One line of the input; raises ValueError saying what is wrong."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(line, dict):
        raise ValueError("expected an object")
    custom_id, url = line.get("custom_id"), line.get("url")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id = {custom_id!r}, expected a string")
    if line.get("method", "POST") != "POST":
        raise ValueError(f"method = {line['method']!r}, expected 'POST'")
    if url not in (COMPLETIONS, CHAT):
        raise ValueError(f"url = {url!r}, expected {COMPLETIONS!r} or {CHAT!r}")
    if not isinstance(line.get("body"), dict):
        raise ValueError("body: expected an object")
    return BatchLine(custom_id, url, line["body"])


def _result(line: bytes) -> dict[str, Any] | None:
    """A result that was written whole; None for anything else."""
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(result, dict) and isinstance(result.get("custom_id"), str) and "error" in result
    return result if whole and line.endswith(b"\n") else None

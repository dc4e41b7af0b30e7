"""A completions server under load: tokens a second, time to first token, time per token, over concurrency.

Clients in a closed loop: each asks again as soon as its stream has ended. Prompts are random token ids, so
that no prefix cache helps; texts have a fixed length. Servers take turns within each round, so that what else
the machine does falls on all of them. Only asyncio is needed: the client costs little beside the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tokenstep.bench.report import Report

TOKEN_IDS = range(1000, 20000)  # ordinary words in any vocabulary of this field
LISTENING = re.compile(r"listening on (http://\S+)")


class ServeReport(Report):
    """Rows of one server at one concurrency."""

    def markdown(self) -> str:
        """One line a server and concurrency."""
        columns = {
            "concurrency": "clients",
            "impl": "server",
            "tokens_per_s": "tok/s",
            "ttft_median_ms": "first token, median ms",
            "ttft_p99_ms": "p99 ms",
            "tpot_median_ms": "per token, median ms",
            "tpot_p99_ms": "p99 ms",
            "requests": "requests",
        }
        lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
        for row in self.rows:
            lines.append("| " + " | ".join(str(row[name]) for name in columns) + " |")
        m, s = self.machine, self.settings
        lines.append(
            f"\n{s['prompt_tokens']} prompt tokens, {s['output_tokens']} output tokens, {s['seconds']:g} s a"
            f" case, on {m['cpu']}, {m['cores']} cores ({m['isa']}), torch {m['torch']},"
            f" commit {m['commit']}, {m['date']}."
        )
        return "\n".join(lines)


@dataclass
class Sample:
    """What the clients of one server saw at one concurrency; times in seconds."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)

    def row(self, impl: str, concurrency: int) -> dict[str, Any]:
        """As the report has it."""
        return {
            "impl": impl,
            "concurrency": concurrency,
            "requests": len(self.first),
            "tokens_per_s": round(self.tokens / self.seconds, 1),
            "ttft_median_ms": _milliseconds(self.first, 0.5),
            "ttft_p99_ms": _milliseconds(self.first, 0.99),
            "tpot_median_ms": _milliseconds(self.per_token, 0.5),
            "tpot_p99_ms": _milliseconds(self.per_token, 0.99),
        }


def run(
    servers: Mapping[str, str],
    *,
    concurrencies: Sequence[int],
    prompt_tokens: int,
    output_tokens: int,
    seconds: float,
    rounds: int,
    progress: Callable[[str], None],
) -> ServeReport:
    """Loads each of `servers`, name to URL; raises RuntimeError for an answer that wasn't asked for."""
    models = {name: _model_of(url) for name, url in servers.items()}
    settings = {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "seconds": seconds,
        "rounds": rounds,
        "models": models,
    }
    report = ServeReport("serve", settings)
    for concurrency in concurrencies:
        samples = {name: Sample() for name in servers}
        for number in range(rounds + 1):  # the first warms up
            for name, url in servers.items():
                counted = Sample() if number == 0 else samples[name]
                wanted = {
                    "model": models[name],
                    "max_tokens": output_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                length = seconds / rounds if number else min(2.0, seconds / rounds)
                asyncio.run(_load(url, wanted, concurrency, prompt_tokens, length, counted))
        for name, sample in samples.items():
            report.rows.append(sample.row(name, concurrency))
            progress(f"{name}, {concurrency} clients: {report.rows[-1]['tokens_per_s']} tok/s")
    return report


@contextlib.contextmanager
def started_server(options: Sequence[str]) -> Iterator[str]:
    """`tokenstep serve` with these options, once it is ready; its URL."""
    command = [
        sys.executable,
        "-m",
        "tokenstep.cli.main",
        "serve",
        "--port",
        "0",
        "--no-access-log",
        *options,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield _wait_until_ready(process)
        finally:
            process.terminate()


def _wait_until_ready(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said: list[str] = []
    url = ""
    for line in process.stderr:
        said.append(line)
        if found := LISTENING.search(line):
            url = found[1]
        if "is ready after" in line:
            return url
    raise RuntimeError(f"tokenstep serve has ended: {''.join(said)[-500:]}")


async def _load(
    url: str, wanted: dict[str, Any], concurrency: int, prompt_tokens: int, seconds: float, sample: Sample
) -> None:
    begin = time.perf_counter()
    until = begin + seconds

    async def client(index: int) -> None:
        rng = random.Random(f"{index} {begin}")
        while time.perf_counter() < until:
            prompt = [rng.choice(TOKEN_IDS) for _ in range(prompt_tokens)]
            await _one(url, wanted | {"prompt": prompt}, sample)

    await asyncio.gather(*(client(index) for index in range(concurrency)))
    sample.seconds += time.perf_counter() - begin


async def _one(url: str, body: dict[str, Any], sample: Sample) -> None:
    """One stream, read to its end."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    try:
        content = json.dumps(body).encode()
        head = (
            f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        begin = time.perf_counter()
        writer.write(head.encode() + content)
        first = last = 0.0
        tokens = 0
        status = (await reader.readline()).decode().strip()
        if " 200 " not in f"{status} ":
            raise RuntimeError(f"tokenstep bench serve: {url} answers {status}")
        while line := await reader.readline():  # chunks' sizes lie between the frames' lines
            if not line.startswith(b"data: {"):
                continue
            frame = json.loads(line[6:])
            if "error" in frame:
                raise RuntimeError(f"tokenstep bench serve: {url}: {frame['error']['message']}")
            if frame["choices"]:
                last = time.perf_counter()
                first = first or last
            if frame.get("usage"):
                tokens = frame["usage"]["completion_tokens"]
        if tokens != body["max_tokens"]:
            raise RuntimeError(f"tokenstep bench serve: {url} made {tokens} tokens of {body['max_tokens']}")
        sample.tokens += tokens
        sample.first.append(first - begin)
        if tokens > 1:
            sample.per_token.append((last - first) / (tokens - 1))
    finally:
        writer.close()


def _model_of(url: str) -> str:
    with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=30) as response:
        name: str = json.load(response)["data"][0]["id"]
    return name


def _milliseconds(seconds: Sequence[float], quantile: float) -> float:
    """The quantile of `seconds`, or the value next to it."""
    if not seconds:
        return 0.0
    if quantile == 0.5:
        return round(1000 * statistics.median(seconds), 1)
    return round(1000 * sorted(seconds)[min(len(seconds) - 1, int(quantile * len(seconds)))], 1)

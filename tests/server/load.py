"""Load on a server: many clients with mixed requests that give up at random, then more than it can take.

`python tests/server/load.py` starts a server with SmolLM2, runs both, prints what was seen as JSON and fails
if anything was lost, leaked or slow to answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from running_server import RunningServer, running_server

CLIENTS = 64
SLOTS, QUEUE, KV_TOKENS = 32, 64, 8192
SERVER = [
    "--max-num-seqs",
    str(SLOTS),
    "--max-waiting",
    str(QUEUE),
    "--kv-tokens",
    str(KV_TOKENS),
    "--no-access-log",
]
WORDS = [
    "one",
    "two",
    "three",
    "red",
    "green",
    "blue",
    "Berlin",
    "Paris",
    "the",
    "a",
    "of",
    "and",
    "then",
    "story",
    "table",
]
HEALTH_SECONDS = 2.0  # in which /health must answer, whatever the load
GROWTH = 1.01  # of resident memory from the third quarter of the mixed load to the last
GOODPUT = 0.95  # of tokens a second, under twice the load that fills server and queue: none lost but by noise
ROUNDS = 2  # of the steady loads, in turn, so that what else the machine does falls on all of them
MEMORY_SECONDS = 1.0  # between two looks at resident memory


@dataclass
class Tally:
    """What all clients have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    ids: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    retry_after: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    slowest_health: float = 0.0

    def check(self, condition: bool, problem: str) -> None:
        if not condition and len(self.problems) < 20:
            self.problems.append(problem)


@dataclass
class Steady:
    """What one kind of steady load came to; seconds of wall clock and of both sides' processors."""

    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    server_cpu: float = 0.0
    client_cpu: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tally.tokens / self.seconds

    def row(self) -> dict[str, Any]:
        refusals = self.tally.retry_after
        return {
            "tok_s": round(self.tokens_per_second),
            "tok_per_server_cpu_s": round(self.tally.tokens / self.server_cpu),
            "server_cpu_s": round(self.server_cpu, 1),
            "clients_cpu_s": round(self.client_cpu, 1),
            "outcomes": dict(sorted(self.tally.outcomes.items())),
            "retry_after_s": [min(refusals, default=0), max(refusals, default=0)],
        }


class Connection:
    """One request over a connection of its own."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.removeprefix("http://").partition(":")

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def post(self, body: dict[str, Any], request_id: str) -> None:
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nX-Request-Id: {request_id}\r\nConnection: close\r\n\r\n"
        )
        self._writer.write(head.encode() + content)
        await self._writer.drain()

    async def get(self, path: str) -> None:
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n\r\n".encode())

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers."""
        status = int((await self._reader.readline()).split()[1])
        headers = {}
        while (line := (await self._reader.readline()).strip()) != b"":
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    async def body(self, headers: dict[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            return await self._reader.readexactly(int(headers["content-length"]))
        body = b""
        while size := int(await self._reader.readline(), 16):
            body += (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readline()
        return body


def random_body(rng: random.Random) -> dict[str, Any]:
    """A request with any parameters."""
    prompts: Any = [
        " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(rng.choice([1, 1, 1, 2, 3]))
    ]
    n = rng.choice([1, 1, 1, 2, 4])
    stream = rng.random() < 0.5
    body: dict[str, Any] = {
        "model": "smollm2",
        "prompt": prompts if len(prompts) > 1 else prompts[0],
        "max_tokens": rng.randint(1, 24),
        "temperature": rng.choice([0, 0.7, 1.3]),
        "n": n,
        "stream": stream,
        "return_token_ids": True,
    }
    for name, value in (
        ("top_p", 0.9),
        ("top_k", 40),
        ("min_p", 0.05),
        ("repetition_penalty", 1.2),
        ("presence_penalty", 0.5),
        ("logit_bias", {"28": -5}),
        ("seed", rng.randint(0, 9)),
        ("stop", [".", " and"]),
        ("logprobs", rng.randint(0, 5)),
        ("echo", True),
        ("best_of", None if stream else n + 1),
        ("min_tokens", 2),
    ):
        if rng.random() < 0.25:
            body[name] = value
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body


def check_answer(tally: Tally, body: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Each choice is there and ends once; the usage fits the tokens."""
    prompts = len(body["prompt"]) if isinstance(body["prompt"], list) else 1
    expected = range(prompts * body["n"])
    ends = Counter(
        choice["index"] for answer in answers for choice in answer["choices"] if choice["finish_reason"]
    )
    tally.check(ends == Counter(expected), f"choices ended {dict(ends)}, expected each of {len(expected)}")
    tally.check(len({answer["id"] for answer in answers}) == 1, "a stream has one id")
    ids = sum(len(choice["token_ids"] or []) for answer in answers for choice in answer["choices"])
    usage = answers[-1]["usage"]["completion_tokens"]
    if not body.get("best_of"):
        tally.check(ids == usage, f"{ids} token ids, but usage {usage}")
    tally.tokens += usage
    tally.ids[answers[0]["id"]] += 1


async def run_one(address: str, body: dict[str, Any], request_id: str, tally: Tally, patience: float) -> None:
    """One request; given up after `patience` seconds."""
    async with Connection(address) as connection:
        try:
            async with asyncio.timeout(patience):
                await connection.post(body, request_id)
                status, headers = await connection.head()
                content = await connection.body(headers)
        except TimeoutError:
            tally.outcomes["gave up"] += 1
            return
        tally.outcomes[str(status)] += 1
        tally.check(headers.get("x-request-id") == request_id, "the answer is another request's")
        if status == 429:
            tally.retry_after.append(int(headers["retry-after"]))
        elif status != 200:
            tally.check(False, f"status {status}: {content[:200]!r}")
        elif body["stream"]:
            *frames, done = content.decode().strip().split("\n\n")
            tally.check(done == "data: [DONE]", f"a stream ended with {done[:100]}")
            check_answer(tally, body, [json.loads(frame[6:]) for frame in frames])
        else:
            check_answer(tally, body, [json.loads(content)])


async def watch_health(address: str, tally: Tally, until: float) -> None:
    while time.monotonic() < until:
        begin = time.monotonic()
        async with Connection(address) as connection:
            await connection.get("/health")
            status, _ = await connection.head()
        seconds = time.monotonic() - begin
        tally.slowest_health = max(tally.slowest_health, seconds)
        tally.check(status == 200, f"/health said {status}")
        await asyncio.sleep(0.25)


async def mixed_load(address: str, seconds: float, clients: int = CLIENTS) -> Tally:
    """Clients with any requests, a third of which are given up at a random moment."""
    tally = Tally()
    until = time.monotonic() + seconds

    async def client(index: int) -> None:
        rng, count = random.Random(index), 0
        while time.monotonic() < until:
            patience = rng.uniform(0, 3) if rng.random() < 0.35 else 300.0
            await run_one(address, random_body(rng), f"client-{index}-{count}", tally, patience)
            if tally.outcomes["429"]:
                await asyncio.sleep(rng.uniform(0, 0.2))
            count += 1

    await asyncio.gather(watch_health(address, tally, until), *(client(index) for index in range(clients)))
    return tally


async def fill_cache(address: str) -> None:
    """Has every block of the cache written once: until then memory grows as it should."""
    rng, tally, output = random.Random(0), Tally(), 40
    count = KV_TOKENS // SLOTS - output
    prompts = [[rng.randrange(1000, 40000) for _ in range(count)] for _ in range(SLOTS)]
    body = {"model": "smollm2", "prompt": prompts, "max_tokens": output, "n": 1, "stream": False}
    await run_one(address, body | {"return_token_ids": True, "ignore_eos": True}, "fill", tally, 300.0)
    assert tally.outcomes == {"200": 1}, tally.problems


async def steady_load(
    server: RunningServer, load: Steady, seconds: float, clients: int, patience: float
) -> None:
    """Clients that ask again at once; a refused one after `patience` times what Retry-After says."""
    tally, begin = load.tally, time.monotonic()
    until = begin + seconds
    server_cpu, client_cpu = server.cpu_seconds(), time.process_time()
    body = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 1, "n": 1}
    body |= {"stream": False, "return_token_ids": True, "ignore_eos": True}

    async def client(index: int) -> None:
        rng = random.Random(index)
        while time.monotonic() < until:
            before = len(tally.retry_after)
            await run_one(server.url, body, f"steady-{index}", tally, 300.0)
            if len(tally.retry_after) > before:
                told = tally.retry_after[-1] * rng.uniform(1.0, 1.2)  # not all at once
                await asyncio.sleep(min(patience * told, max(0.0, until - time.monotonic())))

    health = watch_health(server.url, tally, until)
    await asyncio.gather(health, *(client(index) for index in range(clients)))
    load.seconds += time.monotonic() - begin
    load.server_cpu += server.cpu_seconds() - server_cpu
    load.client_cpu += time.process_time() - client_cpu


async def watched_mixed_load(server: RunningServer, seconds: float) -> tuple[Tally, list[tuple[float, int]]]:
    """The mixed load, with the server's resident memory over time: seconds and bytes."""
    samples: list[tuple[float, int]] = []
    begin = time.monotonic()

    async def watch() -> None:
        while (now := time.monotonic() - begin) < seconds:
            samples.append((now, server.memory()))
            await asyncio.sleep(MEMORY_SECONDS)

    _, tally = await asyncio.gather(watch(), mixed_load(server.url, seconds))
    return tally, samples


def memory_seen(samples: list[tuple[float, int]]) -> tuple[float, dict[str, Any]]:
    """How the last quarter compares with the third, and what to report."""
    quarter = len(samples) // 4
    quarters = [samples[index * quarter : (index + 1) * quarter] for index in range(4)]
    medians = [statistics.median(size for _, size in part) for part in quarters]
    second_half = samples[2 * quarter :]
    slope, _ = statistics.linear_regression(*zip(*second_half, strict=True))
    return medians[3] / medians[2], {
        "quarters_mib": [round(size / 2**20) for size in medians],
        "second_half_mib_a_minute": round(60 * slope / 2**20, 1),
    }


def run(
    server: RunningServer,
    seconds: float,
    steady_seconds: float,
    max_growth: float = GROWTH,
    min_goodput: float = GOODPUT,
) -> dict[str, Any]:
    """Both loads; returns what was seen, with all problems."""
    asyncio.run(fill_cache(server.url))
    mixed, samples = asyncio.run(watched_mixed_load(server, seconds))
    growth, memory = memory_seen(samples)
    problems = mixed.problems
    if duplicated := [name for name, count in mixed.ids.items() if count > 1]:
        problems.append(f"ids that came twice: {duplicated[:3]}")
    if not server.is_idle():
        problems.append("blocks or rows are held when nobody asks")
    if growth > max_growth:
        problems.append(f"memory still grows: {memory}")

    # clients, and how much of the time in Retry-After a refused one waits
    kinds = {
        "full": (SLOTS, 1.0),
        "saturated": (2 * (SLOTS + QUEUE), 1.0),
        "impatient": (2 * (SLOTS + QUEUE), 0.25),
    }
    steady = {name: Steady() for name in kinds}
    for _ in range(ROUNDS):
        for name, (clients, patience) in kinds.items():
            asyncio.run(steady_load(server, steady[name], steady_seconds / ROUNDS, clients, patience))
    tallies = [load.tally for load in steady.values()]
    problems += [problem for tally in tallies for problem in tally.problems]
    refusals = steady["saturated"].tally.retry_after
    if not refusals or min(refusals) < 1:
        problems.append("too much load was not refused with Retry-After")
    full, saturated = steady["full"].row(), steady["saturated"].row()
    # where other programs want the processors too, only a second of the server's own says something
    if all(saturated[name] < min_goodput * full[name] for name in ("tok_s", "tok_per_server_cpu_s")):
        problems.append(f"goodput falls from {full} to {saturated}")
    slowest = max(tally.slowest_health for tally in (mixed, *tallies))
    if slowest > HEALTH_SECONDS:
        problems.append(f"/health took {slowest:.1f} s")
    if not server.is_idle():
        problems.append("blocks or rows are held after the steady loads")
    if "Traceback" in server.log:
        problems.append("the log has a traceback")
    return {
        "clients": CLIENTS,
        "seconds": seconds,
        "mixed": dict(sorted(mixed.outcomes.items())),
        "mixed_tokens": mixed.tokens,
        "memory": memory,
        "slowest_health_s": round(slowest, 3),
        "steady": {name: load.row() for name, load in steady.items()},
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300, help="of the mixed load")
    parser.add_argument("--steady-seconds", type=float, default=40, help="of each steady load")
    args = parser.parse_args()
    with running_server(*SERVER) as server:
        seen = run(server, args.seconds, args.steady_seconds)
    print(json.dumps(seen, indent=1))
    return 1 if seen["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())

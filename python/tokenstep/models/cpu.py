"""What the CPU has."""

from __future__ import annotations

from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def cpu_flags() -> frozenset[str]:
    """Its features by Linux' names; empty elsewhere."""
    try:
        return frozenset(CPU_INFO.read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return frozenset()

"""How much memory a device has left, as far as the system says."""

from __future__ import annotations

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP_OF_PROCESS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # what version 1 of control groups says for none is near 2^63


def free_bytes(device: torch.device, with_swap: bool = False) -> int | None:
    """Bytes that this process may still take on `device`; None if the system doesn't say.

    `with_swap` adds what a CPU's system can still put on disk.
    """
    return gpu_bytes(device)[0] if device.type == "cuda" else free_host_bytes(with_swap)


def gpu_bytes(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a GPU; what torch holds of it without using it is free."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused, total


def free_host_bytes(with_swap: bool = False) -> int | None:
    """What the system has available, within what the limits of this process's control groups leave.

    Contents of files that memory holds count as available: they can go.
    """
    rooms = [_cgroup_room(folder) for folder in _cgroups()]
    system = _numbers(MEMINFO)
    if (available := system.get("MemAvailable:")) is not None:
        rooms.append(available + (system.get("SwapFree:", 0) if with_swap else 0))
    known = [room for room in rooms if room is not None]
    return max(0, min(known)) if known else None


def _cgroups() -> list[Path]:
    """Folders of the groups that limit this process: its own and those around it, of either version."""
    folders: list[Path] = []
    try:
        lines = CGROUP_OF_PROCESS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or "memory" in controllers.split(","):
            root = CGROUP_ROOT / "memory" if controllers else CGROUP_ROOT
            own = root / path.strip("/")
            folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
    # in a container the path above may be that of the host, and the root is the container's own group
    return list(dict.fromkeys([*folders, CGROUP_ROOT, CGROUP_ROOT / "memory"]))


def _cgroup_room(folder: Path) -> int | None:
    """What the limit of a group leaves; None without a limit."""
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for limit_name, usage_name, cached_name in names:
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and limit < NO_LIMIT:
            return limit - (usage or 0) + _numbers(folder / "memory.stat").get(cached_name, 0)
    return None


def _number(path: Path) -> int | None:
    """The number that a small file consists of."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line of a small file by the word before it, in bytes where it says kB."""
    found: dict[str, int] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[1].isdecimal():
            found[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return found

"""What an engine is set up with, and how much KV cache it takes when nobody says."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from tokenstep.models import ModelConfig

CPU_CACHE_BYTES = 2 << 30
CPU_CACHE_SHARE = 0.25
CUDA_CACHE_SHARE = 0.8
CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)  # versions 2 and 1


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of one engine.

    Attributes:
        max_batch: sequences that decode together.
        kv_tokens: tokens that the KV cache holds, rounded up to whole blocks; None: see `default_kv_tokens`.
        block_size: tokens in a block of the KV cache.
        prefill_tokens: tokens computed in one step when no sequence decodes; longer prompts take several.
        mixed_tokens: tokens computed in one step when some do, theirs included: it bounds how long a sequence
            waits for its next token while prompts are computed.
        prefix_cache: blocks of earlier sequences are used again where the tokens are the same.
        batch_invariant: a seeded request gets the same tokens, bit for bit, whatever else is in the batch and
            however its own computation is cut. Every matrix product then costs what 32 rows cost.
        reads_late: the tokens of a step are read when the next one has been launched, so that a GPU doesn't
            wait for the host; None: on a GPU. It changes no token.
        cuda_graphs: on a GPU a decode step is captured in a graph for each batch size, and replayed.
        max_waiting: prompts that may wait for their turn, before more are refused; None: any number.
        max_waiting_tokens: tokens, of prompts and of the most output, that may wait; None: any number.
    """

    max_batch: int = 32
    kv_tokens: int | None = None
    block_size: int = 16
    prefill_tokens: int = 512
    mixed_tokens: int = 128
    prefix_cache: bool = True
    batch_invariant: bool = False
    reads_late: bool | None = None
    cuda_graphs: bool = True
    max_waiting: int | None = None
    max_waiting_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is not None and not isinstance(value, bool) and value < 1:
                raise ValueError(f"tokenstep.EngineConfig: {name} = {value}, expected at least 1")

    def num_blocks(self, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
        """Blocks of the KV cache for `model`."""
        tokens = self.kv_tokens
        if tokens is None:
            tokens = default_kv_tokens(self.max_batch, model, dtype, cache_memory(device))
        return -(-tokens // self.block_size)


def default_kv_tokens(max_batch: int, model: ModelConfig, dtype: torch.dtype, memory: int) -> int:
    """A full context for each of `max_batch` sequences, as far as `memory` bytes go; one token at least."""
    bytes_per_token = 2 * model.num_layers * model.kv_size * dtype.itemsize
    return max(1, min(max_batch * model.max_position, memory // bytes_per_token))


def cache_memory(device: torch.device) -> int:
    """Bytes that the KV cache may take by default.

    On a GPU 80 % of what is free once the weights are there; on a CPU a quarter of the available memory, at
    most 2 GiB.
    """
    if device.type == "cuda":
        return int(CUDA_CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    return min(CPU_CACHE_BYTES, int(CPU_CACHE_SHARE * _available_memory()))


def _available_memory() -> int:
    """Bytes this process may still take: what the system has, within the limit of its control group."""
    limits = [_number(Path(path), "") for path in CGROUP_LIMITS]
    limits.append(_number(Path("/proc/meminfo"), "MemAvailable:") * 1024)
    return min((limit for limit in limits if limit), default=4 * CPU_CACHE_BYTES)


def _number(path: Path, label: str) -> int:
    """The number behind `label` in a small text file; 0 if there is none."""
    try:
        words = path.read_text().partition(label)[2].split() if label else path.read_text().split()
        return int(words[0])
    except (OSError, ValueError, IndexError):
        return 0

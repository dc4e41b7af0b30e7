"""How many tokens the KV cache holds: what was asked for, or what memory leaves; and the cache itself.

On a GPU the default is `gpu_memory_utilization` of its memory, less the weights and less what the largest
step takes, which is run once and measured. On a CPU, whose memory is shared with everything else, it is a
full context for each sequence within a quarter of what is available.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokenstep.engine.config import EngineConfig
from tokenstep.engine.runner import SCORED_ROWS
from tokenstep.models import DecoderModel, ForwardBatch, KVCache, ModelConfig, Span
from tokenstep.models.errors import NotEnoughMemory, gigabytes
from tokenstep.models.free_memory import free_host_bytes, gpu_bytes
from tokenstep.models.kv_cache import choose_kv_dtype, kv_bytes_per_token, kv_dtype_name
from tokenstep.models.kv_scales import choose_scales
from tokenstep.sampling import Sampler, SamplingParams

CPU_CACHE_BYTES = 2 << 30
CPU_CACHE_SHARE = 0.25
SHORTEST_CONTEXT = 2048  # a default of fewer tokens, and than the model's context, is an error instead


def allocate_cache(model: DecoderModel, vocab_size: int, config: EngineConfig) -> KVCache:
    """The KV cache of an engine.

    Raises:
        ValueError: `config.kv_cache_dtype` doesn't go with the model's.
        NotEnoughMemory: there isn't room for it.
    """
    dtype, device = choose_kv_dtype(config.kv_cache_dtype, model.dtype), model.device
    scales = choose_scales(model, dtype)
    per_token = kv_bytes_per_token(model.config, dtype)
    tokens = config.kv_tokens
    if tokens is not None:
        if device.type == "cuda":
            check_room(tokens, per_token, gpu_bytes(device)[0], str(device))
    elif device.type == "cuda":
        tokens = default_gpu_tokens(model.config, per_token, _measure(model, vocab_size, config), config)
    else:
        tokens = default_cpu_tokens(model.config, per_token, free_host_bytes(), config)
    num_blocks = -(-tokens // config.block_size)
    try:
        return KVCache.allocate(model.config, num_blocks, config.block_size, dtype, device, scales)
    except (torch.OutOfMemoryError, MemoryError, OSError) as error:
        raise NotEnoughMemory(
            f"tokenstep.engine: {device} has no room for a KV cache of {tokens:,} tokens in"
            f" {kv_dtype_name(dtype)}, {gigabytes(tokens * per_token)}: {error}"
        ) from None


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a GPU.

    Attributes:
        device: its name, for messages.
        total: all of its memory.
        free: what nobody uses between two steps.
        weights: what the model takes.
        step: what the largest step takes beside weights and cache, and gives back.
        libraries: what the first step has taken for good: kernels, workspaces.
    """

    device: str
    total: int
    free: int
    weights: int
    step: int
    libraries: int = 0

    def left(self, utilization: float) -> int:
        """For the KV cache: of `utilization` of the memory, and of what is free. May be negative."""
        share = int(utilization * self.total) - self.weights - self.libraries
        return min(share, self.free) - self.step


def default_gpu_tokens(model: ModelConfig, per_token: int, memory: GpuMemory, config: EngineConfig) -> int:
    """As many tokens as fit into what is left, in whole blocks.

    Raises NotEnoughMemory if that isn't room for one sequence.
    """
    left = memory.left(config.gpu_memory_utilization)
    tokens = left // (per_token * config.block_size) * config.block_size
    needed = min(SHORTEST_CONTEXT, model.max_position)
    if tokens >= needed:
        return tokens
    of_all = f"{config.gpu_memory_utilization:g} × {gigabytes(memory.total)} on {memory.device}"
    step = memory.step + memory.libraries
    raise NotEnoughMemory(
        f"tokenstep.engine: the KV cache of one sequence, {needed:,} tokens, needs"
        f" {gigabytes(needed * per_token)}; of {of_all} ({gigabytes(memory.free)} free) the weights'"
        f" {gigabytes(memory.weights)} and the largest step's {gigabytes(step)} leave"
        f" {gigabytes(max(0, left))}: raise gpu_memory_utilization, set a smaller max_batch or kv_tokens, or"
        " kv_cache_dtype='float8_e4m3'"
    )


def default_cpu_tokens(model: ModelConfig, per_token: int, free: int | None, config: EngineConfig) -> int:
    """A full context for each sequence, as far as a quarter of `free` bytes and 2 GiB go.

    One sequence may take all that is free. Raises NotEnoughMemory if it has no room even so.
    """
    share = CPU_CACHE_BYTES if free is None else min(CPU_CACHE_BYTES, int(CPU_CACHE_SHARE * free))
    tokens = min(config.max_batch * model.max_position, share // per_token)
    needed = min(SHORTEST_CONTEXT, model.max_position)
    if tokens < needed and free is not None:
        check_room(needed, per_token, free, "the CPU", "set kv_tokens, or kv_cache_dtype='float8_e4m3'")
    return max(tokens, needed)


def check_room(
    tokens: int, per_token: int, free: int, device: str, remedy: str = "set a smaller kv_tokens"
) -> None:
    """Raises NotEnoughMemory if a cache of `tokens` is more than `free` bytes."""
    if tokens * per_token > free:
        raise NotEnoughMemory(
            f"tokenstep.engine: a KV cache of {tokens:,} tokens needs {gigabytes(tokens * per_token)},"
            f" {gigabytes(free)} are free on {device}: {remedy}"
        )


def largest_step(model: DecoderModel, vocab_size: int, config: EngineConfig) -> Callable[[], Sampler]:
    """A step with the most tokens that one may have, but for the KV cache: called, it takes what that takes.

    All tokens are one prompt's; then come the logits of a whole batch and a sampling call with log
    probabilities, by a sampler that is returned: what it holds stays as long as the engine.
    """
    device = model.device
    count = min(max(config.prefill_tokens, config.mixed_tokens), model.config.max_position)
    rows = max(config.max_batch, SCORED_ROWS)
    # one block serves as all of them: what the keys are doesn't matter
    cache = KVCache.allocate(model.config, 1, config.block_size, model.dtype, device)
    batch = ForwardBatch.of_prompt([0] * count, -(-count // config.block_size), device)
    batch.fresh = [Span(0, 0, count)]

    def step() -> Sampler:
        hidden = model.forward(batch, cache)
        logits = model.logits(hidden[:1].expand(rows, -1).contiguous())
        sampler = Sampler(2 * rows, vocab_size, str(device))  # the runner's has as many idle rows again
        for row in range(rows):
            sampler.admit(row, SamplingParams(temperature=1.0, top_p=0.9, seed=0, logprobs=20), [0])
        sampler.step(logits[:, :vocab_size], rows=torch.arange(rows, dtype=torch.int32, device=device))
        return sampler

    return step


def _measure(model: DecoderModel, vocab_size: int, config: EngineConfig) -> GpuMemory:
    """Runs the largest step on the model's GPU and reads what it took."""
    device, step = model.device, largest_step(model, vocab_size, config)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    allocated, outside = torch.cuda.memory_allocated(device), _outside_torch(device)
    torch.cuda.reset_peak_memory_stats(device)
    sampler = step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - allocated
    torch.cuda.empty_cache()
    libraries = max(0, _outside_torch(device) - outside)
    free, total = gpu_bytes(device)
    del sampler  # alive until here, so that its like has room
    return GpuMemory(str(device), total, free, model.num_bytes, peak, libraries)


def _outside_torch(device: torch.device) -> int:
    """Bytes in use on a GPU that torch's allocator doesn't hold."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)

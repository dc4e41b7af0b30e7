"""What an engine is set up with."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tokenstep.models.kv_cache import KV_DTYPES, kv_dtype_names


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of one engine.

    Attributes:
        max_batch: sequences that decode together.
        kv_tokens: tokens that the KV cache holds, rounded up to whole blocks; None: see `engine.memory`.
        kv_cache_dtype: "auto", the model's own; "float8_e4m3" or "int8", one byte an element with a scale for
            each layer and KV head; or the model's own dtype by its name.
        gpu_memory_utilization: share of a GPU's memory that weights, the largest step and the KV cache may
            take together. Without effect on a CPU, or where `kv_tokens` is given.
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
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
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
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"tokenstep.EngineConfig: {name} = {value}, expected at least 1")
        if self.kv_cache_dtype not in ("auto", *KV_DTYPES):
            raise ValueError(
                f"tokenstep.EngineConfig: kv_cache_dtype = {self.kv_cache_dtype!r}, expected"
                f" {kv_dtype_names()}"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"tokenstep.EngineConfig: gpu_memory_utilization = {self.gpu_memory_utilization}, expected"
                " more than 0 and at most 1"
            )

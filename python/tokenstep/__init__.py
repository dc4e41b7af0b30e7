"""The decode step of LLM inference: paged attention, then logits to token, fused.

The same bits on every CPU and GPU.
"""

from typing import TYPE_CHECKING, Any

from tokenstep._version import __version__
from tokenstep.attention import Rope, append_kv, attention_workspace_bytes, merge_attention, paged_attention
from tokenstep.sampling import SampleOutput, Sampler, SamplingParams, apply_logits, sample
from tokenstep.threads import get_num_threads, set_num_threads

if TYPE_CHECKING:
    from tokenstep.llm import LLM

__all__ = [
    "LLM",
    "Rope",
    "SampleOutput",
    "Sampler",
    "SamplingParams",
    "__version__",
    "append_kv",
    "apply_logits",
    "attention_workspace_bytes",
    "get_num_threads",
    "merge_attention",
    "paged_attention",
    "sample",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":  # needs torch, which the ops do not
        from tokenstep.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

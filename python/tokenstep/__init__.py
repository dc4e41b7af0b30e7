"""The decode step of LLM inference: paged attention, then logits to token, fused; the same bits on CPU and GPU."""

from tokenstep._version import __version__
from tokenstep.attention import Rope, append_kv, merge_attention, paged_attention

__all__ = ["Rope", "__version__", "append_kv", "merge_attention", "paged_attention"]

"""The decode step of LLM inference: paged attention, then logits to token, fused; the same bits on CPU and GPU."""

from tokenstep._version import __version__

__all__ = ["__version__"]

"""The fused sampler and the paged attention inside Hugging Face transformers, 4.57 and 5.x.

Three parts, each of use alone: :func:`generate_with` (its sampling loop), :class:`FusedLogitsProcessor` (its
chain of processors in one) and :func:`register` (``attn_implementation="tokenstep"``). torch and
transformers are imported when one of them is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenstep.integrations.transformers.attention import register
    from tokenstep.integrations.transformers.generate import generate_with
    from tokenstep.integrations.transformers.processor import FusedLogitsProcessor

__all__ = ["FusedLogitsProcessor", "generate_with", "register"]

_HOMES = {"FusedLogitsProcessor": "processor", "generate_with": "generate", "register": "attention"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

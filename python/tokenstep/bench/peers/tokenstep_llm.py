"""tokenstep itself, by its Python API."""

from __future__ import annotations

import time
from typing import Any

import tokenstep
from tokenstep.models.kv_cache import kv_bytes_per_token
from tokenstep.threads import let_idle_threads_sleep


class Peer:
    """`tokenstep.LLM`; all prompts are one request."""

    def __init__(self, options: dict[str, Any]) -> None:
        let_idle_threads_sleep()  # as the command line does
        import torch

        torch.set_num_threads(options["threads"])
        self._llm = tokenstep.LLM(
            options["model"],
            device=options["device"],
            dtype=options["dtype"],
            weights=options["weights"],
            max_batch=options["max_batch"],
            kv_tokens=options["max_batch"] * options["max_length"],
            progress=False,
        )

    def describe(self) -> dict[str, Any]:
        """Versions, how the weights are held, and the bytes that a step must read."""
        runner = self._llm.service.engine.runner
        return {
            "version": tokenstep.__version__,
            "details": self._llm.system_fingerprint,
            "read_bytes": runner.model.read_bytes,
            "kv_bytes_per_token": kv_bytes_per_token(runner.model.config, runner.cache.dtype),
        }

    def generate(
        self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float] | None
    ) -> float:
        """Seconds from the prompts' ids to the last text."""
        fields: dict[str, Any] = dict(sampling) if sampling else {"temperature": 0}
        begin = time.perf_counter()
        done = self._llm.complete(prompts, max_tokens=output_tokens, ignore_eos=True, **fields)
        seconds = time.perf_counter() - begin
        assert done.usage.completion_tokens == output_tokens * len(prompts)
        return seconds

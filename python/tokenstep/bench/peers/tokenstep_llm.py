"""tokenstep itself, by its Python API."""

from __future__ import annotations

import time
from typing import Any

import tokenstep
from tokenstep.threads import let_idle_threads_sleep


class Peer:
    """`tokenstep.LLM`; all prompts are one request."""

    def __init__(self, options: dict[str, Any]) -> None:
        let_idle_threads_sleep()  # as the command line does
        import torch

        torch.set_num_threads(options["threads"])
        self._llm = tokenstep.LLM(
            options["model"],
            device="cpu",
            dtype=options["dtype"],
            max_batch=options["max_batch"],
            kv_tokens=options["max_batch"] * options["max_length"],
            progress=False,
        )

    def describe(self) -> dict[str, Any]:
        """Versions, and how the weights are held."""
        return {"version": tokenstep.__version__, "details": self._llm.system_fingerprint}

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

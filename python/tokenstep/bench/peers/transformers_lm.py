"""transformers: `generate` of a model in bfloat16, with its default attention (torch's SDPA)."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers


class Peer:
    """A causal model from a folder. transformers has no presence and frequency penalties on a CPU."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16)
        model.generation_config.eos_token_id = None  # the output's length is fixed
        model.generation_config.pad_token_id = 0
        self._model = model

    def describe(self) -> dict[str, Any]:
        """Versions."""
        return {"version": transformers.__version__, "details": f"torch {torch.__version__}"}

    def generate(
        self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float] | None
    ) -> float:
        """Seconds from the prompts' ids to the last id; prompts are of one length."""
        options: dict[str, Any] = {"do_sample": False}
        if sampling:
            known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            options = {"do_sample": True} | {name: sampling[name] for name in known}
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        begin = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=output_tokens, **options)
        seconds = time.perf_counter() - begin
        assert out.shape[1] == len(prompts[0]) + output_tokens
        return seconds

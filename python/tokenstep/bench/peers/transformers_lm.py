"""transformers: `generate` of a model in bfloat16, with its default attention (torch's SDPA).

With the option `compiled`, over a static cache and with the step compiled by torch (mode "reduce-overhead",
which is a CUDA graph on a GPU), a cache for each number of texts and length of prompt.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import CompileConfig


class Peer:
    """A causal model from a folder, or of random weights.

    transformers has no presence and frequency penalties in `generate`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self._device = torch.device(options["device"])
        folder = options["model"]
        auto: Any = transformers.AutoModelForCausalLM
        if options["weights"] == "random":
            with self._device:
                config = transformers.AutoConfig.from_pretrained(folder)
                model: Any = auto.from_config(config, dtype=torch.bfloat16)
        else:
            model = auto.from_pretrained(folder, dtype=torch.bfloat16).to(self._device)
        model.eval()
        model.generation_config.eos_token_id = None  # the output's length is fixed
        model.generation_config.pad_token_id = 0
        self._model = model
        self._is_compiled = options.get("compiled", False)
        if self._is_compiled:
            # a static cache is read to its end: one for each number of texts and length of prompt
            self._lengths = {int(prompt): total for prompt, total in options["lengths"].items()}
            self._caches: dict[tuple[int, int], Any] = {}
            compiler: Any = CompileConfig(mode="reduce-overhead")
            compiler._compile_all_devices = True
            model.generation_config.compile_config = compiler

    def describe(self) -> dict[str, Any]:
        """Versions."""
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU"
        how = ", compiled step" if self._is_compiled else ""
        return {"version": transformers.__version__, "details": f"torch {torch.__version__}, {name}{how}"}

    def generate(
        self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float] | None
    ) -> float:
        """Seconds from the prompts' ids to the last id; prompts are of one length."""
        options: dict[str, Any] = {"do_sample": False}
        if sampling:
            known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            options = {"do_sample": True} | {name: sampling[name] for name in known}
        if self._is_compiled:
            options["past_key_values"] = self._cache(len(prompts), len(prompts[0]))
        ids = torch.tensor(prompts, device=self._device)
        mask = torch.ones_like(ids)
        begin = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=output_tokens, **options
            ).cpu()
        seconds = time.perf_counter() - begin
        assert out.shape[1] == len(prompts[0]) + output_tokens
        return seconds

    def _cache(self, batch: int, prompt_tokens: int) -> Any:
        key = batch, prompt_tokens
        if key not in self._caches:
            length = self._lengths[prompt_tokens]
            self._caches[key] = transformers.StaticCache(self._model.config, max_cache_len=length)
        cache = self._caches[key]
        with torch.inference_mode():
            cache.reset()
        return cache

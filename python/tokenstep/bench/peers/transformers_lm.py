"""transformers: `generate` of a model in bfloat16, as it is (attention is torch's SDPA) or with ours inside.

Options beside those of `worker`:

    sampler: "transformers" (the default) or "tokenstep".
    attention: as `set_attn_implementation` takes it.
    compiled: generate over a static cache with the step compiled by torch (mode "reduce-overhead": on a GPU
        it is a CUDA graph); a cache for each number of texts and length of prompt.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import LogitsProcessorList
from transformers.generation import logits_process
from transformers.generation.configuration_utils import CompileConfig

KNOWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


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
        self._generate = model.generate
        self._ours = options.get("sampler", "transformers") != "transformers"
        if self._ours:
            from tokenstep.integrations.transformers import generate_with

            self._generate = generate_with(model)
        if "attention" in options:
            from tokenstep.integrations.transformers import register

            register()
            model.set_attn_implementation(options["attention"])

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
            options = {"do_sample": True} | {name: sampling[name] for name in KNOWN}
        if self._is_compiled:
            options["past_key_values"] = self._cache(len(prompts), len(prompts[0]))
        ids = torch.tensor(prompts, device=self._device)
        mask = torch.ones_like(ids)
        begin = time.perf_counter()
        with torch.inference_mode():
            out = self._generate(ids, attention_mask=mask, max_new_tokens=output_tokens, **options).cpu()
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

    def sample(self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float]) -> float:
        """Seconds from the logits behind the prompts to a token of each, `output_tokens` times."""
        ids: Any = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            logits = self._model(ids).logits[:, -1]
            chain = _chain(sampling)
            if self._ours:
                from tokenstep.integrations.transformers.draw import Draw
                from tokenstep.integrations.transformers.plan import make_plan

                config = self._model.generation_config
                config.do_sample = True
                plan = make_plan(chain, config)
                draw: Any = Draw(plan, ids, seed=0, scored=False)
            else:

                def draw(logits: torch.Tensor, ids: Any) -> torch.Tensor:
                    return torch.multinomial(chain(ids, logits.to(torch.float32, copy=True)).softmax(-1), 1)

            draw(logits, ids)
            begin = time.perf_counter()
            for _ in range(output_tokens):
                draw(logits, ids)
            return time.perf_counter() - begin


def _chain(sampling: dict[str, float]) -> LogitsProcessorList:
    """What generate would prepare."""
    return LogitsProcessorList(
        [
            logits_process.RepetitionPenaltyLogitsProcessor(sampling["repetition_penalty"]),
            logits_process.TemperatureLogitsWarper(sampling["temperature"]),
            logits_process.TopKLogitsWarper(int(sampling["top_k"])),
            logits_process.TopPLogitsWarper(sampling["top_p"]),
            logits_process.MinPLogitsWarper(sampling["min_p"]),
        ]
    )

"""transformers: `generate` of a model in bfloat16, as it is (attention is torch's SDPA) or with ours inside.

Two options beside those of `worker`: ``sampler``, "transformers" (the default) or "tokenstep", and
``attention``, as `set_attn_implementation` takes it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import LogitsProcessorList
from transformers.generation import logits_process

KNOWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Peer:
    """A causal model from a folder. transformers has no presence and frequency penalties on a CPU."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16)
        model.generation_config.eos_token_id = None  # the output's length is fixed
        model.generation_config.pad_token_id = 0
        self._model = model
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
        return {"version": transformers.__version__, "details": f"torch {torch.__version__}"}

    def generate(
        self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float] | None
    ) -> float:
        """Seconds from the prompts' ids to the last id; prompts are of one length."""
        options: dict[str, Any] = {"do_sample": False}
        if sampling:
            options = {"do_sample": True} | {name: sampling[name] for name in KNOWN}
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        begin = time.perf_counter()
        with torch.inference_mode():
            out = self._generate(ids, attention_mask=mask, max_new_tokens=output_tokens, **options)
        seconds = time.perf_counter() - begin
        assert out.shape[1] == len(prompts[0]) + output_tokens
        return seconds

    def sample(self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float]) -> float:
        """Seconds from the logits behind the prompts to a token of each, `output_tokens` times."""
        ids: Any = torch.tensor(prompts)
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

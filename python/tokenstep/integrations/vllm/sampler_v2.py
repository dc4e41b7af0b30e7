"""The sampler of vLLM's model runner V2 with its hot path in one call of the kernel."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample import sampler
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

from tokenstep.integrations.vllm.batch import Unsupported, admit, new_sampler, penalised
from tokenstep.sampling import Sampler, SamplingParams

__all__ = ["FusedSampler"]

logger = init_logger("vllm.tokenstep")

NOT_FUSED = "tokenstep: %s: not fused, vLLM's own sampler draws"
ALWAYS = np.iinfo(np.int32).max
LAYOUT = tuple(inspect.signature(sampler.Sampler.sample).parameters)[2:-1]  # of a step, behind the logits
if set(LAYOUT) != {field.name for field in dataclasses.fields(LogitsContext)}:
    raise ImportError(f"vLLM's Sampler.sample takes {', '.join(LAYOUT)}")


class FusedSampler(sampler.Sampler):  # type: ignore[misc] # vLLM is not there when types are checked
    """Penalties, temperature, min-p, top-k, top-p and the draw in one call.

    A request's row in the kernel is its slot in vLLM; what the kernel draws joins the row's history there, so
    that nothing is sent but new requests. What edits logits before the penalties or whatever they are
    (allowed ids, biases, minimum lengths, bad words, thinking budgets) and log probabilities are vLLM's own
    code, around the kernel. An engine with something that the kernel cannot be arranged with has vLLM's own
    sampler, logged once with the reason.
    """

    def __init__(
        self,
        vllm_config: Any,
        max_num_reqs: int,
        vocab_size: int,
        device: torch.device,
        req_states: Any,
        **options: Any,
    ) -> None:
        """As vLLM's own."""
        super().__init__(vllm_config, max_num_reqs, vocab_size, device, req_states, **options)
        self._kernel: Sampler | None = None
        try:
            _check(vllm_config, options)
            self._kernel = new_sampler(2 * max_num_reqs, vocab_size, device)
        except Unsupported as reason:
            logger.warning_once(NOT_FUSED, str(reason))
            return
        logger.info_once("tokenstep: the sampler is fused")
        self._max_num_reqs = max_num_reqs
        self._admitted = np.zeros(max_num_reqs, dtype=bool)
        self._edited_below = np.zeros(max_num_reqs, dtype=np.int32)  # the length from which logits stay
        self._arriving: Sequence[int] = ()
        self._hear_of_tokens(req_states)
        for row in range(max_num_reqs, 2 * max_num_reqs):  # for prompts in pieces, whose draws vLLM drops
            self._kernel.admit(row, SamplingParams(temperature=0.0))

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """As vLLM's own: a request is new in its slot, or is there again after preemption."""
        super().add_request(req_idx, sampling_params)
        if self._kernel is None:
            return
        p, prompt_len = sampling_params, int(self.req_states.prompt_len.np[req_idx])
        tokens = np.zeros(len(self._arriving), np.int64)  # their number is the position of the draw
        if penalised(p):
            tokens[:] = self._arriving
        seed = int(self.sampling_states.seeds.np[req_idx])
        admit(self._kernel, req_idx, p, seed, tokens[:prompt_len], tokens[prompt_len:])
        self._admitted[req_idx] = True
        always = p.logit_bias or p.allowed_token_ids or p.bad_words_token_ids
        if always or p.thinking_token_budget is not None:
            self._edited_below[req_idx] = ALWAYS
        else:
            self._edited_below[req_idx] = prompt_len + p.min_tokens if p.min_tokens else 0

    def sample(self, logits: torch.Tensor, *layout: Any, return_logprobs: bool = False) -> Any:
        """As vLLM's own: tokens int64 ``[B]``, and processed logits where log probabilities need them."""
        step = LogitsContext(**dict(zip(LAYOUT, layout, strict=True)))
        if self._kernel is not None and logits.shape[1] != self._kernel.vocab_size:
            logger.warning_once(NOT_FUSED, f"{logits.shape[1]} logits a row")
            self._kernel = None
        if self._kernel is None or not self._admitted[step.idx_mapping_np].all():  # the latter: profiling
            return super().sample(logits, *layout, return_logprobs=return_logprobs)
        processed = logits
        if return_logprobs and self.logprobs_mode in PROCESSED_LOGPROBS_MODES:
            processed = self.apply_sampling_params(logits, *layout)
        if (step.seq_lens_upper_bound_np < self._edited_below[step.idx_mapping_np]).any():
            logits = self._edited(logits, step)
        # Token 0 for a row that cannot be sampled, for which vLLM has no word.
        return self._kernel.step(logits, self._rows(step)).tokens.clamp_(min=0), processed

    def _edited(self, logits: torch.Tensor, step: LogitsContext) -> torch.Tensor:
        """A float32 copy with what vLLM's code does around the penalties, which the kernel comes to."""
        logits = logits.to(torch.float32, copy=True)
        for processor in self.logits_processors:
            if processor is not self.penalties_state:
                logits = processor.apply(logits, step)
        self.thinking_budget_state.apply(logits, step)
        return logits

    def _rows(self, step: LogitsContext) -> Any:
        """The kernel's row of each request, int32 ``[B]`` on the device."""
        slots = step.idx_mapping_np
        draws = step.seq_lens_upper_bound_np >= self.req_states.prefill_len.np[slots]
        if draws.all():
            return step.idx_mapping.to(torch.int32)
        rows = np.where(draws, slots, self._max_num_reqs + np.arange(len(slots)))
        return async_tensor_h2d(rows, device=step.idx_mapping.device, dtype=torch.int32)

    def _hear_of_tokens(self, req_states: Any) -> None:
        """Of a request's tokens vLLM tells its requests' states, and right behind the sampler of its slot."""
        add_request = req_states.add_request

        def heard(req_id: str, prompt_len: int, all_token_ids: Sequence[int], **others: Any) -> None:
            self._arriving = all_token_ids
            add_request(req_id=req_id, prompt_len=prompt_len, all_token_ids=all_token_ids, **others)

        req_states.add_request = heard


def _check(vllm_config: Any, options: dict[str, Any]) -> None:
    """Raises Unsupported for an engine whose tokens the kernel cannot draw."""
    reasons = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "your own logits processors": bool(options.get("custom_logits_processors")),
        "fp64 Gumbel noise": options.get("use_fp64_gumbel"),
        "the replay of traces": options.get("enable_trace_replay"),
        "sampling masks as results": options.get("return_sampling_mask"),
    }
    for reason, given in reasons.items():
        if given:
            raise Unsupported(reason)

"""vLLM's sampler with its hot path in one call of the kernel."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample import logits_processor, sampler
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)

from tokenstep.integrations.vllm import report_no_place
from tokenstep.integrations.vllm.batch import MAX_LOGPROBS, Batch, Unsupported
from tokenstep.integrations.vllm.late_import import when_imported
from tokenstep.sampling import SampleOutput

__all__ = ["BatchTracker", "FusedSampler", "install"]

logger = init_logger("vllm.tokenstep")


class BatchTracker(LogitsProcessor):  # type: ignore[misc] # vLLM is not there when types are checked
    """Hears of the batch what logits processors hear: parameters on the host, and which row is whose.

    vLLM's SamplingMetadata has them as tensors of the device, which would have to be read back.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """As vLLM makes each of its logits processors, in the processes that sample."""
        logger.info_once("tokenstep: the sampler is fused")
        self.batch = Batch(vllm_config.scheduler_config.max_num_seqs)

    def is_argmax_invariant(self) -> bool:
        """It changes no logits."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Before each step; None if the requests are those of the last one."""
        if batch_update is not None:
            self.batch.update(batch_update.removed, batch_update.added, batch_update.moved)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits as they are."""
        return logits


class FusedSampler(sampler.Sampler):  # type: ignore[misc]
    """Penalties, temperature, min-p, top-k, top-p, the draw and raw log probabilities in one call.

    What comes before the penalties (allowed ids, bad words, minimum lengths, biases, other processors), and
    log probabilities that the kernel doesn't give, are computed by vLLM's own code, around the kernel. What
    cannot be arranged so runs as vLLM's own sampler, logged once with the reason.
    """

    _drawing: Batch | None = None  # while vLLM's forward runs around the kernel

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: Any,
        predict_bonus_token: bool = False,
        logprobs_mode_override: str | None = None,
    ) -> Any:
        """As vLLM's own."""
        mode = logprobs_mode_override or self.logprobs_mode
        batch = _batch_of(sampling_metadata)
        if batch is None:  # warm-up, or speculative decoding, for which vLLM has other code
            return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        try:
            self._check(sampling_metadata, mode, predict_bonus_token)
            around = _needs_vllm_around(sampling_metadata, batch, mode)
            batch.prepare(logits, None if around else sampling_metadata.max_num_logprobs)
        except Unsupported as reason:
            batch.forget()
            logger.warning_once("tokenstep: %s: not fused, vLLM's own sampler draws", str(reason))
            return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        if around:
            with self._drawing_for(batch):
                return super().forward(logits, sampling_metadata, logprobs_mode_override=mode)
        out = batch.step(logits)
        return SamplerOutput(
            sampled_token_ids=_valid(out.tokens)[:, None], logprobs_tensors=_logprobs_tensors(logits, out)
        )

    def apply_penalties(self, logits: torch.Tensor, sampling_metadata: Any, output_token_ids: Any) -> Any:
        """As vLLM's own, or nothing where the kernel does it."""
        if self._drawing is not None:
            return logits
        return super().apply_penalties(logits, sampling_metadata, output_token_ids)

    def sample(
        self, logits: torch.Tensor, sampling_metadata: Any, logprobs_mode_override: str | None = None
    ) -> Any:
        """As vLLM's own: the tokens ``[B]``, and processed values for log probabilities or None."""
        if self._drawing is None:
            return super().sample(logits, sampling_metadata, logprobs_mode_override)
        return _valid(self._drawing.step(logits).tokens), None

    def _check(self, metadata: Any, mode: str, predict_bonus_token: bool) -> None:
        """Raises Unsupported for what neither the kernel nor vLLM's code around it does."""
        if predict_bonus_token:
            raise Unsupported("speculative decoding")
        if self.use_fp64_gumbel:
            raise Unsupported("fp64 Gumbel noise")
        for processor in metadata.logitsprocs.argmax_invariant:
            if not isinstance(processor, MinPLogitsProcessor | BatchTracker):
                raise Unsupported(f"{type(processor).__name__}, which runs behind the temperature")
        holder = metadata.thinking_budget_state_holder
        if holder is not None and holder.has_tracked_requests():
            raise Unsupported("a thinking budget")
        if _wants_logprobs(metadata) and mode.startswith("processed"):
            raise Unsupported(f"log probabilities in mode {mode}")

    @contextlib.contextmanager
    def _drawing_for(self, batch: Batch) -> Iterator[None]:
        self._drawing = batch
        try:
            yield
        finally:
            self._drawing = None


def install() -> None:
    """Puts fused samplers in the place of vLLM's, of both its model runners, in engines made from now on."""
    processors = logits_processor.BUILTIN_LOGITS_PROCESSORS
    if BatchTracker in processors:
        return
    # Built-in ones, unlike those of a user, don't make vLLM wait for each step's tokens.
    processors.append(BatchTracker)
    sampler.Sampler = FusedSampler
    runner: Any = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if runner is not None:
        runner.Sampler = FusedSampler
    # Not before vLLM does, which on a CPU has to change some of what it imports.
    when_imported("vllm.v1.worker.gpu.model_runner", _install_v2)


def _install_v2(runner: Any) -> None:
    try:
        from tokenstep.integrations.vllm.sampler_v2 import FusedSampler as FusedSamplerV2

        runner.Sampler = FusedSamplerV2
    except (ImportError, AttributeError) as reason:
        report_no_place("sampler in model runner V2", reason)


def _batch_of(metadata: Any) -> Batch | None:
    for processor in metadata.logitsprocs.argmax_invariant:
        if isinstance(processor, BatchTracker):
            return processor.batch
    return None


def _wants_logprobs(metadata: Any) -> bool:
    return metadata.max_num_logprobs is not None or bool(metadata.logprob_token_ids)


def _needs_vllm_around(metadata: Any, batch: Batch, mode: str) -> bool:
    """Whether vLLM's code has to edit the logits first, or to gather log probabilities behind."""
    for processor in metadata.logitsprocs.non_argmax_invariant:
        if not isinstance(processor, MinTokensLogitsProcessor | LogitBiasLogitsProcessor):
            return True
    if _wants_logprobs(metadata):
        count = metadata.max_num_logprobs
        if metadata.logprob_token_ids or mode != "raw_logprobs" or not 0 <= count <= MAX_LOGPROBS:
            return True
    return batch.edits()


def _valid(tokens: torch.Tensor) -> torch.Tensor:
    """int32; token 0 for a row that cannot be sampled, which vLLM knows no word for."""
    return tokens.to(torch.int32).clamp_(min=0)


def _logprobs_tensors(logits: torch.Tensor, out: SampleOutput) -> Any:
    """In vLLM's layout: the token before the most likely ones, ranks that count all ids at least as likely.

    The kernel's ranks order equal values by id, and 16-bit logits are often equal.
    """
    if out.logprobs is None:
        return None
    tokens = out.tokens[:, None]
    ids = torch.cat((tokens, out.top_tokens), 1)
    values = torch.cat((out.logprobs[:, None], out.top_logprobs), 1)
    ranks = (logits >= logits.gather(1, tokens.clamp(min=0))).sum(-1, dtype=torch.int32)
    return LogprobsTensors(_valid(ids), values, ranks)

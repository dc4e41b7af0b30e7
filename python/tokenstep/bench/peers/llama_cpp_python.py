"""llama.cpp by the C functions that llama-cpp-python (0.3.36) binds: prompts as sequences of one batch.

Its Python class would copy all logits in each step; these calls leave them where they are.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp

MICRO_BATCH = 512  # tokens of one pass, llama.cpp's default
PENALISED = 4096  # the last tokens, more than any case has


class Peer:
    """A GGUF file, memory-mapped. Each request has a context of its own, made before the clock starts."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._threads = options["threads"]
        self._keep = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._keep, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(options["model"].encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {options['model']}")

    def describe(self) -> dict[str, Any]:
        """The package's version, and what the build says that it uses."""
        return describe_build()

    def generate(
        self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float] | None
    ) -> float:
        """Seconds from the prompts' ids to the last id."""
        context = self._context(prompts, output_tokens)
        vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        samplers = [sampler_chain(vocab_size, sampling, prompt, seed) for seed, prompt in enumerate(prompts)]
        batch = llama_cpp.llama_batch_init(max(MICRO_BATCH, len(prompts)), 0, 1)
        try:
            begin = time.perf_counter()
            tokens = self._prefill(context, batch, prompts, samplers)
            for index in range(output_tokens - 1):
                for sequence, token in enumerate(tokens):
                    self._put(batch, sequence, token, len(prompts[sequence]) + index, sequence, True)
                self._decode(context, batch, len(tokens))
                tokens = [
                    llama_cpp.llama_sampler_sample(sampler, context, row)
                    for row, sampler in enumerate(samplers)
                ]
            return time.perf_counter() - begin
        finally:
            for sampler in samplers:
                llama_cpp.llama_sampler_free(sampler)
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def _prefill(self, context: Any, batch: Any, prompts: list[list[int]], samplers: list[Any]) -> list[int]:
        """Computes the prompts, as many in a pass as it holds; returns the token that follows each."""
        places = [
            (sequence, position, token, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        following = [0] * len(prompts)
        for begin in range(0, len(places), MICRO_BATCH):
            part = places[begin : begin + MICRO_BATCH]
            for row, (sequence, position, token, is_last) in enumerate(part):
                self._put(batch, row, token, position, sequence, is_last)
            self._decode(context, batch, len(part))
            for row, (sequence, _, _, is_last) in enumerate(part):
                if is_last:
                    following[sequence] = llama_cpp.llama_sampler_sample(samplers[sequence], context, row)
        return following

    def _context(self, prompts: list[list[int]], output_tokens: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        length = -(-(max(map(len, prompts)) + output_tokens) // 256) * 256
        params.n_seq_max = len(prompts)
        params.n_ctx = length * len(prompts)  # it is shared out evenly
        params.n_batch = params.n_ubatch = MICRO_BATCH
        params.n_threads = params.n_threads_batch = self._threads
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp can't make a context of {params.n_ctx} tokens")
        return context

    @staticmethod
    def _put(batch: Any, row: int, token: int, position: int, sequence: int, wants_logits: bool) -> None:
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = wants_logits

    @staticmethod
    def _decode(context: Any, batch: Any, count: int) -> None:
        batch.n_tokens = count
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode has failed: {status}")


def sampler_chain(vocab_size: int, sampling: dict[str, float] | None, prompt: list[int], seed: int) -> Any:
    """llama.cpp's samplers for one text, to be freed; None: greedy."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if sampling is None:
        stages = [llama_cpp.llama_sampler_init_greedy()]
    else:
        stages = [
            llama_cpp.llama_sampler_init_penalties(
                vocab_size,
                PENALISED,
                sampling["repetition_penalty"],
                sampling["frequency_penalty"],
                sampling["presence_penalty"],
            ),
            llama_cpp.llama_sampler_init_top_k(int(sampling["top_k"])),
            llama_cpp.llama_sampler_init_top_p(sampling["top_p"], 1),
            llama_cpp.llama_sampler_init_min_p(sampling["min_p"], 1),
            llama_cpp.llama_sampler_init_temp(sampling["temperature"]),
            llama_cpp.llama_sampler_init_dist(seed),
        ]
    for stage in stages:
        llama_cpp.llama_sampler_chain_add(chain, stage)
    for token in prompt:  # which counts for the penalties
        llama_cpp.llama_sampler_accept(chain, token)
    return chain


def describe_build() -> dict[str, Any]:
    """The package's version, and what the build says that it uses."""
    features = llama_cpp.llama_print_system_info().decode().strip()
    return {"version": f"llama-cpp-python {llama_cpp.__version__}", "details": features}

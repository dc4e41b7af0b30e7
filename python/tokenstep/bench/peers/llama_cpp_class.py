"""llama-cpp-python (0.3.36) by its class `Llama`: with llama.cpp's samplers, or with tokenstep's adapter.

One option beside those of `worker`: ``way``, one of "chain", "loop" and "processor".
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp
import numpy as np

from tokenstep.bench.peers.llama_cpp_python import describe_build, sampler_chain
from tokenstep.integrations.llama_cpp import Draw, Engine, FusedLogitsProcessor, generate
from tokenstep.sampling import SamplingParams


class Peer:
    """A GGUF file, one text at a time."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._way = options["way"]
        self._threads = options["threads"]
        self._llama = llama_cpp.Llama(
            options["model"],
            n_ctx=options["max_length"] + 8,
            n_threads=options["threads"],
            n_threads_batch=options["threads"],
            verbose=False,
        )

    def describe(self) -> dict[str, Any]:
        """The package's version, and what the build says that it uses."""
        return describe_build()

    def generate(
        self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float] | None
    ) -> float:
        """Seconds from the one prompt's ids to the last id."""
        [prompt] = prompts
        begin = time.perf_counter()
        tokens = list(itertools.islice(self._tokens(prompt, sampling), output_tokens))
        seconds = time.perf_counter() - begin
        assert len(tokens) == output_tokens
        return seconds

    def sample(
        self, prompts: list[list[int]], output_tokens: int, sampling: dict[str, float] | None
    ) -> float:
        """Seconds that sampling takes of it: from the logits of the last token to the next id."""
        [prompt] = prompts
        llama = self._llama
        llama.reset()
        llama.eval(prompt)
        seconds = 0.0
        with self._sampler(prompt, sampling) as sample:
            for _ in range(output_tokens):
                begin = time.perf_counter()
                token = sample()
                seconds += time.perf_counter() - begin
                llama.eval([token])
        return seconds

    @contextlib.contextmanager
    def _sampler(self, prompt: list[int], sampling: dict[str, float] | None) -> Iterator[Callable[[], int]]:
        """A function that samples from the logits in the Llama's context."""
        if self._way == "chain":
            chain = sampler_chain(self._llama.n_vocab(), sampling, prompt, seed=0)
            try:
                yield lambda: llama_cpp.llama_sampler_sample(chain, self._llama.ctx, -1)
            finally:
                llama_cpp.llama_sampler_free(chain)
            return
        if self._way == "processor":  # as Llama.generate sets it up, once a text
            options = _processor_options(self._llama, sampling)
            sampler = self._llama._init_sampler(**options)
            yield lambda: sampler.sample(self._llama._ctx, -1)
            return
        engine, draw = Engine(self._llama), Draw("generate", self._llama, _params(sampling), "llama.cpp")
        draw.begin(np.array(prompt))
        yield lambda: draw(engine.logits()).id

    def _tokens(self, prompt: list[int], sampling: dict[str, float] | None) -> Iterator[int]:
        if self._way == "chain":
            return iter(self._llama.generate(prompt, **_llama_arguments(sampling)))
        if self._way == "loop":
            return (token.id for token in generate(self._llama, prompt, _params(sampling), ignore_eos=True))
        return iter(self._llama.generate(prompt, **_processor_options(self._llama, sampling)))


def _params(sampling: dict[str, Any] | None) -> SamplingParams:
    return SamplingParams(**(sampling or {"temperature": 0.0}), seed=0)


def _processor_options(llama: Any, sampling: dict[str, Any] | None) -> dict[str, Any]:
    """For `Llama.generate`, which has another name for the temperature than create_completion."""
    options = FusedLogitsProcessor(llama, _params(sampling)).options
    options["temp"] = options.pop("temperature")
    return options


def _llama_arguments(sampling: dict[str, float] | None) -> dict[str, float]:
    if sampling is None:
        return {"temp": 0.0, "repeat_penalty": 1.0}
    names = {"temperature": "temp", "repetition_penalty": "repeat_penalty"}
    return {names.get(name, name): value for name, value in sampling.items()}

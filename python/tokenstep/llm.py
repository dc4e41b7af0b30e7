"""`LLM`: a model, an engine and the completions schema in one object."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from tokenstep import _native
from tokenstep._version import __version__
from tokenstep.completions.chat import chat, render_chat, stream_chat
from tokenstep.completions.chat_schema import ChatCompletion, ChatCompletionChunk, ChatRequest
from tokenstep.completions.fields import GenerationRequest
from tokenstep.completions.schema import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChunk,
    CompletionRequest,
)
from tokenstep.completions.service import CompletionService
from tokenstep.engine import Engine, EngineConfig
from tokenstep.models import LoadedModel, load, load_adapter
from tokenstep.models.kv_cache import kv_dtype_name

OLDEST_CAPABILITY = (8, 0)  # Ampere: the kernels' copies and tensor core instructions begin there

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class LLM:
    """A language model to complete prompts with.

    Safe to use from several threads: they share the batch. It computes in a thread of its own, which begins
    with the first request and uses as many threads as torch does. After a fork the child begins with its own;
    requests that were in flight raise GenerationError there and go on in the parent.

    Args:
        model: "smollm2", a .gguf file, or a folder with config.json and safetensors.
        device: "cpu", "cuda" or "auto", a GPU where torch and this build can use it.
        dtype: "float32", "bfloat16", "float16" or "auto".
        weights: "auto": on a CPU, matrices in Q4_0, Q4_1 and Q8_0 stay as they are and are multiplied so;
            "dequantised": all become `dtype`; "random": none are read, for measuring.
        max_batch: sequences that are generated together; more wait for their turn.
        kv_tokens: tokens that the KV cache holds. Default: on a GPU what `gpu_memory_utilization` leaves, on
            a CPU a full context for each of `max_batch` within 2 GiB and a quarter of the available memory.
        kv_cache_dtype: "auto", what the model computes in; "float8_e4m3" or "int8": twice the tokens in the
            same memory, at the cost of precision (docs/engine.md).
        gpu_memory_utilization: share of a GPU's memory that weights, the largest step and the KV cache take.
        cuda_graphs: on a GPU a decode step is captured in a CUDA graph for each batch size, and replayed.
        batch_invariant: a seeded request gives the same text, bit for bit, whatever else is computed at the
            same time. Costs speed: see docs/determinism.md.
        max_waiting: prompts that may wait for their turn before more are refused with QueueFull; default: any
            number.
        max_waiting_tokens: the same, counted in tokens of prompts and of the most output.
        seed: for requests that give none; default: fresh entropy for each.
        default_max_tokens: for requests that give none.
        name: what responses call the model; default: how it was loaded, without folder and suffix.
        aliases: other names by which requests may call it.
        progress: shows a bar on stderr while the model loads, if that is a terminal.

    Raises:
        ModelNotFound: there is no such model.
        ModelFileError: a file is damaged or incomplete.
        UnsupportedConfig: the model needs something that tokenstep doesn't have.
        ValueError: an argument is out of range.
        RuntimeError: the device can't be used.
        NotEnoughMemory: the weights or the KV cache don't fit; a MemoryError, with the numbers.
    """

    def __init__(
        self,
        model: str | Path = "smollm2",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        weights: str = "auto",
        max_batch: int = 32,
        kv_tokens: int | None = None,
        kv_cache_dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
        max_waiting: int | None = None,
        max_waiting_tokens: int | None = None,
        seed: int | None = None,
        default_max_tokens: int = DEFAULT_MAX_TOKENS,
        name: str | None = None,
        aliases: Sequence[str] = (),
        progress: bool = True,
    ) -> None:
        config = EngineConfig(
            max_batch=max_batch,
            kv_tokens=kv_tokens,
            kv_cache_dtype=kv_cache_dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            cuda_graphs=cuda_graphs,
            batch_invariant=batch_invariant,
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
        )
        place = choose_device(device)
        loaded = load(model, device=place, dtype=dtype, weights=weights, progress=progress)
        self.name = name or loaded.name
        self.tokenizer = loaded.tokenizer
        engine = Engine(loaded.model, loaded.tokenizer.vocab_size, config)
        cache_dtype = engine.runner.cache.dtype
        self.system_fingerprint = fingerprint(loaded, place, batch_invariant, cache_dtype)
        self._service: CompletionService | None = CompletionService(
            engine,
            loaded.tokenizer,
            model_name=self.name,
            system_fingerprint=self.system_fingerprint,
            default_seed=seed,
            default_max_tokens=default_max_tokens,
            aliases=frozenset(aliases),
        )

    @property
    def service(self) -> CompletionService:
        """What serves the requests; raises RuntimeError after `close`."""
        if self._service is None:
            raise RuntimeError("tokenstep.LLM: this model has been closed")
        return self._service

    @overload
    def complete(
        self, prompt: Prompt | None = ..., *, stream: Literal[False] = ..., **params: Any
    ) -> Completion: ...

    @overload
    def complete(
        self, prompt: Prompt | None = ..., *, stream: Literal[True], **params: Any
    ) -> Generator[CompletionChunk]: ...

    @overload
    def complete(
        self, prompt: Prompt | None = ..., *, stream: bool, **params: Any
    ) -> Completion | Generator[CompletionChunk]: ...

    def complete(
        self, prompt: Prompt | None = None, *, stream: bool = False, **params: Any
    ) -> Completion | Generator[CompletionChunk]:
        """Completes one prompt or many.

        Args:
            prompt: a string, a list of strings, a list of token ids or a list of those. None: the model's
                begin (else end) token.
            stream: gives chunks as the text is generated.
            **params: any field of `CompletionRequest`, such as max_tokens, temperature, stop or logprobs.

        Returns:
            The response; with `stream` an iterator of its chunks. Closing or dropping that ends the request.

        Raises:
            RequestError: a parameter is wrong; the message names it.
            TypeError: there is no such parameter.
            GenerationError: the tokens can't be computed.
            QueueFull: too much is waiting (never without max_waiting and max_waiting_tokens).
        """
        _refuse_unknown("complete", params)
        service = self.service
        request = CompletionRequest.parse({"prompt": _as_lists(prompt), "stream": stream, **params})
        return service.stream(request) if request.stream else service.complete(request)

    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] = ..., **params: Any) -> ChatCompletion: ...

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[True], **params: Any
    ) -> Generator[ChatCompletionChunk]: ...

    @overload
    def chat(
        self, messages: Messages, *, stream: bool, **params: Any
    ) -> ChatCompletion | Generator[ChatCompletionChunk]: ...

    def chat(
        self, messages: Messages, *, stream: bool = False, **params: Any
    ) -> ChatCompletion | Generator[ChatCompletionChunk]:
        """Continues a conversation, written as the model's chat template wants it.

        Args:
            messages: mappings with `role` and `content`, the oldest first.
            stream: gives chunks as the text is generated.
            **params: any field of `ChatRequest`, such as max_tokens, temperature, stop or logprobs.

        Returns:
            The response; with `stream` an iterator of its chunks. Closing or dropping that ends the request.

        Raises:
            RequestError: a parameter is wrong, or the template refuses the messages.
            TypeError: there is no such parameter.
            GenerationError: the tokens can't be computed.
            QueueFull: too much is waiting (never without max_waiting and max_waiting_tokens).
        """
        _refuse_unknown("chat", params, ChatRequest)
        service = self.service
        request = ChatRequest.parse({"messages": messages, "stream": stream, **params})
        return stream_chat(service, request) if request.stream else chat(service, request)

    def apply_chat_template(
        self, messages: Messages, *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt that `chat` completes.

        Args:
            messages: mappings with `role` and `content`, the oldest first.
            add_generation_prompt: let the template begin the assistant's message.
            **variables: for the template.

        Raises RequestError for a model without a template, or if that refuses the messages.
        """
        return render_chat(
            self.service.limits,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    def generate(
        self, prompts: Sequence[Prompt], params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    ) -> list[Completion]:
        """Completes many prompts together, each as a request of its own.

        Args:
            prompts: strings or lists of token ids.
            params: fields of `CompletionRequest` for all prompts, or one such mapping a prompt.

        Returns:
            For each prompt what `complete` gives for it.

        Raises:
            RequestError: a parameter of one is wrong; nothing is computed then.
            TypeError: there is no such parameter.
            ValueError: as many mappings as prompts are expected.
            GenerationError: the tokens of one can't be computed.
        """
        each = [params or {}] * len(prompts) if params is None or isinstance(params, Mapping) else params
        if len(each) != len(prompts):
            raise ValueError(
                f"tokenstep.LLM.generate: params has {len(each)} entries, expected one for each of"
                f" {len(prompts)} prompts"
            )
        for one in each:
            _refuse_unknown("generate", one)
        service = self.service
        return service.complete_many(
            [
                CompletionRequest.parse({**one, "prompt": _as_lists(prompt), "stream": False})
                for prompt, one in zip(prompts, each, strict=True)
            ]
        )

    def score(
        self, texts: Sequence[str] | Sequence[Sequence[int]], *, add_special_tokens: bool = True
    ) -> list[npt.NDArray[np.float32]]:
        """Log probabilities of the tokens of texts, under the model's own distribution.

        Args:
            texts: strings, or lists of token ids.
            add_special_tokens: put the model's begin token before a string, where it has one.

        Returns:
            For each text float32 [tokens - 1]: natural logarithms for all tokens but the first, which
            follows nothing; -inf for a token that is impossible.

        Raises:
            RequestError: a text is longer than the context, or an id out of range.
            GenerationError: the model's logits contain NaN.
        """
        if not len(texts):
            return []
        fields = {"max_tokens": 0, "loglikelihood": True, "add_special_tokens": add_special_tokens}
        prompts = [_as_lists(text) for text in texts]
        scores = self.service.score(CompletionRequest.parse({**fields, "prompt": prompts}))
        return [np.array(values, dtype=np.float32) for values in scores]

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Lets requests name a LoRA adapter by `peft`; those in flight are not touched.

        Args:
            name: what requests call it.
            path: a folder in PEFT's format.

        Raises:
            ModelNotFound: there is no adapter.
            ModelFileError: a file is damaged, incomplete or doesn't fit the model.
            UnsupportedConfig: the adapter needs something that tokenstep doesn't have; the message names it.
            ValueError: the name is empty, or another adapter has it.
        """
        adapters = self.service.adapters
        if not name or name in adapters:
            why = "another adapter has it" if name else "expected a name"
            raise ValueError(f"tokenstep.LLM.add_adapter: name = {name!r}: {why}")
        model = self.service.engine.runner.model
        adapters[name] = load_adapter(path, model.config, model.dtype, model.device, model.batch_invariant)

    def remove_adapter(self, name: str) -> None:
        """Lets no more requests name it; those in flight go on. Raises ValueError if there is none."""
        if self.service.adapters.pop(name, None) is None:
            raise ValueError(f"tokenstep.LLM.remove_adapter: name = {name!r}: there is no such adapter")

    @property
    def adapters(self) -> list[str]:
        """The names that requests may give as `peft`."""
        return sorted(self.service.adapters)

    def close(self) -> None:
        """Frees the model and its cache, once no stream uses them. Closing twice does nothing."""
        if self._service is not None:
            self._service.loop.close()
        self._service = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fingerprint(
    loaded: LoadedModel, device: torch.device, batch_invariant: bool, cache_dtype: torch.dtype
) -> str:
    """Names all that decides the tokens: versions, device, dtypes, forms of weights, mode, the weights."""
    dtype = loaded.model.dtype
    parts = [
        "tokenstep",
        __version__,
        f"numerics{_native.cpu.numerics_version}",
        f"torch{torch.__version__}",
        str(device),
        _native.cpu.isa() if device.type == "cpu" else torch.cuda.get_device_name(device).replace(" ", "_"),
        str(dtype).removeprefix("torch."),
        *([] if cache_dtype == dtype else [f"kv_{kv_dtype_name(cache_dtype)}"]),
        "+".join(loaded.model.weight_forms),
        *(["batch_invariant"] if batch_invariant else []),
        loaded.weights_id,
    ]
    return "-".join(parts)


def choose_device(device: str | torch.device) -> torch.device:
    """The device that `device` means; "auto" is a GPU where both torch and this build can use it.

    Raises ValueError for a name that means none, RuntimeError for a GPU that can't be used.
    """
    name = str(device)
    kind, _, index = name.partition(":")
    if name != "auto" and (kind not in ("cpu", "cuda") or not (index.isdecimal() or name == kind)):
        raise ValueError(f"tokenstep.LLM: device = {name!r}, expected 'auto', 'cpu' or 'cuda'")
    if kind == "cpu":
        return torch.device(name)
    reason = gpu_unusable_because(int(index) if index else None)
    if reason is None:
        return torch.device("cuda", int(index) if index else torch.cuda.current_device())
    if name == "auto":
        return torch.device("cpu")
    raise RuntimeError(f"tokenstep.LLM: device = {name!r}, but {reason}")


def gpu_unusable_because(index: int | None) -> str | None:
    """Why a model can't run on that GPU, or on torch's current one; None if it can."""
    if (reason := _native.cuda_unusable_because()) is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        return f"this machine has {count} GPU{'s' * (count != 1)}, numbered from 0"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        have, need = ("{}.{}".format(*version) for version in (capability, OLDEST_CAPABILITY))
        return f"that GPU has compute capability {have}; the kernels need {need}"
    return None


def _refuse_unknown(
    method: str, params: Mapping[str, Any], schema: type[GenerationRequest] = CompletionRequest
) -> None:
    if unknown := sorted(params.keys() - schema.model_fields.keys()):
        raise TypeError(f"tokenstep.LLM.{method}: unknown parameter {unknown[0]!r}")


def _as_lists(prompt: object) -> object:
    """The prompt with tuples, arrays and tensors as lists; what else it may be is the schema's to refuse."""
    if hasattr(prompt, "tolist"):
        return prompt.tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes, bytearray)):
        return [_as_lists(item) for item in prompt]
    return prompt

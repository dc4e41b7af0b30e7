"""Logits to token in one fused kernel: ``sample``, ``apply_logits`` and the engine's ``Sampler``.

Per row and in this order: bitmask, logit bias, repetition, frequency and presence penalties, temperature,
min-p, top-k, top-p, the draw, log probabilities. Weights are integers and the random bits are Philox4x32-10
(Salmon et al., SC 2011) of (seed, position, substream): the token of a row is a function of that row's inputs
alone, the same bits on every machine, for any number of threads and in any place of any batch. Nothing is
computed in this file: logits on a GPU go to the CUDA module, all others to that of the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, cast

from tokenstep import _native
from tokenstep._arrays import as_given

__all__ = ["Array", "SampleOutput", "Sampler", "SamplingParams", "apply_logits", "sample"]


class Array(Protocol):
    """Anything that speaks DLPack: a torch tensor, a NumPy, CuPy or JAX array."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


Floats: TypeAlias = "float | Sequence[float] | Array"
Ints: TypeAlias = "int | Sequence[int] | Array"
Seeds: TypeAlias = "int | Sequence[int | None] | Array | None"
TokenIds: TypeAlias = "Sequence[int] | Array"
History: TypeAlias = "Sequence[TokenIds] | None"
Bias: TypeAlias = "Mapping[int, float] | Sequence[Mapping[int, float] | None] | None"
LogprobsMode: TypeAlias = Literal["raw", "processed"]
Semantics: TypeAlias = Literal["tokenstep", "vllm", "transformers", "llama.cpp"]

_A = TypeVar("_A", bound=Array)


class SampleOutput(NamedTuple):
    """What one step gives; each field is an array of the same kind and on the same device as the logits.

    Attributes:
        tokens: int64 [B]; -1 where a row could not be sampled.
        status: int32 [B]; 0 sampled, 1 NaN or +inf among the logits, 2 no token left with a finite value, 3 a
            parameter that only the device knew is out of range.
        logprobs: float32 [B], natural log probability of the token; None unless asked for.
        ranks: int32 [B], 1 is the most likely; None unless asked for.
        top_tokens: int64 [B, N], most likely first; None unless asked for.
        top_logprobs: float32 [B, N]; None unless asked for.
    """

    tokens: Any
    status: Any
    logprobs: Any = None
    ranks: Any = None
    top_tokens: Any = None
    top_logprobs: Any = None


def sample(
    logits: Array,
    temperature: Floats = 1.0,
    top_k: Ints = 0,
    top_p: Floats = 1.0,
    min_p: Floats = 0.0,
    repetition_penalty: Floats = 1.0,
    presence_penalty: Floats = 0.0,
    frequency_penalty: Floats = 0.0,
    prompt_tokens: History = None,
    output_tokens: History = None,
    logit_bias: Bias = None,
    token_bitmask: Array | None = None,
    seed: Seeds = None,
    position: Ints = 0,
    substream: Ints = 0,
    logprobs: int | None = None,
    logprobs_mode: LogprobsMode = "raw",
    check: bool | None = None,
    semantics: Semantics = "tokenstep",
    penalty_last_n: Ints | None = None,
) -> SampleOutput:
    """Draws one token per row of raw logits.

    Every per-row argument is a scalar for all rows, or one value a row (a sequence or an array of length B).

    Args:
        logits: float32, float16 or bfloat16 [B, V]; rows may be strided, the last axis is contiguous.
        temperature: below 1e-5 the row is greedy: the largest value, lowest id among equals.
        top_k: keeps exactly k tokens by (value descending, id ascending); 0 or -1 is off.
        top_p: keeps the shortest prefix of the same order with at least this share of the weight; 1 is off.
        min_p: keeps tokens at least min_p times as likely as the most likely one; 0 is off.
        repetition_penalty: divides positive and multiplies other logits of tokens in prompt or output; 1 is
            off.
        presence_penalty: subtracted once from tokens in the output.
        frequency_penalty: subtracted for each occurrence in the output.
        prompt_tokens: one sequence of token ids a row.
        output_tokens: one sequence of token ids a row.
        logit_bias: {id: value} for all rows, or one such dict or None a row; -inf bans a token.
        token_bitmask: int32 [B, ceil(V/32)]; bit i % 32 of word i / 32 allows token i (xgrammar's layout).
        seed: 64 bits; a negative int is taken as two's complement; None is fresh entropy, row by row.
        position: index of the output token, from 0.
        substream: 32 bits more that tell apart draws with the same seed and position.
        logprobs: None, or the number 0-20 of top log probabilities to return beside the token's own.
        logprobs_mode: "raw" is the log-softmax of the logits as given; "processed" that of what was drawn
            from.
        check: True raises for rows that cannot be sampled, False reports them in ``status`` alone; None
            raises on the CPU and does not synchronise on a GPU.
        semantics: whose meaning the parameters have: "tokenstep", as above, or "vllm", "transformers" or
            "llama.cpp": that engine's order of steps, ties, temperatures that are greedy, and counting of
            penalties (docs/sampling.md has the table).
        penalty_last_n: with semantics="llama.cpp" alone: all penalties count the last so many tokens of
            prompt and output together; 0 is off, -1 counts all, None is llama.cpp's 64. Read by the host.

    Returns:
        SampleOutput: tokens int64 [B], status int32 [B] and, with ``logprobs``, the four others.

    Raises:
        TypeError: an argument is of the wrong kind, dtype or device; the message names it and the row.
        ValueError: a value is out of range or a shape wrong; or a row cannot be sampled (see ``check``).
        RuntimeError: the logits are on a GPU and this build or machine has no CUDA module.
    """
    try:
        out = SampleOutput._make(
            _native.module_for(logits).sample(
                logits,
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                prompt_tokens,
                output_tokens,
                logit_bias,
                token_bitmask,
                seed,
                position,
                substream,
                logprobs,
                logprobs_mode,
                check,
                semantics,
                penalty_last_n,
            )
        )
    except (TypeError, ValueError):
        _refuse_cuda("sample", logits)
        raise
    return as_given(logits, out)


def apply_logits(
    logits: _A,
    temperature: Floats = 1.0,
    top_k: Ints = 0,
    top_p: Floats = 1.0,
    min_p: Floats = 0.0,
    repetition_penalty: Floats = 1.0,
    presence_penalty: Floats = 0.0,
    frequency_penalty: Floats = 0.0,
    prompt_tokens: History = None,
    output_tokens: History = None,
    logit_bias: Bias = None,
    token_bitmask: Array | None = None,
    seed: Seeds = None,
    position: Ints = 0,
    substream: Ints = 0,
    logprobs: int | None = None,
    logprobs_mode: LogprobsMode = "raw",
    check: bool | None = None,
    out: _A | None = None,
    semantics: Semantics = "tokenstep",
    penalty_last_n: Ints | None = None,
) -> _A:
    """Everything of :func:`sample` but the draw, for engines that draw themselves.

    Args:
        logits: as :func:`sample`, like all up to ``check``; seed, position, substream, logprobs and
            logprobs_mode are taken so that both functions can be called alike, and have no effect.
        temperature: see :func:`sample`.
        top_k: see :func:`sample`.
        top_p: see :func:`sample`.
        min_p: see :func:`sample`.
        repetition_penalty: see :func:`sample`.
        presence_penalty: see :func:`sample`.
        frequency_penalty: see :func:`sample`.
        prompt_tokens: see :func:`sample`.
        output_tokens: see :func:`sample`.
        logit_bias: see :func:`sample`.
        token_bitmask: see :func:`sample`.
        seed: no effect.
        position: no effect.
        substream: no effect.
        logprobs: no effect.
        logprobs_mode: no effect.
        check: as :func:`sample`; a row that cannot be sampled is all -inf.
        out: float32 [B, V] with a contiguous last axis to write to; it may be the float32 logits themselves.
        semantics: see :func:`sample`.
        penalty_last_n: see :func:`sample`.

    Returns:
        float32 [B, V], ``out`` if given: the values after penalties and temperature, -inf where a token is
        cut. A greedy row keeps its arg max alone, with its value before the temperature.

    Raises:
        TypeError: as :func:`sample`.
        ValueError: as :func:`sample`; nothing is written to ``out`` when an argument is wrong.
        RuntimeError: as :func:`sample`.
    """
    try:
        result, _ = _native.module_for(logits).apply_logits(
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            prompt_tokens,
            output_tokens,
            logit_bias,
            token_bitmask,
            out,
            check,
            semantics,
            penalty_last_n,
        )
    except (TypeError, ValueError):
        _refuse_cuda("apply_logits", logits)
        raise
    return cast(_A, result if out is not None else as_given(logits, result))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one row of a :class:`Sampler`; they mean what the arguments of :func:`sample` mean.

    They are checked when the row is admitted. ``penalty_last_n`` is for a Sampler with llama.cpp's semantics.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    substream: int = 0
    logprobs: int | None = None
    penalty_last_n: int | None = None


class Sampler:
    """The engine's form of :func:`sample`: parameters and histories of ``max_rows`` requests stay in memory.

    Each step draws one token for some of the rows, adds it to their histories and moves their positions on.
    What a row gives is what :func:`sample` gives with that row's parameters, history and position. Memory:
    112 bytes a row; from the first request with penalties in a row on, 8 bytes per vocabulary entry for it
    (on the CPU address space, of which only the pages that hold the ids seen are ever touched), and with a
    ``penalty_last_n`` 4 more, and 4 a token of it. One thread at a time may use a sampler.

    On a GPU all of it is device memory. ``admit`` and ``release`` are enqueued on torch's current stream and
    wait for nothing; ``step`` with ``out`` is one kernel launch, and can be captured in a CUDA graph that is
    replayed while rows are admitted and released between replays.
    """

    __slots__ = ("_native",)

    def __init__(
        self, max_rows: int, vocab_size: int, device: object = "cpu", *, semantics: Semantics = "tokenstep"
    ) -> None:
        """Makes a sampler with every row free.

        Args:
            max_rows: rows are numbered 0 to max_rows - 1.
            vocab_size: V, the width of the logits, up to 2^18.
            device: where the logits will be: "cpu", "cuda" (the current GPU) or "cuda:1"; a string or a
                torch.device.
            semantics: as :func:`sample`, of all rows.

        Raises:
            ValueError: a size is out of range, or the device or the semantics unknown.
            RuntimeError: a GPU is asked for and cannot be used.
        """
        name, _, index = str(device).partition(":")
        if name not in ("cpu", "cuda") or not (index.isdecimal() or index == ""):
            raise ValueError(f"tokenstep.Sampler: device = {str(device)!r}, expected 'cpu' or 'cuda'")
        if name == "cpu":
            if index not in ("", "0"):
                raise ValueError(f"tokenstep.Sampler: device = {str(device)!r}, expected 'cpu' or 'cuda'")
            self._native = _native.cpu.Sampler(max_rows, vocab_size, 0, semantics)
            return
        reason = _native.cuda_unusable_because()
        if _native.cuda is None or reason is not None:
            raise RuntimeError(f"tokenstep.Sampler: device = {str(device)!r}, but {reason}")
        number = int(index) if index else _native.cuda.current_device()
        if number >= _native.cuda.num_devices():
            count = _native.cuda.num_devices()
            raise ValueError(f"tokenstep.Sampler: device = {str(device)!r}, but there are {count} GPUs")
        self._native = _native.cuda.Sampler(max_rows, vocab_size, number, semantics)

    @property
    def max_rows(self) -> int:
        """Number of rows that can be admitted at once."""
        return self._native.max_rows

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._native.vocab_size

    def admit(
        self, row: int, params: SamplingParams, prompt_tokens: TokenIds = (), output_tokens: TokenIds = ()
    ) -> None:
        """Takes a row for a request, in place of whatever the row held.

        Args:
            row: 0 to max_rows - 1.
            params: its parameters; with seed None the row draws fresh entropy here.
            prompt_tokens: ids of the prompt.
            output_tokens: ids sampled before, of a request that goes on; the next position is their number.

        Raises:
            TypeError: a value is of the wrong kind; the row stays as it was.
            ValueError: a value is out of range; the row stays as it was.
        """
        self._native.admit(
            row,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            params.logit_bias,
            params.seed,
            params.substream,
            params.logprobs,
            prompt_tokens,
            output_tokens,
            params.penalty_last_n,
        )

    def step(
        self,
        logits: Array,
        rows: Array | None = None,
        token_bitmask: Array | None = None,
        out: SampleOutput | None = None,
        *,
        logprobs_mode: LogprobsMode = "raw",
    ) -> SampleOutput:
        """Draws one token for each row of logits; of rows that cannot be sampled only the status tells.

        Args:
            logits: float32, float16 or bfloat16 [B, V].
            rows: int32 [B], the admitted row that each row of logits belongs to, none twice; None: the
                first B. On a GPU the host does not read them: a row that was not admitted gets status 3.
            token_bitmask: int32 [B, ceil(V/32)], as :func:`sample`.
            out: arrays to fill, so that nothing is allocated; the fields that no row asks for may be None.
            logprobs_mode: "raw" or "processed", as :func:`sample`.

        Returns:
            ``out`` if given. Else new arrays, N being the most top log probabilities that one of these rows
            asks for; places that a row did not ask for hold -1 and NaN. A row that cannot be sampled keeps
            its position and history.

        Raises:
            TypeError: an argument is of the wrong kind, dtype or device.
            ValueError: a shape is wrong, or (on the CPU) a row was not admitted or comes twice; nothing is
                drawn then.
        """
        if out is not None:
            self._native.step(logits, rows, token_bitmask, out, logprobs_mode)
            return out
        arrays: Any = self._native.step(logits, rows, token_bitmask, None, logprobs_mode)
        return as_given(logits, SampleOutput._make(arrays))

    def release(self, row: int) -> None:
        """Frees an admitted row.

        Args:
            row: 0 to max_rows - 1.

        Raises:
            ValueError: the row is out of range or was not admitted.
        """
        self._native.release(row)


def _refuse_cuda(op: str, logits: Array) -> None:
    """Raises RuntimeError if the logits are on a GPU that this build cannot use."""
    if _native.cuda is None and _native.device_type(logits) == _native.CUDA:
        raise RuntimeError(f"tokenstep.{op}: logits is on a GPU, but {_native.cuda_absent_because}")

"""The fused sampler inside llama-cpp-python, through its public Python API.

Two ways, each of use alone:

- :func:`generate`, a loop over ``Llama.eval`` that reads the logits where llama.cpp keeps them. The fastest.
- :class:`FusedLogitsProcessor` for ``create_completion`` and ``create_chat_completion``, whose stop strings,
  streams, chat formats and tools go on working. llama-cpp-python shows a processor the logits as one of three
  fields of llama.cpp's candidates, which costs a few passes over the vocabulary.

Of llama-cpp-python, whose package is imported when a text begins, this uses what 0.3.36 has: of ``Llama`` the
methods ``eval``, ``reset``, ``n_vocab``, ``n_ctx``, ``token_eos`` and the attributes ``ctx``, ``model``,
``n_tokens``, ``input_ids``; of its C functions those in :class:`Engine`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tokenstep.sampling import SampleOutput, Sampler, SamplingParams, Semantics

__all__ = ["FusedLogitsProcessor", "Token", "generate"]

_OP = "tokenstep.integrations.llama_cpp"
_WHY_NOT = {1: "NaN or +inf among the logits", 2: "no token left to draw"}


class Token(NamedTuple):
    """One generated token.

    Attributes:
        id: In the model's vocabulary.
        logprob: Natural log probability; this and what follows only with ``SamplingParams.logprobs``.
        rank: 1 is the most likely.
        top: The most likely ids with their log probabilities, most likely first.
    """

    id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


def generate(
    llama: Any,
    prompt_tokens: Sequence[int],
    params: SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    ignore_eos: bool = False,
    semantics: Semantics = "llama.cpp",
) -> Iterator[Token]:
    """Generates one text, token by token, as ``Llama.generate`` does with llama.cpp's samplers.

    What the Llama has computed of the same prompt is used again. A token follows from the logits, the
    parameters, the prompt and its position alone: texts with seeds of their own do not influence each other,
    one after another or in different Llamas. One Llama holds one text at a time.

    Args:
        llama: A ``llama_cpp.Llama``.
        prompt_tokens: Ids, such as ``llama.tokenize`` gives.
        params: Of the sampler; None: the defaults, which draw from the whole distribution.
        max_tokens: The most tokens; None: until the context is full.
        ignore_eos: Go on behind the tokens that end a text. Else these end it, and are not given.
        semantics: Whose meaning the parameters have, as of :class:`tokenstep.Sampler`.

    Returns:
        An iterator; the prompt is evaluated when its first token is asked for.

    Raises:
        TypeError: A parameter is of the wrong kind.
        ValueError: A parameter or id is out of range, or the prompt empty or too long for the context. From
            the iterator: the logits hold NaN or +inf, no token is left, or the Llama was given another text
            in between.
    """
    prompt = np.array(prompt_tokens, dtype=np.intc)
    room = llama.n_ctx() - len(prompt)
    if len(prompt) == 0:
        raise ValueError(f"{_OP}.generate: prompt_tokens is empty, expected at least one id")
    if room < 1:
        raise ValueError(
            f"{_OP}.generate: prompt_tokens has {len(prompt)} ids, and the context {llama.n_ctx()} places"
        )
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"{_OP}.generate: max_tokens = {max_tokens}, expected at least 0")
    draw = Draw("generate", llama, params or SamplingParams(), semantics)
    draw.begin(prompt)
    count = room if max_tokens is None else min(room, max_tokens)
    return _generate(Engine(llama), draw, prompt, count, ignore_eos=ignore_eos)


def _generate(
    engine: Engine, draw: Draw, prompt: npt.NDArray[np.intc], count: int, *, ignore_eos: bool
) -> Iterator[Token]:
    if count == 0:
        return
    llama = engine.llama
    kept = engine.rewind(prompt)
    llama.eval(prompt[kept:].tolist())
    text = np.empty(len(prompt) + count, np.intc)
    text[: len(prompt)] = prompt
    for length in range(len(prompt), len(text)):
        token = draw(engine.logits())
        if not ignore_eos and engine.is_end(token.id):
            return
        text[length] = token.id
        yield token
        if length + 1 < len(text):
            if llama.n_tokens != length or not np.array_equal(llama.input_ids[:length], text[:length]):
                raise ValueError(f"{_OP}.generate: the Llama was given another text meanwhile")
            llama.eval([token.id])


class FusedLogitsProcessor:
    """The whole way from logits to token as a logits processor: it leaves one token, which llama.cpp takes.

    ``llama.create_completion(prompt, **FusedLogitsProcessor(llama, params).options)``, and the same with
    ``create_chat_completion``. :attr:`options` also holds the arguments without which llama.cpp would edit or
    draw after it. Biases belong into ``params``: given both, llama-cpp-python (0.3.36) drops all processors.
    A grammar comes behind the processor and can only refuse its token, and a draft model shows processors
    tokens that are not part of the text: neither can be used with it.

    One object serves any number of texts, one at a time: ids that do not go on where the last text stood
    begin a new one, with its own history and positions from 0.

    llama.cpp calls processors from C, where Python prints exceptions and ignores them. So a step that cannot
    be sampled (NaN or +inf among the logits, no token left) ends the text by its end token and keeps the
    reason in :attr:`error`. ``create_completion`` raises it if it is given :meth:`stopping_criterion`.

    Attributes:
        error: Why the last text could not go on; None if it could.
    """

    def __init__(
        self, llama: Any, params: SamplingParams | None = None, *, semantics: Semantics = "llama.cpp"
    ) -> None:
        """Checks the parameters against the model's vocabulary.

        Args:
            llama: The ``llama_cpp.Llama`` whose texts these will be.
            params: Of the sampler; None: the defaults, which draw from the whole distribution.
            semantics: Whose meaning the parameters have, as of :class:`tokenstep.Sampler`.

        Raises:
            TypeError: A parameter is of the wrong kind.
            ValueError: A parameter is out of range.
        """
        self.error: ValueError | None = None
        self._draw = Draw("FusedLogitsProcessor", llama, params or SamplingParams(), semantics)
        self._end = int(llama.token_eos())
        self._logits = np.empty((1, llama.n_vocab()), np.float32)
        self._text = np.empty(0, np.intc)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``create_completion``, ``create_chat_completion`` and ``Llama.generate``'s callers."""
        return {"logits_processor": [self], "temperature": 0.0, "repeat_penalty": 1.0}

    def __call__(
        self, input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.single]
    ) -> npt.NDArray[np.single]:
        """``scores`` with 0 at the token drawn and -inf elsewhere, edited in place.

        Args:
            input_ids: int32 ``[N]``, the prompt and what was generated since.
            scores: float32 ``[V]`` with any stride.
        """
        np.copyto(self._logits[0], scores)
        if len(input_ids) != len(self._text) or not np.array_equal(input_ids, self._text):
            self.error = None
            self._draw.begin(input_ids)
        scores.fill(-np.inf)
        try:
            token = self._draw(self._logits).id
        except ValueError as error:
            self.error = error
            scores[self._end] = 0.0
            raise
        scores[token] = 0.0
        self._text = np.append(input_ids, np.intc(token))
        return scores

    def stopping_criterion(self, input_ids: Any, logits: Any) -> bool:
        """For ``stopping_criteria=``: raises :attr:`error`, if there is one; else the text goes on."""
        if self.error is not None:
            raise self.error
        return False


class Draw:
    """Tokens of one text after another from their logits."""

    def __init__(self, op: str, llama: Any, params: SamplingParams, semantics: Semantics) -> None:
        self._op, self._params = op, params
        self._sampler = Sampler(1, llama.n_vocab(), semantics=semantics)
        self._sampler.admit(0, params)  # says now what is wrong with them
        self._count = 0
        self._out: SampleOutput | None = None
        if params.logprobs is None:
            self._out = SampleOutput(np.empty(1, np.int64), np.empty(1, np.int32))

    def begin(self, prompt: npt.NDArray[np.intc]) -> None:
        """The next logits are those of the first token behind this prompt."""
        self._sampler.admit(0, self._params, prompt)
        self._count = 0

    def __call__(self, logits: npt.NDArray[np.float32]) -> Token:
        """The token drawn from float32 ``[1, V]``.

        Raises:
            ValueError: The logits cannot be sampled.
        """
        out = self._sampler.step(logits, out=self._out)
        if out.status[0]:
            why = _WHY_NOT[int(out.status[0])]
            raise ValueError(f"{_OP}.{self._op}: token {self._count} of this text: {why}")
        self._count += 1
        token = int(out.tokens[0])
        if out.logprobs is None:
            return Token(token)
        top = tuple(zip(out.top_tokens[0].tolist(), out.top_logprobs[0].tolist(), strict=True))
        return Token(token, float(out.logprobs[0]), int(out.ranks[0]), top)


class Engine:
    """A Llama, and what only llama-cpp-python's C functions give of it."""

    def __init__(self, llama: Any) -> None:
        import llama_cpp

        self.llama = llama
        self._c = llama_cpp
        self._vocab = llama_cpp.llama_model_get_vocab(llama.model)
        self._address = 0
        self._view = np.empty((0, 0), np.float32)

    def logits(self) -> npt.NDArray[np.float32]:
        """Those of the last token, float32 ``[1, V]``, where they lie; valid until the next ``eval``."""
        pointer = self._c.llama_get_logits_ith(self.llama.ctx, -1)
        if not pointer:
            raise RuntimeError(f"{_OP}: llama.cpp has no logits of the last token")
        address = ctypes.addressof(pointer.contents)
        if address != self._address:  # llama.cpp keeps its buffer, and a new view takes microseconds
            self._address = address
            self._view = np.ctypeslib.as_array(pointer, (1, self.llama.n_vocab()))
        return self._view

    def is_end(self, token: int) -> bool:
        """Whether the token ends a text or a turn."""
        return bool(self._c.llama_vocab_is_eog(self._vocab, token))

    def rewind(self, prompt: npt.NDArray[np.intc]) -> int:
        """Takes back what the Llama holds to the part that it shares with a prompt, less its last token.

        Returns:
            How many tokens stay. All are taken back where a model cannot forget a part (recurrent ones).
        """
        llama = self.llama
        length = min(llama.n_tokens, len(prompt) - 1)
        same = llama.input_ids[:length] == prompt[:length]
        kept = length if same.all() else int(same.argmin())
        if kept > 0 and self._c.llama_memory_seq_rm(self._c.llama_get_memory(llama.ctx), -1, kept, -1):
            llama.n_tokens = kept
            return kept
        llama.reset()
        return 0

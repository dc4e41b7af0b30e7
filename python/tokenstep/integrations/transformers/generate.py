"""``model.generate`` with its sampling in one kernel call a step: :func:`generate_with`.

generate itself still prepares inputs, cache, processors and stopping criteria; only the loop over its steps
is ours, handed over by its ``custom_generate`` hook. transformers' chain of processors, softmax and
multinomial make a dozen passes over ``[B, V]`` and sort it for top-p; here parameters and histories stay in a
:class:`tokenstep.Sampler` and a step reads the logits once, in the model's dtype.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tokenstep.integrations.transformers.draw import Draw
from tokenstep.integrations.transformers.forward import Forward
from tokenstep.integrations.transformers.plan import Unsupported, make_plan

__all__ = ["generate_with"]

_MAX_VOCAB = 1 << 18
# Arguments of generate that select another decoding loop; truthy, they go to transformers unseen.
_OTHER_LOOPS = ("assistant_model", "assistant_tokenizer", "custom_generate", "synced_gpus", "token_healing")


def generate_with(model: Any) -> Callable[..., Any]:
    """A callable used like ``model.generate``, with the fused sampler in its loop.

    Parameters, their defaults (the model's generation config) and results are those of ``model.generate``:
    left padding, stopping criteria, streamers, ``return_dict_in_generate`` and the rest. It takes one more,
    ``seed``: a number for all rows (row i is substream i), or one a row; None draws it from torch's
    generator, so that ``torch.manual_seed`` makes a call repeat. A seeded row's tokens follow from its logits
    and parameters alone; they are not the tokens that torch.multinomial would draw.

    Repetition penalty, temperature, top-k, top-p and min-p are fused, in transformers' order and with its
    kept sets (:mod:`~tokenstep.integrations.transformers.chain` says what rounding may change). Processors
    that come before them, custom ones included, run as they are. Whatever needs another loop or stands behind
    them (beams, assisted decoding, typical-p, eta, …) makes one warning that names it, and the call goes to
    ``model.generate``; a seed then seeds torch's generator for this call.

    Args:
        model: A decoder-only model of transformers 4.57 or 5.x, on the CPU or a CUDA GPU.

    Returns:
        The callable. It raises ValueError where a row's logits hold NaN or +inf or no token is left.
    """

    def generate(*args: Any, seed: int | Sequence[int] | None = None, **kwargs: Any) -> Any:
        try:
            return _generate(model, args, kwargs, seed)
        except Unsupported as reason:
            warnings.warn(
                f"tokenstep: {reason}: not fused, transformers' own generate runs", UserWarning, stacklevel=2
            )
        if seed is None:
            return model.generate(*args, **kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(seed if isinstance(seed, int) else seed[0])
            return model.generate(*args, **kwargs)

    return generate


def _generate(model: Any, args: Any, kwargs: dict[str, Any], seed: Any) -> Any:
    """``model.generate`` with our loop.

    Raises:
        Unsupported: Before the first forward pass, the streamer's first token and the first random number.
    """
    if named := [name for name in _OTHER_LOOPS if kwargs.get(name)]:
        raise Unsupported(", ".join(named))
    if model.config.is_encoder_decoder:
        raise Unsupported("an encoder-decoder model")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise Unsupported("torch.distributed")  # other ranks may have to be kept in step
    if len(args) > 1:  # by name, so that nothing is missed below
        kwargs = kwargs | inspect.signature(model.generate).bind_partial(*args).arguments
        args = ()
    kwargs = dict(kwargs)
    streamer = kwargs.pop(
        "streamer", None
    )  # ours: generate would hand it the prompt, and no loop but its own
    # Given a loop, generate drops the tokenizer that it needs for stop strings.
    tokenizer, stop_strings = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
    if (tokenizer is None) != (stop_strings is None):
        raise Unsupported("stop_strings without a tokenizer" if tokenizer is None else "a tokenizer")
    if stop_strings is not None:
        criteria = [*(kwargs.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, stop_strings)]
        kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
    loop = functools.partial(_decode, streamer=streamer, seed=seed)
    return model.generate(*args, custom_generate=loop, **kwargs)


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    streamer: Any,
    seed: int | Sequence[int] | None,
    **model_kwargs: Any,
) -> Any:
    """The loop of ``GenerationMixin._sample``, called by generate in its place.

    Returns:
        int64 ``[B, L]``, or with ``return_dict_in_generate`` a GenerateDecoderOnlyOutput.
    """
    plan = make_plan(logits_processor, generation_config)
    if input_ids.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"the device {input_ids.device.type}")
    vocab_size = model.config.get_text_config().vocab_size
    if vocab_size > _MAX_VOCAB:
        raise Unsupported(f"a vocabulary of {vocab_size}")
    records = _Records(generation_config)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    forward = Forward(model, generation_config, model_kwargs)
    draw = Draw(plan, input_ids, seed, scored=records.scores is not None)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    outputs = forward.prefill(input_ids)
    with forward.decoding():
        while True:
            logits = outputs.logits[:, -1].to(input_ids.device)
            records.add(outputs, logits)
            drawn, scores = draw(logits, input_ids)
            records.add_scores(scores)
            tokens = drawn.tokens.clamp(min=0)  # -1: a row that has failed, which is seen below
            if ends:
                tokens = torch.where(unfinished, tokens, generation_config._pad_token_tensor)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            unfinished = unfinished & ~stopping_criteria(input_ids, records.scores)
            # the one wait of a step for the device
            has_failed, goes_on = torch.stack([drawn.status.any(), unfinished.any()]).tolist()
            if has_failed:
                raise ValueError(_failure(drawn.status.tolist()))
            if streamer is not None:
                streamer.put(tokens.cpu())
            del outputs, logits  # those of the prompts may be large
            if not goes_on:
                break
            outputs = forward.step(input_ids)
    if streamer is not None:
        streamer.end()
    return records.result(input_ids, forward.kwargs)


def _failure(status: Sequence[int]) -> str:
    """What is wrong with the first row that could not be sampled."""
    row = next(row for row, code in enumerate(status) if code)
    why = "NaN or +inf among its logits" if status[row] == 1 else "no token left to draw"
    return f"tokenstep.generate: row {row} has {why}"


class _Records:
    """What ``return_dict_in_generate`` gives beside the tokens: a tuple each, one entry a step, or None."""

    def __init__(self, config: Any) -> None:
        """Nothing recorded yet.

        Args:
            config: The prepared GenerationConfig.
        """
        self._dict = config.return_dict_in_generate

        def wanted(name: str) -> tuple[Any, ...] | None:
            return () if self._dict and getattr(config, name) else None

        self.scores, self.logits = wanted("output_scores"), wanted("output_logits")
        self.attentions, self.hidden_states = wanted("output_attentions"), wanted("output_hidden_states")

    def add(self, outputs: Any, logits: torch.Tensor) -> None:
        """Keeps what a forward pass gave."""
        if self.logits is not None:
            self.logits += (logits.to(torch.float32, copy=True),)
        if self.attentions is not None:
            self.attentions += (outputs.attentions,)
        if self.hidden_states is not None:
            self.hidden_states += (outputs.hidden_states,)

    def add_scores(self, scores: torch.Tensor | None) -> None:
        """Keeps a step's processed scores."""
        if self.scores is not None:
            self.scores += (scores,)

    def result(self, sequences: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
        """The tokens, or the dictionary with them."""
        if not self._dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=cast(Any, sequences),
            scores=self.scores,
            logits=self.logits,
            attentions=self.attentions,
            hidden_states=self.hidden_states,
            past_key_values=model_kwargs.get("past_key_values"),
        )

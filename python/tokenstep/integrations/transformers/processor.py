"""A LogitsProcessor that does transformers' whole chain in one call of the kernel."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from tokenstep.integrations.transformers.chain import Chain

__all__ = ["FusedLogitsProcessor"]


class FusedLogitsProcessor(LogitsProcessor):
    """Repetition penalty, temperature, top-k, top-p and min-p in transformers' order, in place of its five.

    One call of :func:`tokenstep.apply_logits`, with transformers' semantics. For use with
    ``model.generate(…, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, logits_processor=
    [FusedLogitsProcessor(…)])``, so that generate adds none of its own; :func:`generate_with` is faster, as
    it fuses the draw too and keeps histories on the device.
    """

    def __init__(
        self,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        *,
        prompt_ignore_length: int | torch.Tensor | None = None,
    ) -> None:
        """Takes transformers' parameters.

        Args:
            repetition_penalty: Of all ids so far; 1 is off.
            temperature: Above 0.
            top_k: 0 is off.
            top_p: 1 is off.
            min_p: 0 is off.
            prompt_ignore_length: Ids at the start of each row that the penalty leaves alone, such as left
                padding: a number or an int64 tensor ``[B]``, each less than the row's length.

        Raises:
            ValueError: A value out of range.
        """
        for name, value, valid in (
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf")),
            ("temperature", temperature, 0 < temperature < float("inf")),
            ("top_k", top_k, top_k >= 0),
            ("top_p", top_p, 0 <= top_p <= 1),
            ("min_p", min_p, 0 <= min_p <= 1),
        ):
            if not valid:
                raise ValueError(f"tokenstep.FusedLogitsProcessor: {name} = {value!r} is out of range")
        self._chain = Chain(repetition_penalty, temperature, top_k, top_p, min_p)
        self._ignore = prompt_ignore_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """float32 ``[B, V]``, -inf where a token is cut; ``scores`` stay as they are.

        Args:
            input_ids: int64 ``[B, L]``.
            scores: ``[B, V]``, float32, float16 or bfloat16.
        """
        return self._chain.apply(scores, seen_ids(input_ids, self._ignore))


def seen_ids(input_ids: torch.Tensor, ignore: int | torch.Tensor | None) -> torch.Tensor:
    """The histories of a repetition penalty that leaves out the first ``ignore`` ids of each row.

    They are replaced by the row's last id, which the history holds anyway.
    """
    if ignore is None:
        return input_ids
    if isinstance(ignore, int):
        return input_ids[:, ignore:]
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return torch.where(positions < ignore.to(input_ids.device)[:, None], input_ids[:, -1:], input_ids)

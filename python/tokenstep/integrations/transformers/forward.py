"""Forward passes of generate's loop, for the helpers of transformers 4.57 and those of 5.x."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["Forward"]


class Forward:
    """The model of one generate call, which remembers what the next pass needs.

    Attributes:
        kwargs: transformers' ``model_kwargs``: cache, masks, positions.
    """

    def __init__(self, model: Any, config: Any, kwargs: dict[str, Any]) -> None:
        """Nothing is computed yet.

        Args:
            model: A decoder-only model.
            config: The prepared GenerationConfig.
            kwargs: As generate hands them to its decoding method.
        """
        self._model, self._config, self.kwargs = model, config, kwargs
        self._compiled = model._valid_auto_compile_criteria(kwargs, config)

    def prefill(self, input_ids: torch.Tensor) -> Any:
        """The pass over the prompts; its logits end with those of the first new token."""
        model, config = self._model, self._config
        if hasattr(model, "_prefill"):  # 5.x
            return self._after(model._prefill(input_ids, config, self.kwargs))
        self.kwargs = model._get_initial_cache_position(input_ids.shape[1], input_ids.device, self.kwargs)
        if config.prefill_chunk_size is not None:  # leaves the last piece to the next pass
            self.kwargs = model._prefill_chunking(input_ids, config, **self.kwargs)
            return self.step(input_ids)
        inputs = model.prepare_inputs_for_generation(input_ids, **self.kwargs)
        return self._after(model(**inputs, return_dict=True))

    def step(self, input_ids: torch.Tensor) -> Any:
        """The pass over the newest tokens."""
        model, options = self._model, self.kwargs
        if hasattr(model, "_prefill"):
            options = {"next_sequence_length": 1 if self.kwargs["use_cache"] else None, **self.kwargs}
        inputs = model.prepare_inputs_for_generation(input_ids, **options)
        call = model.get_compiled_call(self._config.compile_config) if self._compiled else model
        return self._after(call(**inputs, return_dict=True))

    def decoding(self) -> AbstractContextManager[Any]:
        """What transformers changes in a model while it decodes (5.x)."""
        context = getattr(self._model, "_optimize_model_for_decode", nullcontext)
        entered: AbstractContextManager[Any] = context()
        return entered

    def _after(self, outputs: Any) -> Any:
        self.kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=False
        )
        return outputs

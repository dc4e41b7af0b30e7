"""Which scales a quantised KV cache has: the checkpoint's, 1, or those of a calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenstep.models.config import ModelConfig
from tokenstep.models.decoder import DecoderModel, ForwardBatch
from tokenstep.models.kv_cache import LARGEST_CODES, KVCache, KVScales

CALIBRATION_TOKENS = 512
CALIBRATION_MARGIN = 1.25
"""By so much later tokens may exceed the largest of the calibration before they saturate."""


def choose_scales(model: DecoderModel, dtype: torch.dtype) -> KVScales | None:
    """The scales of a cache of `dtype`: None if it isn't quantised.

    float8_e4m3 takes those of the checkpoint, and without any 1: its steps follow a number's size, and keys
    and values are far from its end (448). int8 has the same step everywhere, so its scales are calibrated.
    """
    if dtype not in LARGEST_CODES:
        return None
    if dtype == torch.int8:
        return calibrate(model, dtype)
    if model.kv_scales is not None:
        return model.kv_scales
    ones = torch.ones((model.config.num_layers, model.config.num_kv_heads), device=model.device)
    return KVScales(ones, ones)


def calibrate(
    model: DecoderModel,
    dtype: torch.dtype,
    num_tokens: int = CALIBRATION_TOKENS,
    margin: float = CALIBRATION_MARGIN,
) -> KVScales:
    """Scales from the largest key and value of each head in one pass over `calibration_ids`.

    The largest times `margin` becomes the largest code. The pass is the model's own, so the same model and
    device give the same scales. A head that is zero throughout gets scale 1.
    """
    config, device = model.config, model.device
    count = min(num_tokens, config.max_position)
    cache = KVCache.allocate(config, 1, count, model.dtype, device)
    model.forward(ForwardBatch.of_prompt(calibration_ids(config, count), device=device), cache)

    def scales(layers: list[Tensor]) -> Tensor:
        largest = torch.stack([layer.abs().amax(dim=(0, 1, 3)).float() for layer in layers])
        return torch.where(largest > 0, largest * (margin / LARGEST_CODES[dtype]), 1.0)

    return KVScales(scales(cache.k), scales(cache.v))


def calibration_ids(config: ModelConfig, count: int) -> list[int]:
    """Fixed token ids from all over the vocabulary, the begin token first where the model has one."""
    state, ids = 1, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)  # Knuth's MMIX generator
        ids.append((state >> 33) % config.vocab_size)
    if config.bos_token_id is not None:
        ids[0] = config.bos_token_id
    return ids

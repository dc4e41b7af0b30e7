"""KV caches of one byte an element under the engine: memory, scales, and everything that shares blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_batch_invariance import requests, run
from tiny_decoder import HEAD_DIM, KV_HEADS, VOCAB, tiny_decoder

from tokenstep.engine import Engine, EngineConfig
from tokenstep.models import DecoderModel, ForwardBatch, KVCache, KVScales
from tokenstep.models.kv_cache import LARGEST_CODES, choose_kv_dtype
from tokenstep.models.kv_scales import calibrate, calibration_ids, choose_scales

QUANTISED = ["float8_e4m3", "int8"]


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return tiny_decoder(torch.float32)


def forward(model: DecoderModel, cache: KVCache, ids: list[int]) -> torch.Tensor:
    """Final hidden states of one pass over `ids` in block 0."""
    return model.forward(ForwardBatch.of_prompt(ids), cache)


@pytest.mark.parametrize(
    ("name", "model_dtype", "expected"),
    [
        ("auto", torch.float16, torch.float16),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("float32", torch.float32, torch.float32),
        ("float8_e4m3", torch.float32, torch.float8_e4m3fn),
        ("int8", torch.bfloat16, torch.int8),
    ],
)
def test_a_name_means_a_dtype(name: str, model_dtype: torch.dtype, expected: torch.dtype) -> None:
    assert choose_kv_dtype(name, model_dtype) == expected


def test_another_float_than_the_models_is_refused_by_name(model: DecoderModel) -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype = 'bfloat16', but the model computes in float32"):
        Engine(model, VOCAB, EngineConfig(kv_cache_dtype="bfloat16", kv_tokens=64))
    with pytest.raises(ValueError, match=r"kv_cache_dtype = 'fp8', expected one of 'auto', 'bfloat16'"):
        EngineConfig(kv_cache_dtype="fp8")


@pytest.mark.parametrize(("name", "share"), [("auto", 1.0), ("float8_e4m3", 0.25), ("int8", 0.25)])
def test_a_cache_takes_the_bytes_of_its_dtype(model: DecoderModel, name: str, share: float) -> None:
    engine = Engine(model, VOCAB, EngineConfig(kv_tokens=128, kv_cache_dtype=name))
    stats = engine.stats()
    assert stats.cache_bytes == share * 4 * 128 * 2 * 2 * KV_HEADS * HEAD_DIM
    assert stats.cache_bytes == sum(
        t.nbytes for part in (engine.runner.cache.k, engine.runner.cache.v) for t in part
    )
    assert stats.blocks_total * stats.block_size == 128


def test_scales_go_with_quantised_caches_alone(model: DecoderModel) -> None:
    scales = choose_scales(model, torch.int8)
    for dtype, given in ((torch.int8, None), (torch.float32, scales)):
        with pytest.raises(ValueError, match="a quantised cache has scales, no other has"):
            KVCache.allocate(model.config, 1, 4, dtype, scales=given)


def test_float8_takes_the_checkpoints_scales_and_else_one(model: DecoderModel) -> None:
    ones = choose_scales(model, torch.float8_e4m3fn)
    assert ones is not None
    assert torch.equal(ones.k, torch.ones(2, KV_HEADS))
    stored = KVScales(torch.full((2, KV_HEADS), 0.5), torch.full((2, KV_HEADS), 0.25))
    with_scales = tiny_decoder(torch.float32)
    with_scales.kv_scales = stored
    assert choose_scales(with_scales, torch.float8_e4m3fn) is stored
    assert choose_scales(with_scales.as_batch_invariant(), torch.float8_e4m3fn) is stored
    engine = Engine(with_scales, VOCAB, EngineConfig(kv_tokens=64, kv_cache_dtype="float8_e4m3"))
    assert engine.runner.cache.scales is stored
    assert choose_scales(model, torch.float32) is None


def test_calibrated_scales_are_the_largest_of_each_head_with_a_margin(model: DecoderModel) -> None:
    ids = calibration_ids(model.config, 200)
    assert ids == calibration_ids(model.config, 200)
    assert len(set(ids)) > 60  # of 97
    plain = KVCache.allocate(model.config, 1, 200)
    forward(model, plain, ids)
    scales = calibrate(model, torch.int8, num_tokens=200, margin=1.5)
    for layer in range(2):
        for stored, found in ((plain.k, scales.k), (plain.v, scales.v)):
            largest = stored[layer][0].abs().amax(dim=(0, 2))
            assert torch.equal(found[layer], largest * (1.5 / 127))
    again = calibrate(model, torch.int8, num_tokens=200, margin=1.5)
    assert torch.equal(again.k, scales.k)
    assert torch.equal(again.v, scales.v)


def test_a_head_that_is_always_zero_has_a_scale_of_one() -> None:
    model = tiny_decoder(torch.float32)
    model.layers[1].qkv.weight[-HEAD_DIM:] = 0.0  # the last head's values
    scales = calibrate(model, torch.int8)
    assert scales.v[1, -1] == 1.0
    assert (scales.v[1, :-1] != 1.0).all()


@pytest.mark.parametrize("name", QUANTISED)
def test_codes_are_keys_divided_by_their_heads_scale(model: DecoderModel, name: str) -> None:
    dtype = choose_kv_dtype(name, torch.float32)
    generator = torch.Generator().manual_seed(1)
    k, v = (0.01 + torch.rand((2, KV_HEADS), generator=generator) / 8 for _ in range(2))
    scales = KVScales(k, v)
    ids = calibration_ids(model.config, 24)
    plain, quantised = (
        KVCache.allocate(model.config, 1, 24, chosen, scales=given)
        for chosen, given in ((torch.float32, None), (dtype, scales))
    )
    forward(model, plain, ids)
    forward(model, quantised, ids)
    # the first layer's keys and values don't depend on what attention reads
    for exact, codes, scale in ((plain.k, quantised.k, k), (plain.v, quantised.v, v)):
        wanted = exact[0] / scale[0, :, None]
        if dtype == torch.int8:
            rounded = wanted.round().clamp(-128, 127)
        else:
            rounded = wanted.clamp(-LARGEST_CODES[dtype], LARGEST_CODES[dtype]).to(dtype).float()
        assert torch.equal(codes[0].float(), rounded)


def test_each_layer_has_its_own_scales(model: DecoderModel) -> None:
    ids = calibration_ids(model.config, 24)
    caches = []
    for factor in (1.0, 2.0):
        k, v = (torch.full((2, KV_HEADS), 0.125) for _ in "kv")
        k[1] *= factor
        v[1] *= factor
        caches.append(KVCache.allocate(model.config, 1, 24, torch.float8_e4m3fn, scales=KVScales(k, v)))
        forward(model, caches[-1], ids)
    for once, twice in ((caches[0].k, caches[1].k), (caches[0].v, caches[1].v)):
        assert torch.equal(once[0].float(), twice[0].float())
        assert torch.allclose(once[1].float() / 2, twice[1].float(), rtol=0, atol=2**-9)  # near 0


@pytest.mark.parametrize(("name", "tolerance"), [("float8_e4m3", 0.25), ("int8", 0.08)])
def test_the_model_with_a_quantised_cache_stays_close_to_itself(
    model: DecoderModel, name: str, tolerance: float
) -> None:
    """Random weights with sharp attention amplify: seen are 0.18 and 0.054."""
    dtype = choose_kv_dtype(name, torch.float32)
    ids = [(11 * i) % VOCAB for i in range(100)]
    plain = KVCache.allocate(model.config, 1, 100)
    quantised = KVCache.allocate(model.config, 1, 100, dtype, scales=choose_scales(model, dtype))
    exact, near = (model.logits(forward(model, cache, ids)) for cache in (plain, quantised))
    error = (exact - near).norm() / exact.norm()
    assert 0 < error < tolerance


@pytest.mark.parametrize("name", QUANTISED)
def test_sharing_preemption_and_pieces_change_no_bit(name: str) -> None:
    """The requests of test_batch_invariance: forks, a common prefix, too few blocks, small pieces."""
    model = tiny_decoder(torch.bfloat16, form="q4_1")

    def build(**sizes: Any) -> Engine:
        config = {"max_batch": 16, "kv_tokens": 2048, "batch_invariant": True, "kv_cache_dtype": name}
        return Engine(model, VOCAB, EngineConfig(**{**config, **sizes}))

    alone = [run(build(prefix_cache=False), [request])[0] for request in requests()]
    roomy = build(prefill_tokens=7, mixed_tokens=5)
    assert run(roomy, requests()) == alone
    assert run(roomy, requests()) == alone
    assert roomy.counters.cached_tokens >= 64
    tight = build(kv_tokens=112, max_batch=5, mixed_tokens=40, block_size=4)
    assert run(tight, requests()) == alone
    assert tight.counters.preemptions > 0
    plain = build(kv_cache_dtype="auto", prefix_cache=False)
    assert run(plain, requests()[:1]) != alone[:1]

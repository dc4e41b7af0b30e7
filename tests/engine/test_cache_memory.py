"""What the KV cache takes of the memory of a machine or a GPU."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_decoder as tiny
import torch
from history_model import CONFIG, VOCAB, HistoryModel
from tiny_decoder import tiny_decoder

from tokenstep.engine import Engine, EngineConfig
from tokenstep.engine.memory import (
    GpuMemory,
    check_room,
    default_cpu_tokens,
    default_gpu_tokens,
    largest_step,
)
from tokenstep.models import DecoderModel, ForwardBatch, KVCache, NotEnoughMemory, free_memory
from tokenstep.models.free_memory import free_host_bytes

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
    ("max_batch", "free", "tokens"),
    [(2, 1 << 30, 192), (2, 4 * 64 * 100, 100), (4, 4 * 64 * 384, 384), (3, None, 288)],
)
def test_the_default_on_a_cpu_is_a_full_context_each_within_a_quarter_of_what_is_free(
    max_batch: int, free: int | None, tokens: int
) -> None:
    config = EngineConfig(max_batch=max_batch)
    assert default_cpu_tokens(CONFIG, 64, free, config) == tokens


def test_one_sequence_may_take_all_that_is_free_on_a_cpu_and_no_more() -> None:
    config = EngineConfig(max_batch=4)
    assert default_cpu_tokens(CONFIG, 64, 64 * 96, config) == 96
    with pytest.raises(NotEnoughMemory, match=r"of 96 tokens needs 0\.0 MB, 0\.0 MB are free on the CPU"):
        default_cpu_tokens(CONFIG, 64, 64 * 96 - 1, config)
    long = replace(CONFIG, max_position=1 << 17)
    assert default_cpu_tokens(long, 1 << 20, 3 << 30, config) == 2048  # not the 768 of a quarter
    with pytest.raises(NotEnoughMemory, match=r"2,048 tokens needs 2\.1 GB, 1\.1 GB are free"):
        default_cpu_tokens(long, 1 << 20, 1 << 30, config)


GB = 10**9
GPU = GpuMemory("cuda:0", total=80 * GB, free=60 * GB, weights=16 * GB, step=2 * GB, libraries=GB)


@pytest.mark.parametrize(
    ("changes", "utilization", "left"),
    [
        ({}, 0.9, 72 - 16 - 1 - 2),
        ({}, 0.5, 40 - 16 - 1 - 2),
        ({"free": 30 * GB}, 0.9, 30 - 2),  # others use the GPU too
        ({"weights": 79 * GB}, 0.9, 72 - 79 - 1 - 2),
    ],
)
def test_a_gpus_share_is_less_weights_libraries_and_the_largest_step_and_at_most_what_is_free(
    changes: dict[str, int], utilization: float, left: int
) -> None:
    assert replace(GPU, **changes).left(utilization) == left * GB


def test_the_default_on_a_gpu_fills_that_share_with_whole_blocks() -> None:
    model = replace(CONFIG, max_position=1 << 17)
    config = EngineConfig(max_batch=1, block_size=16)
    assert default_gpu_tokens(model, 131_072, GPU, config) == 53 * GB // (16 * 131_072) * 16
    short = replace(GPU, free=2 * GB + 131_072 * 2048)
    assert default_gpu_tokens(model, 131_072, short, config) == 2048


def test_no_room_for_one_sequence_is_an_error_with_all_numbers() -> None:
    model = replace(CONFIG, max_position=1 << 17)
    memory = replace(GPU, total=24 * GB, free=8 * GB, weights=int(18.9 * GB), step=int(1.5 * GB))
    with pytest.raises(NotEnoughMemory) as caught:
        default_gpu_tokens(model, 131_072, memory, EngineConfig())
    assert str(caught.value) == (
        "tokenstep.engine: the KV cache of one sequence, 2,048 tokens, needs 0.3 GB; of 0.9 × 24.0 GB on"
        " cuda:0 (8.0 GB free) the weights' 18.9 GB and the largest step's 2.5 GB leave 0.2 GB: raise"
        " gpu_memory_utilization, set a smaller max_batch or kv_tokens, or kv_cache_dtype='float8_e4m3'"
    )
    assert default_gpu_tokens(replace(model, max_position=1024), 131_072, memory, EngineConfig()) >= 1024


def test_a_pool_that_was_asked_for_must_be_free() -> None:
    check_room(100, 64, 6400, "cuda:1")
    with pytest.raises(
        NotEnoughMemory, match=r"of 2,000,000 tokens needs 0\.1 GB, 64\.0 MB are free on cuda:1"
    ):
        check_room(2_000_000, 64, 64_000_000, "cuda:1")


def test_a_pool_beyond_the_address_space_is_an_error_with_numbers() -> None:
    with pytest.raises(NotEnoughMemory, match=r"cpu has no room for a KV cache of .* tokens in float32, "):
        Engine(HistoryModel(), VOCAB, EngineConfig(kv_tokens=1 << 42))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_largest_step_has_all_tokens_of_a_step_and_the_logits_of_a_batch(
    batch_invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_decoder(torch.bfloat16)
    if batch_invariant:
        model = model.as_batch_invariant()
    seen: list[tuple[int, ...]] = []
    forward, logits = DecoderModel.forward, DecoderModel.logits

    def note_tokens(self: DecoderModel, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        seen.append((len(batch.tokens), batch.max_query_len))
        return forward(self, batch, cache)

    def note_rows(self: DecoderModel, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(hidden.shape))
        return logits(self, hidden)

    monkeypatch.setattr(DecoderModel, "forward", note_tokens)
    monkeypatch.setattr(DecoderModel, "logits", note_rows)
    for config in (
        EngineConfig(max_batch=100, prefill_tokens=77),
        EngineConfig(max_batch=2, mixed_tokens=600),
    ):
        sampler = largest_step(model, tiny.VOCAB, config)()
        assert sampler.max_rows == 2 * max(config.max_batch, 64)
    prompt = max(77, EngineConfig.mixed_tokens)
    assert seen == [(prompt, prompt), (100, tiny.HIDDEN), (256, 256), (64, tiny.HIDDEN)]  # a whole context


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in the place of the system's: 20 MB are available, no group has a limit."""
    (tmp_path / "meminfo").write_text("MemTotal: 64000 kB\nMemAvailable:   20000 kB\nHugePages_Total: 3\n")
    (tmp_path / "of_process").write_text("12:cpu:/\n4:memory:/job/one\n0::/job/one\n")
    (tmp_path / "groups").mkdir()
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "CGROUP_OF_PROCESS", tmp_path / "of_process")
    monkeypatch.setattr(free_memory, "CGROUP_ROOT", tmp_path / "groups")
    return tmp_path / "groups"


NEW = ("memory.max", "memory.current", "inactive_file")
OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def limit(folder: Path, names: tuple[str, str, str], most: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (most, str(used), ""), strict=True):
        if text:
            (folder / name).write_text(text + "\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("folder", "names"),
    [("", NEW), ("job", NEW), ("job/one", NEW), ("memory", OLD), ("memory/job/one", OLD)],
)
def test_free_memory_is_what_every_group_around_the_process_leaves(
    system: Path, folder: str, names: tuple[str, str, str]
) -> None:
    assert free_host_bytes() == 20_000 * 1024
    limit(system / folder, names, "10000000", 7_000_000, 1_000_000)  # files in memory can go
    assert free_host_bytes() == 4_000_000
    limit(system / folder, names, "10000000", 12_000_000, 0)
    assert free_host_bytes() == 0
    for none in ("max", str((1 << 63) - 4096), "words"):
        limit(system / folder, names, none, 7_000_000, 0)
        assert free_host_bytes() == 20_000 * 1024


def test_where_the_system_says_nothing_a_cache_still_has_a_size(system: Path) -> None:
    free_memory.MEMINFO.unlink()
    free_memory.CGROUP_OF_PROCESS.unlink()
    assert free_host_bytes() is None
    assert Engine(HistoryModel(), VOCAB, EngineConfig(max_batch=2)).max_length == 96

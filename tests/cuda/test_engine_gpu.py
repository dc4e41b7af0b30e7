"""The engine on a GPU: graphs that wait for nothing, and the CPU's tokens wherever rounding can't decide."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="needs the extra engine")

import torch
from test_batch_invariance import PROMPTS, requests, run
from tiny_decoder import VOCAB, tiny_decoder

from tokenstep.engine import Engine, EngineConfig, PromptOutput, Request, TokenOutput
from tokenstep.sampling import SamplingParams, sample

pytestmark = pytest.mark.cuda
LOGIT_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15}  # float32 products may be in TF32
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaMalloc", "cudaHostAlloc"}


def build(device: str, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Engine:
    config = {"max_batch": 8, "kv_tokens": 2048, "block_size": 64, **sizes}
    return Engine(tiny_decoder(dtype, device=device), VOCAB, EngineConfig(**config))


def steady(engine: Engine, count: int = 5) -> None:
    """Steps until `count` sequences decode by replays of a captured step."""
    for index in range(count):
        params = SamplingParams(temperature=1.0, repetition_penalty=1.1, seed=index, logprobs=2)
        engine.add(Request(prompt=[index, 3], choices=[params], max_tokens=60, logprobs=2))
    for _ in range(6):
        engine.step()
    assert all(choice.is_decoding for choice in engine.scheduler.running)


def test_launching_a_step_synchronises_nowhere() -> None:
    engine = build("cuda")
    steady(engine)
    choices = engine.scheduler.running
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        unread = [engine.runner.decode(choices) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(status == 0 for step in unread for status in step.read().status)


def test_a_step_of_the_engine_is_one_replay_and_waits_for_one_event() -> None:
    engine, steps = build("cuda"), 8
    steady(engine)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace, torch.profiler.record_function("steps"):
        for _ in range(steps):
            engine.step()
    events = list(trace.events())
    (whole,) = [
        event.time_range
        for event in events
        if event.name == "steps" and event.device_type == torch.autograd.DeviceType.CPU
    ]
    names = [
        event.name
        for event in events
        if whole.start <= event.time_range.start and event.time_range.end <= whole.end
    ]
    assert not WAITS.intersection(names)
    assert names.count("cudaGraphLaunch") == steps
    assert names.count("cudaEventSynchronize") <= steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_read_late_give_the_bits_of_calls_read_at_once(dtype: torch.dtype) -> None:
    captured = build("cuda", dtype, batch_invariant=True)
    called = build("cuda", dtype, batch_invariant=True, reads_late=False, cuda_graphs=False)
    assert captured.reads_late
    assert run(captured, requests()) == run(called, requests())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_cpus_up_to_rounding_and_tokens_where_rounding_cannot_decide(
    dtype: torch.dtype,
) -> None:
    tolerance = LOGIT_TOLERANCE[dtype]
    greedy = SamplingParams(temperature=0.0, logprobs=2)
    found = []
    for device in ("cpu", "cuda"):
        engine = build(device, dtype)
        wanted = [
            Request(prompt=prompt, choices=[greedy], max_tokens=24, logprobs=2, prompt_logits=True)
            for prompt in PROMPTS
        ]
        for request in wanted:
            engine.add(request)
        outputs = [output for _ in range(200) if engine.has_work for output in engine.step()]
        found.append([[output for output in outputs if output.request is request] for request in wanted])
    for on_cpu, on_gpu in zip(*found, strict=True):
        first, other = on_cpu[0], on_gpu[0]
        assert isinstance(first, PromptOutput)
        assert isinstance(other, PromptOutput)
        assert first.logits is not None
        assert abs(first.logits - other.logits).max() < tolerance
        for ours, theirs in zip(on_cpu[1:], on_gpu[1:], strict=True):
            assert isinstance(ours, TokenOutput)
            assert isinstance(theirs, TokenOutput)
            assert ours.logprobs is not None
            best, second = ours.logprobs.top_logprobs
            if best - second <= 2 * tolerance:
                break  # from here on the sequences may differ
            assert ours.token == theirs.token


def test_the_gpu_draws_what_the_cpu_draws_from_the_same_logits() -> None:
    engine = build("cuda", torch.float32)
    for seed in range(20):
        params = SamplingParams(temperature=1.2, top_p=0.95, top_k=40, seed=seed)
        prompt = [seed, 2 * seed + 1, 5]
        engine.add(Request(prompt=prompt, choices=[params], max_tokens=1, prompt_logits=True))
    outputs = [output for _ in range(50) if engine.has_work for output in engine.step()]
    logits = {output.request: output.logits for output in outputs if isinstance(output, PromptOutput)}
    drawn = [output for output in outputs if isinstance(output, TokenOutput)]
    assert len(drawn) == 20
    for output in drawn:
        params = output.request.choices[0]
        row = logits[output.request]
        assert row is not None
        again = sample(
            row[None], temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
            seed=params.seed,
        )  # fmt: skip
        assert output.token == int(again.tokens[0])

"""What only a GPU can show of the sampler: graphs, streams, devices, and very many rows."""

import numpy as np
import pytest
from sample_cases import DTYPES, assert_same, random_case, random_params
from sample_device import Gpu, as_numpy, sample

from tokenstep import sampling as ts

pytestmark = pytest.mark.cuda
ROWS, VOCAB = 6, 5000


@pytest.fixture
def gpu():
    chosen = Gpu()
    yield chosen
    chosen.close()


def logits_on(device, rng, rows=ROWS):
    import torch

    values = rng.standard_normal((rows, VOCAB)).astype(np.float32) * 3
    return values, torch.as_tensor(values).to(device)


def test_a_captured_step_follows_admissions_and_releases_between_replays(gpu):
    import torch

    rng = np.random.default_rng(70)
    ours, cpu = ts.Sampler(ROWS, VOCAB, "cuda"), ts.Sampler(ROWS, VOCAB)
    for row in range(ROWS):
        for sampler in (ours, cpu):
            sampler.admit(row, ts.SamplingParams(seed=row, logprobs=5))
    values, logits = logits_on("cuda", rng)
    out = ours.step(logits)  # warms up, and is the shape of what follows
    cpu.step(values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step(logits, out=out)
    for _ in range(30):
        row = int(rng.integers(ROWS))
        params, prompt = random_params(rng, VOCAB), rng.integers(0, VOCAB, 50).tolist()
        for sampler in (ours, cpu):  # histories and biases that were not there at the capture
            sampler.admit(row, params, prompt)
        values, fresh = logits_on("cuda", rng)
        logits.copy_(fresh)
        graph.replay()
        want = cpu.step(values)
        got = [as_numpy(a) for a in out]
        assert got[0].tolist() == want.tokens.tolist()
        assert got[1].tolist() == want.status.tolist()


def test_a_captured_step_sees_the_rows_that_the_device_holds_when_it_is_replayed(gpu):
    import torch

    rng = np.random.default_rng(71)
    ours, cpu = ts.Sampler(ROWS, VOCAB, "cuda"), ts.Sampler(ROWS, VOCAB)
    for row in range(ROWS):
        for sampler in (ours, cpu):
            sampler.admit(row, ts.SamplingParams(seed=row, presence_penalty=1.0))
    rows = torch.zeros(3, dtype=torch.int32, device="cuda")
    rows.copy_(torch.tensor([0, 1, 2]))
    values, logits = logits_on("cuda", rng, 3)
    out = ours.step(logits, rows)
    cpu.step(values, np.array([0, 1, 2], np.int32))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step(logits, rows, out=out)
    for _ in range(10):
        chosen = rng.permutation(ROWS)[:3].astype(np.int32)
        rows.copy_(torch.as_tensor(chosen))
        graph.replay()
        assert as_numpy(out.tokens).tolist() == cpu.step(values, chosen).tokens.tolist()


def test_what_copies_host_values_refuses_to_be_captured(gpu):
    import torch

    logits = torch.zeros(2, 100, device="cuda")
    sampler = ts.Sampler(2, 100, "cuda")
    with pytest.raises(RuntimeError, match="the stream is being captured"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ts.sample(logits, seed=1)
    with pytest.raises(RuntimeError, match="the stream is being captured"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            sampler.admit(0, ts.SamplingParams())


def test_work_goes_to_the_stream_that_is_current_at_each_call(gpu):
    import torch

    values, logits = logits_on("cuda", np.random.default_rng(72))
    want = ts.sample(values, temperature=0.0).tokens.tolist()
    stream, big = torch.cuda.Stream(), torch.randn(8192, 8192, device="cuda")
    with torch.cuda.stream(stream):
        late = torch.zeros_like(logits)
        for _ in range(20):  # the logits come late: whoever does not wait for them sees zeros
            big = (big @ big).clamp(-1, 1)
        late.copy_(logits + 0.0 * big[0, 0])
        out = ts.sample(late, temperature=0.0)
    stream.synchronize()
    assert as_numpy(out.tokens).tolist() == want


def test_work_goes_to_the_device_of_the_logits_not_the_current_one(gpu):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    values, logits = logits_on("cuda:1", np.random.default_rng(73))
    sampler = ts.Sampler(ROWS, VOCAB, "cuda:1")
    for row in range(ROWS):
        sampler.admit(row, ts.SamplingParams(seed=row, repetition_penalty=1.2), [1, 2, 3])
    with torch.cuda.device(0):
        out, step = ts.sample(logits, seed=4), sampler.step(logits)
        assert torch.cuda.current_device() == 0
    assert out.tokens.device == step.tokens.device == logits.device
    assert as_numpy(out.tokens).tolist() == ts.sample(values, seed=4).tokens.tolist()
    with pytest.raises(ValueError, match="logits is on cuda:0, expected cuda:1 like the sampler"):
        sampler.step(logits.to("cuda:0"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_thousands_of_rows_equal_the_cpu(gpu, dtype):
    for i, (vocab_size, rows) in enumerate([(1000, 400), (32003, 64), (128256, 16), (1 << 18, 8)]):
        case = random_case(np.random.default_rng([74, i]), dtype, vocab_size, rows)
        want = ts.sample(case.logits, check=False, **case.arguments)
        assert_same(sample(gpu, case.logits, case.arguments), want, f"{vocab_size} tokens,")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_thousand_rows_equal_the_cpu(gpu, dtype):
    for i in range(34):
        case = random_case(np.random.default_rng([75, i]), dtype, 5000, 1000)
        want = ts.sample(case.logits, check=False, **case.arguments)
        assert_same(sample(gpu, case.logits, case.arguments), want, f"batch {i},")

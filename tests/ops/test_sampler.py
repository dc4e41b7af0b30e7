"""Sampler: step by step what sample() gives with the same parameters, explicit history and position."""

import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sample_cases import PRESETS, array_of, assert_same, bitmask, history, random_params, row_of, same_floats

from tokenstep import sampling as ts

ROWS, VOCAB = 6, 70
NAMES = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "substream", "logit_bias", "logprobs", "penalty_last_n",
)  # fmt: skip


class Request:
    """What an engine would keep to call sample() with: the model that the sampler is held to."""

    def __init__(self, params, prompt, output, semantics="tokenstep"):
        self.params, self.prompt, self.output = params, list(prompt), list(output)
        self.semantics = semantics
        self.position = len(self.output)

    def expected(self, logits, mask, mode):
        """sample() of this row alone; the outputs of one row, without the batch axis."""
        arguments = {name: getattr(self.params, name) for name in NAMES}
        out = ts.sample(
            logits,
            prompt_tokens=[self.prompt],
            output_tokens=[self.output],
            position=self.position,
            token_bitmask=mask,
            logprobs_mode=mode,
            check=False,
            semantics=self.semantics,
            **arguments,
        )
        if out.status[0] == 0:
            self.output.append(int(out.tokens[0]))
            self.position += 1
        return [None if a is None else a[0] for a in out]


def assert_row(out, b, want, width):
    token, status, logprob, rank, top_tokens, top_logprobs = want
    assert out.tokens[b] == token
    assert out.status[b] == status
    if out.logprobs is None:
        assert logprob is None
        return
    if logprob is None:  # this row did not ask, another did
        logprob, rank, top_tokens, top_logprobs = np.float32(np.nan), 0, np.array([]), np.array([])
    missing = width - len(top_tokens)
    assert same_floats(out.logprobs[b : b + 1], np.array([logprob], np.float32)).all()
    assert out.ranks[b] == rank
    assert out.top_tokens[b].tolist() == top_tokens.tolist() + [-1] * missing
    padded = np.append(top_logprobs, [np.nan] * missing).astype(np.float32)
    assert same_floats(out.top_logprobs[b].copy(), padded).all()


class SamplerMachine(RuleBasedStateMachine):
    """Random admissions, steps and releases."""

    def __init__(self):
        super().__init__()
        self.requests = {}

    @initialize(semantics=st.sampled_from(("tokenstep", "tokenstep", *PRESETS, "llama.cpp")))
    def make_sampler(self, semantics):
        self.semantics = semantics
        self.sampler = ts.Sampler(ROWS, VOCAB, semantics=semantics)

    @rule(row=st.integers(0, ROWS - 1), seed=st.integers(0, 1 << 30))
    def admit(self, row, seed):
        rng = np.random.default_rng(seed)
        params = random_params(rng, VOCAB, self.semantics)
        prompt, output = history(rng, VOCAB, 20), history(rng, VOCAB, 10)
        self.sampler.admit(row, params, prompt, output)
        self.requests[row] = Request(params, prompt, output, self.semantics)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data):
        row = data.draw(st.sampled_from(sorted(self.requests)))
        self.sampler.release(row)
        del self.requests[row]

    @precondition(lambda self: self.requests)
    @rule(seed=st.integers(0, 1 << 30))
    def step_some_rows_in_any_order(self, seed):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(sorted(self.requests))[: rng.integers(1, len(self.requests) + 1)]
        self.check_step(rng, rows, rows.astype(np.int32))

    @precondition(lambda self: 0 in self.requests)
    @rule(seed=st.integers(0, 1 << 30))
    def step_the_first_rows(self, seed):
        count = next(n for n in range(1, ROWS + 1) if n not in self.requests)
        self.check_step(np.random.default_rng(seed), range(count), None)

    def check_step(self, rng, rows, row_array):
        kinds = rng.choice(["normal", "peaked", "few_values", "some_banned", "nan", "all_banned"], len(rows))
        values = np.stack([row_of(rng, kind, VOCAB) for kind in kinds])
        logits, _ = array_of(values, str(rng.choice(["float32", "float16"])))
        mask = bitmask(rng, len(rows), VOCAB) if rng.random() < 0.4 else None
        mode = str(rng.choice(["raw", "processed"]))
        wanted = [self.requests[int(r)].params.logprobs for r in rows]
        width = max((n for n in wanted if n is not None), default=-1)
        out = None
        if rng.random() < 0.5:
            width = width if width < 0 else min(20, width + int(rng.integers(0, 3)))
            out = new_output(len(rows), width)
        got = self.sampler.step(logits, row_array, mask, out, logprobs_mode=mode)
        assert out is None or got is out
        for b, row in enumerate(rows):
            row_mask = None if mask is None else mask[b : b + 1]
            assert_row(got, b, self.requests[int(row)].expected(logits[b : b + 1], row_mask, mode), width)

    @invariant()
    def sizes_stay(self):
        assert (self.sampler.max_rows, self.sampler.vocab_size) == (ROWS, VOCAB)


def new_output(rows, width):
    """Arrays for ``out`` full of rubbish; width -1: no log probabilities."""
    tokens, status = np.full(rows, 77, np.int64), np.full(rows, 77, np.int32)
    if width < 0:
        return ts.SampleOutput(tokens, status)
    return ts.SampleOutput(
        tokens,
        status,
        np.full(rows, 77, np.float32),
        np.full(rows, 77, np.int32),
        np.full((rows, width), 77, np.int64),
        np.full((rows, width), 77, np.float32),
    )


TestSamplerEqualsSampleWithExplicitHistory = SamplerMachine.TestCase
TestSamplerEqualsSampleWithExplicitHistory.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("vocab_size", [1, 33, 1000, 40000])
def test_a_long_generation_equals_sample_with_explicit_history(vocab_size):
    rng = np.random.default_rng([40, vocab_size])
    sampler = ts.Sampler(3, vocab_size)
    params = ts.SamplingParams(
        0.9, top_k=40, repetition_penalty=1.3, presence_penalty=0.1, frequency_penalty=0.2, seed=4, logprobs=3
    )
    requests = [Request(params, history(rng, vocab_size, 50), []) for _ in range(3)]
    for row, request in enumerate(requests):
        sampler.admit(row, params, request.prompt)
    for _ in range(60):
        logits = rng.standard_normal((3, vocab_size)).astype(np.float32) * 2
        out = sampler.step(logits)
        for row, request in enumerate(requests):
            arguments = {n: getattr(params, n) for n in NAMES}
            want = ts.sample(
                logits[row : row + 1],
                prompt_tokens=[request.prompt],
                output_tokens=[request.output],
                position=request.position,
                **arguments,
            )
            assert_same([a[row : row + 1] for a in out], want)
            request.output.append(int(out.tokens[row]))
            request.position += 1


def test_a_request_that_goes_on_in_another_sampler_draws_the_same_tokens():
    rng = np.random.default_rng(41)
    logits = rng.standard_normal((10, 1, VOCAB)).astype(np.float32)
    params = ts.SamplingParams(seed=3, repetition_penalty=1.4, frequency_penalty=0.3)
    whole = ts.Sampler(1, VOCAB)
    whole.admit(0, params, [1, 2, 3])
    tokens = [int(whole.step(x).tokens[0]) for x in logits]
    for cut in (0, 1, 5, 9):
        rest = ts.Sampler(2, VOCAB)
        rest.admit(1, params, [1, 2, 3], tokens[:cut])
        row = np.array([1], np.int32)
        assert [int(rest.step(x, row).tokens[0]) for x in logits[cut:]] == tokens[cut:]


@pytest.mark.parametrize("last_n", [1, 2, 7, 64, -1])
def test_a_window_of_the_last_tokens_moves_on_with_the_row(last_n):
    rng = np.random.default_rng([45, last_n + 1])
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    params = ts.SamplingParams(0.9, **penalties, seed=4, penalty_last_n=last_n)
    sampler = ts.Sampler(2, 30, semantics="llama.cpp")
    request = Request(params, history(rng, 30, 9), [], "llama.cpp")
    for begun in range(2):  # the second time in a slot whose lists are full
        sampler.admit(1, params, request.prompt, request.output)
        for _ in range(150):
            logits = rng.standard_normal((1, 30)).astype(np.float32)
            out = sampler.step(logits, np.array([1], np.int32))
            assert_row(out, 0, request.expected(logits, None, "raw"), -1)
        assert request.position == 150 * (begun + 1)


def test_a_row_without_a_seed_draws_entropy_once_when_it_is_admitted():
    sampler, logits = ts.Sampler(40, VOCAB), np.zeros((40, VOCAB), np.float32)
    for row in range(40):
        sampler.admit(row, ts.SamplingParams())
    assert len(set(sampler.step(logits).tokens.tolist())) > 8


def test_rows_do_not_see_each_other_s_history():
    sampler = ts.Sampler(2, 5)
    greedy = ts.SamplingParams(temperature=0, presence_penalty=5.0)
    for row in range(2):
        sampler.admit(row, greedy)
    logits = np.array([[5, 4, 3, 2, 1.0]], np.float32)
    first = np.array([0], np.int32)
    assert [int(sampler.step(logits, first).tokens[0]) for _ in range(4)] == [0, 1, 2, 3]
    assert int(sampler.step(logits, np.array([1], np.int32)).tokens[0]) == 0
    sampler.release(0)
    sampler.admit(0, greedy)
    assert int(sampler.step(logits, first).tokens[0]) == 0, (
        "a row that is admitted again starts without history"
    )


def test_a_row_that_cannot_be_sampled_keeps_its_history_and_position():
    params = ts.SamplingParams(seed=5, repetition_penalty=1.5)
    sampler, twin = ts.Sampler(2, VOCAB), ts.Sampler(2, VOCAB)
    for s in (sampler, twin):
        for row in range(2):
            s.admit(row, params, [1])
    rng = np.random.default_rng(42)
    bad = rng.standard_normal((2, VOCAB)).astype(np.float32)
    bad[0, 3] = np.nan
    assert sampler.step(bad).status.tolist() == [1, 0]
    twin.step(bad[1:], np.array([1], np.int32))
    for _ in range(5):
        logits = rng.standard_normal((2, VOCAB)).astype(np.float32)
        assert np.array_equal(sampler.step(logits).tokens, twin.step(logits).tokens)


def test_torch_logits_rows_and_out_stay_torch():
    torch = pytest.importorskip("torch")
    sampler, twin = ts.Sampler(4, VOCAB), ts.Sampler(4, VOCAB)
    for s in (sampler, twin):
        for row in range(4):
            s.admit(row, ts.SamplingParams(seed=row, frequency_penalty=0.5, logprobs=2))
    x = torch.randn(3, VOCAB)
    rows = torch.tensor([3, 0, 2], dtype=torch.int32)
    out = sampler.step(x, rows)
    assert all(type(a) is torch.Tensor for a in out)
    assert_same(out, twin.step(x.numpy(), rows.numpy()))
    before = [a.data_ptr() for a in out]
    assert sampler.step(x, rows, None, out) is out
    assert [a.data_ptr() for a in out] == before
    assert_same(out, twin.step(x.numpy(), rows.numpy()))


def test_no_rows_are_a_step_too():
    torch = pytest.importorskip("torch")
    out = ts.Sampler(2, VOCAB).step(torch.zeros(0, VOCAB))
    assert out.tokens.shape == (0,)


def test_biases_of_many_admissions_do_not_mix():
    # Enough turnover that the sampler's bias storage is compacted several times.
    rng = np.random.default_rng(43)
    sampler = ts.Sampler(8, 2000)
    want = {}
    logits = np.zeros((1, 2000), np.float32)
    for _ in range(400):
        row = int(rng.integers(8))
        ids = rng.choice(2000, rng.integers(0, 300), replace=False)
        bias = {int(i): float(v) for i, v in zip(ids, rng.normal(size=len(ids)), strict=True)}
        sampler.admit(row, ts.SamplingParams(temperature=0, logit_bias=bias))
        want[row] = max(
            [(v, -i) for i, v in bias.items() if v > 0] or [(0.0, -min(set(range(2000)) - set(bias)))]
        )
        for r, (_, negative_id) in want.items():
            assert sampler.step(logits, np.array([r], np.int32)).tokens[0] == -negative_id


def test_parameters_are_frozen_values():
    params = ts.SamplingParams(temperature=0.5, seed=1)
    assert params == ts.SamplingParams(temperature=0.5, seed=1)
    with pytest.raises(AttributeError):
        params.temperature = 1.0


def test_one_thread_at_a_time_is_enforced_or_served():
    torch = pytest.importorskip("torch")
    sampler = ts.Sampler(4, 50_000)
    for row in range(4):
        sampler.admit(row, ts.SamplingParams(seed=1, repetition_penalty=1.2))
    x, errors, done = torch.randn(4, 50_000), [], []

    def work():
        for _ in range(50):
            try:
                done.append(sampler.step(x).status.tolist())
            except ValueError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(s == [0] * 4 for s in done)
    assert all("in use by another thread" in e for e in errors)
    assert sampler.step(x).status.tolist() == [0] * 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_history_takes_no_memory_without_penalties_and_only_touched_pages_with_them():
    def sizes():
        with open("/proc/self/statm") as file:
            return [int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in file.read().split()[:2]]

    rows, vocab_size, mib = 256, 1 << 18, 1 << 20
    logits = np.zeros((rows, vocab_size), np.float16)
    virtual, resident = sizes()
    sampler = ts.Sampler(rows, vocab_size)
    for row in range(rows):
        sampler.admit(row, ts.SamplingParams(seed=1), list(range(100)))
    sampler.step(logits)
    assert sizes()[0] - virtual < 64 * mib
    sampler.admit(0, ts.SamplingParams(repetition_penalty=2.0), list(range(100)))
    assert sizes()[1] - resident < 64 * mib
    assert sizes()[0] - virtual <= 8 * rows * vocab_size + 64 * mib

"""Sampler on the device: in lockstep with one on the CPU through admissions, steps and releases."""

import numpy as np
import pytest
from sample_cases import array_of, assert_same, bitmask, history, random_params, row_of
from sample_device import as_numpy

from tokenstep import sampling as ts

ROWS, VOCAB = 6, 300
KINDS = ("normal", "peaked", "few_values", "some_banned", "nan", "all_banned")


class Twins:
    """A sampler on the device and one on the CPU, to which the same happens."""

    def __init__(self, device, max_rows=ROWS, vocab_size=VOCAB, semantics="tokenstep"):
        self.device, self.max_rows, self.vocab_size = device, max_rows, vocab_size
        self.ours = device.sampler(max_rows, vocab_size, semantics)
        self.cpu = ts.Sampler(max_rows, vocab_size, semantics=semantics)

    def admit(self, row, *arguments):
        for sampler in (self.ours, self.cpu):
            sampler.admit(row, *arguments)

    def admit_random(self, rng, row, semantics="tokenstep"):
        prompt, output = history(rng, self.vocab_size, 40), history(rng, self.vocab_size, 10)
        self.admit(row, random_params(rng, self.vocab_size, semantics), prompt, output)

    def release(self, row):
        for sampler in (self.ours, self.cpu):
            sampler.release(row)

    def step(self, logits, rows=None, mask=None, **arguments):
        """The outputs of both, the device's no wider than the CPU's."""
        rows = None if rows is None else np.asarray(rows, np.int32)
        want = self.cpu.step(logits, rows, mask, **arguments)
        array = self.device.array
        with self.device.active():
            got = self.ours.step(array(logits), array(rows), array(mask), **arguments)
        return [as_numpy(a) for a in got], want

    def check_step(self, *arguments, **keywords):
        got, want = self.step(*arguments, **keywords)
        width = -1 if want.top_tokens is None else want.top_tokens.shape[1]
        got[2:4] = [None if width < 0 else a for a in got[2:4]]
        got[4:] = [None if width < 0 else a[:, :width] for a in got[4:]]
        assert_same(got, want)


def random_logits(rng, count, vocab_size=VOCAB):
    values = np.stack([row_of(rng, kind, vocab_size) for kind in rng.choice(KINDS, count)])
    return array_of(values, str(rng.choice(["float32", "float16"])))[0]


@pytest.mark.parametrize("geometry", [("solo", 1), ("cluster", 3), ("soft", 2)], ids=lambda g: g[0])
def test_admissions_steps_and_releases_equal_the_cpu(device, geometry):
    device.use(geometry)
    rng = np.random.default_rng(50)
    twins, admitted = Twins(device), set()
    for _ in range(60):
        action = rng.random()
        if action < 0.3 or not admitted:
            row = int(rng.integers(ROWS))
            twins.admit_random(rng, row)
            admitted.add(row)
        elif action < 0.4:
            row = int(rng.choice(sorted(admitted)))
            twins.release(row)
            admitted.remove(row)
        else:
            rows = rng.permutation(sorted(admitted))[: rng.integers(1, len(admitted) + 1)]
            mask = bitmask(rng, len(rows), VOCAB) if rng.random() < 0.4 else None
            mode = str(rng.choice(["raw", "processed"]))
            twins.check_step(random_logits(rng, len(rows)), rows, mask, logprobs_mode=mode)


def test_a_history_grows_by_what_is_sampled(device):
    device.use(("solo", 1))
    twins = Twins(device, 1, 40)
    twins.admit(0, ts.SamplingParams(temperature=0.0, presence_penalty=5.0, frequency_penalty=0.5))
    logits = np.linspace(3, 0, 40, dtype=np.float32)[None]
    tokens = []
    for _ in range(45):
        got, want = twins.step(logits)
        assert got[0].tolist() == want.tokens.tolist()
        tokens.append(int(got[0][0]))
    assert tokens[:40] == list(range(40)), "each token once, then all again"


def test_rows_that_were_not_admitted_or_do_not_exist_have_status_3(device):
    device.use(("cluster", 2))
    twins = Twins(device)
    for row in range(3):
        twins.admit(row, ts.SamplingParams(seed=row, repetition_penalty=1.5, logprobs=1), [1, 2])
    twins.release(1)
    logits = np.random.default_rng(51).standard_normal((6, VOCAB)).astype(np.float32)
    array = device.array
    rows = array(np.array([0, 1, -1, ROWS, 5, 2], np.int32))
    with device.active():
        out = [as_numpy(a) for a in twins.ours.step(array(logits), rows)]
    want = twins.cpu.step(logits[[0, 5]], np.array([0, 2], np.int32))
    assert out[1].tolist() == [0, 3, 3, 3, 3, 0]
    assert out[0][1:5].tolist() == [-1] * 4
    assert_same([a[[0, 5]] for a in out], want)


def test_a_slot_of_a_released_request_starts_without_its_history(device):
    device.use(("solo", 1))
    twins = Twins(device)
    params = ts.SamplingParams(temperature=0.0, frequency_penalty=3.0, logit_bias={3: 1.0})
    logits = np.random.default_rng(52).standard_normal((1, VOCAB)).astype(np.float32)
    for prompt in ([1, 2, 3], [], list(range(VOCAB))):
        twins.admit(2, params, prompt, prompt)
        for _ in range(3):
            twins.check_step(logits, [2])
        twins.release(2)
    twins.admit(2, params)
    twins.check_step(logits, [2])


def test_out_is_filled_and_nothing_else_is_allocated(device):
    device.use(("solo", 1))
    twins = Twins(device)
    for row in range(2):
        twins.admit(row, ts.SamplingParams(seed=row, logprobs=2))
    logits = device.array(np.random.default_rng(53).standard_normal((2, VOCAB)).astype(np.float32))
    with device.active():
        out = twins.ours.step(logits)
        before = [as_numpy(a).copy() for a in out]
        assert twins.ours.step(logits, out=out) is out
    twins.cpu.step(as_numpy(logits))
    assert_same(
        out if device.name == "simt" else [as_numpy(a) for a in out], twins.cpu.step(as_numpy(logits))
    )
    assert not np.array_equal(before[2], as_numpy(out.logprobs)) or before[0].tolist() != out.tokens.tolist()


def test_a_row_that_is_refused_leaves_what_was_there(device):
    twins = Twins(device)
    twins.admit(0, ts.SamplingParams(seed=1, frequency_penalty=1.0), [1, 2])
    for bad in (ts.SamplingParams(top_p=2.0), ts.SamplingParams(logit_bias={VOCAB: 1.0})):
        with pytest.raises(ValueError, match=r"tokenstep\.Sampler\.admit: "):
            twins.ours.admit(0, bad)
    device.use(("solo", 1))
    twins.check_step(np.random.default_rng(54).standard_normal((1, VOCAB)).astype(np.float32))

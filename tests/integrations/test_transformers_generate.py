"""generate_with(model) is model.generate: its tokens where nothing is drawn, else its distribution.

The same draw: a step's 64 random bits (Philox of seed, position, row) are a fraction of the kept weight,
walked by ascending id. In float64 over what transformers' processors leave, it must give the same token.
"""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="4.57")

from scipy import stats  # noqa: E402
from transformers import (  # noqa: E402
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process as theirs  # noqa: E402

from tokenstep.integrations.transformers import FusedLogitsProcessor, generate_with  # noqa: E402
from tokenstep.reference import numerics  # noqa: E402

EVERYTHING = {"repetition_penalty": 1.3, "temperature": 0.8, "top_k": 60, "top_p": 0.9, "min_p": 0.02}
SAMPLED = {
    "plain": {"top_k": 0},
    "top_k": {"top_k": 20, "temperature": 1.5},
    "top_p": {"top_k": 0, "top_p": 0.8, "repetition_penalty": 1.5},
    "min_p": {"top_k": 0, "min_p": 0.1, "repetition_penalty": 0.7},
    "top_k and min_p": {"top_k": 20, "min_p": 0.1},
    "everything": EVERYTHING,
}


class NoneOf(LogitsProcessor):
    """Bans ids: somebody's own processor."""

    def __call__(self, input_ids, scores):
        scores[:, 100:150] = -torch.inf
        return scores


class EndsWithEven(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 2 == 0) & torch.tensor(input_ids.shape[1] > 16)


class Recorder:
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


def own_processors(parameters, mask):
    """transformers' chain for these parameters, as generate builds it."""
    p = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | parameters
    steps = []
    if p["repetition_penalty"] != 1:
        ignore = (
            {"prompt_ignore_length": (mask != 0).int().argmax(1)} if transformers.__version__ >= "5" else {}
        )
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(p["repetition_penalty"], **ignore))
    steps.append(theirs.TemperatureLogitsWarper(p["temperature"]))
    steps += [theirs.TopKLogitsWarper(p["top_k"])] if p["top_k"] else []
    steps += [theirs.TopPLogitsWarper(p["top_p"])] if p["top_p"] < 1 else []
    steps += [theirs.MinPLogitsWarper(p["min_p"])] if p["min_p"] else []
    return LogitsProcessorList(steps)


@pytest.mark.parametrize("parameters", SAMPLED.values(), ids=SAMPLED)
def test_the_same_draw_over_what_transformers_keeps_gives_the_same_token(tiny, prompts, parameters):
    generate = generate_with(tiny("llama"))
    options = {
        **prompts,
        "do_sample": True,
        "max_new_tokens": 24,
        "eos_token_id": None,
        "seed": 11,
        **parameters,
    }
    out = generate(**options, return_dict_in_generate=True, output_logits=True, output_scores=True)
    assert torch.equal(generate(**options), out.sequences), "the outputs asked for change the tokens"
    chain, length, unclear = own_processors(parameters, prompts["attention_mask"]), 12, 0
    for position, logits in enumerate(out.logits):
        scores = chain(out.sequences[:, : length + position], logits.clone())
        assert (
            torch.isfinite(out.scores[position]) ^ torch.isfinite(scores)
        ).sum() <= 1  # rounding at a boundary
        sums = scores.double().softmax(-1).cumsum(-1).numpy()
        for row, token in enumerate(out.sequences[:, length + position].tolist()):
            u = numerics.random_bits(11, position, row) / 2**64
            if np.abs(sums[row] - u).min() < 1e-6:
                unclear += 1
                continue
            assert token == np.flatnonzero(sums[row] > u)[0], (position, row)
    assert unclear <= 3


@pytest.mark.parametrize("parameters", [SAMPLED["plain"], EVERYTHING], ids=["plain", "everything"])
def test_tokens_follow_transformers_distribution(tiny, prompts, parameters):
    model, one = tiny("llama"), {k: v[1:2] for k, v in prompts.items()}
    out = generate_with(model)(
        **one, do_sample=True, max_new_tokens=1, num_return_sequences=4000, seed=3, **parameters
    )
    with torch.no_grad():
        logits = model(**one, position_ids=(one["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits[:, -1]
    probs = own_processors(parameters, one["attention_mask"])(one["input_ids"], logits.float()).softmax(-1)[0]
    expected = 4000 * probs.double().numpy()
    seen = np.bincount(out[:, -1].numpy(), minlength=len(expected))
    assert seen[expected == 0].sum() == 0
    common = expected >= 5
    pooled = [np.append(n[common], n[~common].sum()) for n in (seen, expected)]
    pooled = [n if pooled[1][-1] > 5 else n[:-1] for n in pooled]
    assert stats.chisquare(pooled[0], pooled[1] * pooled[0].sum() / pooled[1].sum()).pvalue > 1e-4


@pytest.mark.parametrize("name", ["gemma2", "mistral-window"])
def test_greedy_tokens_of_other_families(tiny, prompts, name):
    options = {**prompts, "do_sample": False, "max_new_tokens": 9, "repetition_penalty": 1.1}
    assert torch.equal(generate_with(tiny(name))(**options), tiny(name).generate(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4, "eos_token_id": list(range(0, 288, 9))},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 5, "eos_token_id": list(range(0, 288, 5))},
        {"suppress_tokens": [3, 4, 5], "repetition_penalty": 0.6, "bad_words_ids": [[7], [8, 9]]},
        {"logits_processor": LogitsProcessorList([NoneOf()]), "repetition_penalty": 1.2},
        {"stopping_criteria": [EndsWithEven()], "num_beams": 1},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_greedy_tokens_are_those_of_model_generate(tiny, prompts, options):
    model = tiny("llama")
    options = {**prompts, "do_sample": False, "max_new_tokens": 14, **options}
    expected = model.generate(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(generate_with(model)(**options), expected)


def test_everything_that_return_dict_gives_is_given(tiny, prompts):
    model = tiny("llama-mha")
    wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    options = {
        **prompts,
        "do_sample": False,
        "repetition_penalty": 1.3,
        "max_new_tokens": 5,
        "eos_token_id": None,
    }
    options |= dict.fromkeys(("return_dict_in_generate", *wanted), True)
    ours, expected = generate_with(model)(**options), model.generate(**options)
    assert type(ours) is type(expected)
    assert ours.keys() == expected.keys()
    for key in ("scores", "logits"):
        torch.testing.assert_close(ours[key], expected[key])
    torch.testing.assert_close(ours.attentions[3][1], expected.attentions[3][1])
    torch.testing.assert_close(ours.hidden_states[3][1], expected.hidden_states[3][1])
    assert ours.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_a_streamer_gets_what_model_generate_would_put(tiny, prompts):
    model, streamers = tiny("llama"), (Recorder(), Recorder())
    options = {**{k: v[:1] for k, v in prompts.items()}, "do_sample": False, "max_new_tokens": 6}
    model.generate(**options, streamer=streamers[0])
    generate_with(model)(**options, streamer=streamers[1])
    assert streamers[0].got == streamers[1].got


def test_stop_strings_work_though_generate_drops_the_tokenizer(tiny, prompts):
    from tiny_tokenizers import byte_level_tokenizer

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer())
    options = {**prompts, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    whole = tiny("llama").generate(**options)
    stop = tokenizer.decode(whole[0, 15])
    options |= {"stop_strings": [stop], "tokenizer": tokenizer, "eos_token_id": 0}
    expected = tiny("llama").generate(**options)
    assert not torch.equal(expected[:, : whole.shape[1]], whole)
    assert torch.equal(generate_with(tiny("llama"))(**options), expected)


def test_a_row_with_a_seed_of_its_own_gives_its_tokens_alone_and_in_any_batch(tiny, prompts):
    generate = generate_with(tiny("llama"))
    options = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None, **EVERYTHING}
    together = generate(**prompts, **options, seed=[5, 6, 7])
    alone = generate(input_ids=prompts["input_ids"][:1], **options, seed=[5])
    assert torch.equal(together[:1], alone)
    assert not torch.equal(together, generate(**prompts, **options, seed=[5, 6, 8]))
    with pytest.raises(ValueError, match="seed has 2 entries for 3 rows"):
        generate(**prompts, **options, seed=[5, 6])


def test_without_a_seed_torch_decides(tiny, prompts):
    generate, runs = generate_with(tiny("llama")), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(**prompts, do_sample=True, max_new_tokens=16, eos_token_id=None, top_k=0))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 3}, "beam_search"),
        ({"do_sample": True, "typical_p": 0.6}, "TypicalLogitsWarper"),
        (
            {"do_sample": True, "top_k": 5, "eta_cutoff": 0.1, "epsilon_cutoff": 0.01},
            "EpsilonLogitsWarper, EtaL",
        ),
        ({"do_sample": True, "renormalize_logits": True, "top_k": 4}, "LogitNormalization"),
        ({"prompt_lookup_num_tokens": 3, "row": 1}, "assisted_generation"),
        ({"do_sample": True, "logits_processor": [theirs.TopKLogitsWarper(4)], "temperature": 0.5}, "order"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_fused_is_named_once_and_left_to_model_generate(tiny, prompts, options, named):
    model, recorder = tiny("llama"), Recorder()
    rows = slice(0, options.pop("row", 3))
    options = {**{k: v[rows] for k, v in prompts.items()}, "max_new_tokens": 6, **options}
    if "do_sample" in options:
        options["streamer"] = recorder
    torch.manual_seed(3)
    expected = model.generate(**options)
    puts, recorder.got = recorder.got, []
    torch.manual_seed(99)
    with pytest.warns(UserWarning, match=named) as caught:
        ours = generate_with(model)(**options, seed=3)
    assert len([w for w in caught if "tokenstep" in str(w.message)]) == 1
    assert torch.equal(ours, expected)
    assert recorder.got == puts, "the streamer was used before the call was left to transformers"


def test_rows_that_cannot_be_sampled_are_named(tiny, prompts):
    class Breaks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[1] = self.value
            return scores

    class LooksUp(StoppingCriteria):
        """Sees ids of the vocabulary alone: they are looked up in tables."""

        def __call__(self, input_ids, scores, **kwargs):
            assert (input_ids >= 0).all()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    for Breaks.value, why in ((torch.nan, "row 1 has NaN"), (-torch.inf, "row 1 has no token left")):
        with pytest.raises(ValueError, match=why):
            generate_with(tiny("llama"))(
                **prompts,
                do_sample=True,
                logits_processor=[Breaks()],
                stopping_criteria=StoppingCriteriaList([LooksUp()]),
                max_new_tokens=2,
            )


def test_the_processor_alone_gives_model_generate_its_tokens(tiny, prompts):
    """torch draws both; what differs by rounding is too little to move a token here."""
    model = tiny("llama")
    options = {**prompts, "do_sample": True, "max_new_tokens": 16, "eos_token_id": None}
    ignored = prompts["attention_mask"].argmax(1) if transformers.__version__ >= "5" else None
    torch.manual_seed(0)
    expected = model.generate(**options, **EVERYTHING)
    torch.manual_seed(0)
    processor = FusedLogitsProcessor(**EVERYTHING, prompt_ignore_length=ignored)
    ours = model.generate(**options, top_k=0, logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(ours, expected)

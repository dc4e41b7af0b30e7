"""tokenstep.integrations.llama_cpp: in a stand-in for llama-cpp-python, and (marked peer) in the real one."""

import sys

import llama_cpp_stand_in as stand_in
import numpy as np
import pytest
from llama_cpp_stand_in import END, VOCAB_SIZE, Llama

import tokenstep as ts
from tokenstep.bench.generate import PARAMETERS as ALL_PARAMETERS
from tokenstep.integrations.llama_cpp import FusedLogitsProcessor, Token, generate

PROMPT = [5, 9, 9, 120, 44]
ENDLESS = {"logit_bias": {END: -np.inf}}
PARAMETERS = {
    "greedy": {"temperature": 0.0, **ENDLESS},
    "plain": {"seed": -4, **ENDLESS},
    "everything": {"seed": 1 << 63, **ALL_PARAMETERS, "logit_bias": {END: -np.inf, 3: 2.5}},
    "log probabilities": {"seed": 3, "logprobs": 2, **ENDLESS},
}


@pytest.fixture(autouse=True)
def package(request, monkeypatch):
    """The stand-in in the place of llama_cpp, but for tests of the real one."""
    if "peer" not in request.keywords:
        monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)


def ids(*args, **kwargs):
    return [token.id for token in generate(*args, **kwargs)]


def by_sample(parameters, count):
    """The text by ts.sample, one call a token on the same logits."""
    tokens = []
    for position in range(count):
        output = [token.id for token in tokens]
        out = ts.sample(
            stand_in.logits_after([*PROMPT, *output])[None],
            **parameters,
            prompt_tokens=[PROMPT],
            output_tokens=[output],
            position=position,
            semantics="llama.cpp",
        )
        token = Token(int(out.tokens[0]))
        if out.logprobs is not None:
            top = tuple(zip(out.top_tokens[0].tolist(), out.top_logprobs[0].tolist(), strict=True))
            token = Token(token.id, float(out.logprobs[0]), int(out.ranks[0]), top)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_both_ways_give_what_sample_gives_on_the_same_logits(parameters):
    expected, params = by_sample(parameters, 12), ts.SamplingParams(**parameters)
    assert list(generate(Llama(), PROMPT, params, max_tokens=12)) == expected
    processor = FusedLogitsProcessor(Llama(), params)
    assert Llama().create_completion(PROMPT, 12, **processor.options) == [token.id for token in expected]


def test_parameters_mean_what_they_mean_to_llama_cpp_unless_asked_otherwise():
    """A penalty of the last two tokens moves others than that of all, as tokenstep has it."""
    params = {"temperature": 0.0, "repetition_penalty": 3.0, **ENDLESS}
    of_two = ids(Llama(), PROMPT, ts.SamplingParams(**params, penalty_last_n=2), max_tokens=30)
    of_all = ids(Llama(), PROMPT, ts.SamplingParams(**params), max_tokens=30, semantics="tokenstep")
    assert of_two != of_all
    processor = FusedLogitsProcessor(Llama(), ts.SamplingParams(**params), semantics="tokenstep")
    assert Llama().create_completion(PROMPT, 30, **processor.options) == of_all


def test_a_processor_leaves_one_token_in_place_and_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    processor = FusedLogitsProcessor(Llama(), ts.SamplingParams(seed=1))
    scores = np.zeros(VOCAB_SIZE, dtype=stand_in.CANDIDATE)["logit"]
    assert processor(np.array(PROMPT, np.intc), scores) is scores
    assert sorted(np.unique(scores, return_counts=True)[1]) == [1, VOCAB_SIZE - 1]
    assert (scores.max(), scores.min()) == (0, -np.inf)
    with pytest.raises(ImportError):
        generate(Llama(), PROMPT)


def test_the_end_token_ends_a_text_unless_it_is_to_be_ignored():
    params = ts.SamplingParams(temperature=0.0)
    llama = Llama()
    llama._poison = {len(PROMPT) + 3: np.eye(1, VOCAB_SIZE, END, np.float32)}
    assert len(ids(llama, PROMPT, params, max_tokens=9)) == 3
    assert ids(llama, PROMPT, params, max_tokens=9, ignore_eos=True)[3] == END


def test_a_text_is_as_long_as_asked_for_or_as_the_context_has_room():
    params = ts.SamplingParams(**PARAMETERS["plain"])
    assert [len(ids(Llama(), PROMPT, params, max_tokens=n)) for n in (0, 1, 4)] == [0, 1, 4]
    for max_tokens in (None, 100):
        llama = Llama(n_ctx=20)
        assert len(ids(llama, PROMPT, params, max_tokens=max_tokens)) == 20 - len(PROMPT)
        assert llama.n_tokens == 19, "the last token's own logits are not needed"


@pytest.mark.parametrize("can_forget", [True, False])
def test_what_two_prompts_share_is_computed_once_where_the_model_can_forget_the_rest(can_forget):
    llama, params = Llama(can_forget=can_forget), ts.SamplingParams(**PARAMETERS["plain"])
    for prompt, again in ((PROMPT, 5), (PROMPT, 1), ([5, 9, 8], 1), ([6, 9], 2), ([6, 9, 3, 4, 5], 3)):
        llama._evaluated.clear()
        assert ids(llama, prompt, params, max_tokens=4) == ids(Llama(), prompt, params, max_tokens=4)
        assert llama._evaluated == [again if can_forget else len(prompt), 1, 1, 1]


def test_texts_do_not_depend_on_those_beside_or_before_them():
    params = [ts.SamplingParams(seed=seed, **ALL_PARAMETERS, **ENDLESS) for seed in (1, 2)]
    alone = [ids(Llama(), PROMPT, one, max_tokens=8) for one in params]
    assert alone[0] != alone[1]
    side_by_side = zip(*(generate(Llama(), PROMPT, one, max_tokens=8) for one in params), strict=True)
    assert [list(text) for text in zip(*side_by_side, strict=True)] == [
        [Token(token) for token in text] for text in alone
    ]
    processor = FusedLogitsProcessor(Llama(), params[0])
    for _ in range(3):  # the same object, the same prompt: a new text each time
        assert Llama().create_completion(PROMPT, 8, **processor.options) == alone[0]


def test_two_texts_in_one_llama_are_refused():
    llama = Llama()
    first, second = (generate(llama, [*PROMPT, last], ts.SamplingParams(**ENDLESS)) for last in (1, 2))
    next(first), next(second)
    with pytest.raises(ValueError, match="the Llama was given another text"):
        next(first)


@pytest.mark.parametrize(
    ("value", "why"), [(np.nan, "NaN or [+]inf among the logits"), (-np.inf, "no token left to draw")]
)
def test_logits_that_cannot_be_sampled_end_a_text_with_the_reason(value, why, capsys):
    llama, params = Llama(), ts.SamplingParams(seed=5, **ENDLESS)
    llama._poison = {len(PROMPT) + 2: value}
    with pytest.raises(ValueError, match=f"generate: token 2 of this text: {why}"):
        ids(llama, PROMPT, params)
    processor = FusedLogitsProcessor(llama, params)
    assert llama.create_completion(PROMPT, 9, **processor.options)[2:] == [END]
    assert "token 2 of this text" in capsys.readouterr().err
    assert str(processor.error).startswith("tokenstep.integrations.llama_cpp.FusedLogitsProcessor")
    with pytest.raises(ValueError, match=f"FusedLogitsProcessor: token 2 of this text: {why}"):
        llama.create_completion(
            PROMPT, 9, **processor.options, stopping_criteria=processor.stopping_criterion
        )
    llama._poison.clear()
    checked = {**processor.options, "stopping_criteria": processor.stopping_criterion}
    assert len(llama.create_completion(PROMPT, 9, **checked)) == 9
    assert processor.error is None


@pytest.mark.parametrize(
    ("error", "words", "prompt", "more"),
    [
        (ValueError, "prompt_tokens is empty", [], {}),
        (ValueError, "prompt_tokens has 64 ids, and the context 64 places", [3] * 64, {}),
        (ValueError, "prompt_tokens", [3, VOCAB_SIZE], {}),
        (ValueError, "max_tokens = -1", PROMPT, {"max_tokens": -1}),
        (ValueError, "top_p", PROMPT, {"params": ts.SamplingParams(top_p=1.5)}),
        (ValueError, "logit_bias", PROMPT, {"params": ts.SamplingParams(logit_bias={VOCAB_SIZE: 1.0})}),
        (TypeError, "temperature", PROMPT, {"params": ts.SamplingParams(temperature="hot")}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named_before_anything_is_computed(error, words, prompt, more):
    llama = Llama()
    with pytest.raises(error, match=words):
        generate(llama, prompt, **more)
    if "params" in more:
        with pytest.raises(error, match=words):
            FusedLogitsProcessor(llama, **more)
    assert llama._evaluated == []


# ---- the engine itself: pip install llama-cpp-python, then pytest -m peer tests/integrations --------------
@pytest.fixture(scope="module")
def real():
    """SmolLM2 in llama.cpp; it keeps the logits of all tokens, as its log probabilities need."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from tokenstep.models.load import find_model

    return llama_cpp.Llama(str(find_model("smollm2")), n_ctx=256, n_threads=2, logits_all=True, verbose=False)


SEEDED = ts.SamplingParams(seed=7, **ALL_PARAMETERS)


@pytest.mark.peer
def test_greedy_texts_are_those_of_llama_cpp(real):
    prompt = real.tokenize(b"The capital of Germany is")
    theirs = real.create_completion(prompt, max_tokens=24, temperature=0.0)["choices"][0]["text"]
    greedy = ts.SamplingParams(temperature=0.0)
    assert real.detokenize(ids(real, prompt, greedy, max_tokens=24)).decode() == theirs
    processor = FusedLogitsProcessor(real, greedy)
    ours = real.create_completion(prompt, max_tokens=24, **processor.options)["choices"][0]["text"]
    assert ours == theirs


@pytest.mark.peer
def test_streams_stop_strings_and_log_probabilities_go_on_working(real):
    prompt = "Once upon a time"
    tokens = real.tokenize(prompt.encode())
    whole = real.detokenize(ids(real, tokens, SEEDED, max_tokens=40)).decode()
    options = {"max_tokens": 40, **FusedLogitsProcessor(real, SEEDED).options}
    assert real.create_completion(prompt, **options)["choices"][0]["text"] == whole
    pieces = [piece["choices"][0]["text"] for piece in real.create_completion(prompt, stream=True, **options)]
    assert "".join(pieces) == whole
    stop = whole.split()[5]
    stopped = real.create_completion(prompt, stop=[stop], logprobs=2, **options)["choices"][0]
    assert stopped["text"] == whole[: whole.index(stop)]
    assert stopped["finish_reason"] == "stop"
    expected = [
        t.logprob for t in generate(real, tokens, ts.SamplingParams(seed=7, **ALL_PARAMETERS, logprobs=0))
    ]
    got = stopped["logprobs"]["token_logprobs"]
    np.testing.assert_allclose(got, expected[: len(got)], atol=1e-4)


@pytest.mark.peer
def test_chat_ends_where_the_model_ends_it(real):
    messages = [{"role": "user", "content": "What is the capital of Germany?"}]
    processor = FusedLogitsProcessor(real, ts.SamplingParams(temperature=0.0))
    answer = real.create_chat_completion(messages, max_tokens=40, **processor.options)["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert "Berlin" in answer["message"]["content"]
    assert processor.error is None

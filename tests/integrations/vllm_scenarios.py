"""One vLLM engine through many batches: ``python vllm_scenarios.py MODEL SETTINGS OUT``; results as JSON.

SETTINGS is a JSON object of arguments for `vllm.LLM`, and ``batches``, names of those that are wanted (by
default all but `LONGER`). The environment says which of tokenstep's parts are in the engine.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import triton_interpreter

PROMPTS = [
    "The capital of Germany is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "1 2 3 4 5",
    "Water boils at",
    "My favourite colour is",
]
LONG = " ".join(f"Chapter {n}. The fox and the hen were walking along the river." for n in range(12))
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
EVERYTHING = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02} | PENALTIES
GREEDY = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
RANDOM = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
LONGER = "more than the cache"
FORBIDDEN = [" Berlin", " the", " a"]


def batches() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """By name: prompts with fields of vllm.SamplingParams, generated together."""

    def each(**fields: Any) -> list[tuple[str, dict[str, Any]]]:
        return [(prompt, fields) for prompt in PROMPTS]

    mixed = [GREEDY, RANDOM | {"seed": 3}, GREEDY | PENALTIES, RANDOM | EVERYTHING, GREEDY | {"logprobs": 2}]
    counts = [None, 0, 5, 20, 25, -1]
    early = {"min_tokens": 8, "stop_token_ids": [198, 28, 30], "max_tokens": 12}
    pattern = {"structured_outputs": {"regex": "[ab]{2}-[0-9]{3}"}, "seed": 5, "ignore_eos": False}
    choice = {"structured_outputs": {"choice": ["yes, indeed", "no", "maybe"]}, "ignore_eos": False}
    one_token = {"n": 300, "temperature": 1.0, "top_k": 5, "max_tokens": 1, "logprobs": 10}
    return {
        "greedy": each(**GREEDY),
        "greedy, penalised": each(**GREEDY | PENALTIES),
        "greedy, biased": each(**GREEDY | {"logit_bias": {"260": 4.5, "28": -100.0}}),
        "greedy, bad words": each(**GREEDY | PENALTIES | {"bad_words": FORBIDDEN}),
        "greedy, few allowed": each(**GREEDY | PENALTIES | {"allowed_token_ids": list(range(300, 400))}),
        "greedy, min tokens": each(**GREEDY | early),
        "greedy, log probabilities": each(**GREEDY | {"logprobs": 5}),
        "greedy, penalised, log probabilities": each(**GREEDY | PENALTIES | {"logprobs": 3}),
        "greedy, bad words, log probabilities": each(**GREEDY | {"bad_words": FORBIDDEN, "logprobs": 3}),
        "greedy, chosen log probabilities": each(**GREEDY | {"logprob_token_ids": [28, 30, 260]}),
        "log probabilities of each kind": [
            (prompt, GREEDY | {"max_tokens": 4} | ({} if count is None else {"logprobs": count}))
            for prompt, count in zip(PROMPTS, counts, strict=True)
        ],
        "mixed": [(prompt, mixed[i % len(mixed)]) for i, prompt in enumerate(PROMPTS * 2)],
        "long and short": [
            (prompt, (GREEDY | PENALTIES if i % 2 else GREEDY) | {"max_tokens": 4 + 5 * i})
            for i, prompt in enumerate([LONG, *PROMPTS, LONG[: len(LONG) // 2]])
        ],
        "choice": each(**GREEDY | choice),
        "pattern": each(**RANDOM | EVERYTHING | pattern),
        "one of one": each(**RANDOM | {"top_k": 1, "logprobs": 1}),
        "nucleus of one": each(**RANDOM | {"top_p": 1e-6, "logprobs": 1}),
        "min_p of one": each(**RANDOM | {"min_p": 1.0, "logprobs": 1}),
        "everything": each(**RANDOM | EVERYTHING | {"seed": 11}),
        "everything again": each(**RANDOM | EVERYTHING | {"seed": 11}),
        "everything, other seed": each(**RANDOM | EVERYTHING | {"seed": 12}),
        "first of five": [(PROMPTS[5], one_token)],
        "several each": [(PROMPTS[1], RANDOM | {"n": 3, "seed": 2, "stop": ["."], "min_tokens": 2})],
        "no seed": each(**RANDOM | EVERYTHING),
        LONGER: each(**RANDOM | EVERYTHING | {"seed": 4, "max_tokens": 90}),
    }


def result_of(output: Any) -> list[dict[str, Any]]:
    """What is compared, of each completion of a prompt."""
    return [
        {
            "text": one.text,
            "tokens": list(one.token_ids),
            "logprobs": one.logprobs
            and [{str(i): (p.logprob, p.rank) for i, p in step.items()} for step in one.logprobs],
        }
        for one in output.outputs
    ]


def sampler_of(worker: Any) -> list[str]:
    """The classes of a worker's sampler and of its first layer's attention, by module."""
    runner = worker.model_runner
    context = runner.vllm_config.compilation_config.static_forward_context
    layer = next(layer for layer in context.values() if hasattr(layer, "impl"))
    return [type(runner.sampler).__module__, type(layer.impl).__module__]


def main() -> None:
    """Loads, generates, writes."""
    model, settings, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    if interpreted := os.environ.get("TRITON_INTERPRET") == "1":
        triton_interpreter.stand_in_for_compiler()
    import vllm

    if interpreted:
        triton_interpreter.replace_what_it_cannot_run()
    from vllm.sampling_params import StructuredOutputsParams

    wanted, names = settings.pop("batches", None), set(batches())
    sizes = {"max_num_seqs": 12, "max_model_len": 512, "max_logprobs": -1}
    llm = vllm.LLM(model, enforce_eager=True, disable_log_stats=False, **sizes | settings)
    results: dict[str, Any] = {"classes": llm.collective_rpc(sampler_of)[0]}
    for name, batch in batches().items():
        if name not in (wanted or names - {LONGER}):
            continue
        params = []
        for _, fields in batch:
            own = dict(fields)
            if "structured_outputs" in own:
                own["structured_outputs"] = StructuredOutputsParams(**own["structured_outputs"])
            if "logit_bias" in own:
                own["logit_bias"] = {int(i): bias for i, bias in own["logit_bias"].items()}
            params.append(vllm.SamplingParams(**own))
        outputs = llm.generate([prompt for prompt, _ in batch], params, use_tqdm=False)
        results[name] = [result_of(output) for output in outputs]
        print(name, flush=True)
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    results["preemptions"] = counters["vllm:num_preemptions"]
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()

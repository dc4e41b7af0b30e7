"""The examples that join other libraries run, and do what they say."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="4.57")

import tokenstep as ts  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ["The quick", "A lazy dog sleeps and", "x"]


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A tiny model as a Hugging Face folder."""
    from tiny_tokenizers import byte_level_tokenizer

    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), eos_token="<|begin|>"
    )
    tokenizer.save_pretrained(path)
    return str(path)


def test_sample_numpy(capsys):
    numpy_example = example("sample_numpy")
    numpy_example.main()
    assert len(capsys.readouterr().out.splitlines()) == 6
    out = numpy_example.in_one_call(numpy_example.bigram_logits(np.array([0, 1, 2])))
    assert isinstance(out.tokens, np.ndarray)
    assert out.ranks[0] == 1


@pytest.mark.parametrize("options", [[], ["--attention"]], ids=["sampler", "attention"])
def test_accelerate_hf(folder, options, capsys):
    rates = example("accelerate_hf").main([*PROMPTS, "--model", folder, "--max-new-tokens", "4", *options])
    assert rates.keys() == {"transformers", "tokenstep"}
    printed = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(prompt) for line in printed) for prompt in PROMPTS)


def test_the_small_engine_gives_each_request_what_it_gets_alone(tiny):
    """Greedy as transformers has it; seeded the same with other neighbours, other blocks and too few rows."""
    engine, model = example("engine"), tiny("llama")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 250, (n,), generator=generator).tolist() for n in (3, 17, 9, 1, 30, 12)]

    def run(prompts, params, **sizes):
        requests = [engine.Request(p, params, max_tokens=5 + len(p) % 4) for p in prompts]
        machine = engine.Engine(model, **sizes)
        machine.run(requests)
        assert sorted(machine.free_blocks) == list(range(sizes["num_blocks"]))
        return [r.tokens for r in requests]

    greedy = run(prompts, ts.SamplingParams(temperature=0), max_rows=4, num_blocks=20, block_size=4)
    for prompt, tokens in zip(prompts, greedy, strict=True):
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=5 + len(prompt) % 4)
        assert out[0, len(prompt) :].tolist() == tokens
    sampled = ts.SamplingParams(temperature=1.5, repetition_penalty=1.2, top_p=0.9, seed=4)
    crowded = run(prompts, sampled, max_rows=2, num_blocks=12, block_size=4)
    assert crowded == run(prompts, sampled, max_rows=6, num_blocks=40, block_size=16)
    with pytest.raises(ValueError, match="more blocks"):
        run(prompts[4:5], sampled, max_rows=2, num_blocks=3, block_size=4)


def test_the_small_engine_completes_prompts(folder):
    texts = example("engine").main([*PROMPTS, "--model", folder, "--max-tokens", "4"])
    assert all(text.startswith(prompt) for text, prompt in zip(texts, PROMPTS, strict=True))

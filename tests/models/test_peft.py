"""LoRA adapters: merged weights' results, several in one batch, the prefix cache, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from lora_files import CONFIG, merged, random_adapter, write_adapter
from safetensors.torch import save_file
from tiny_models import build, quantized, save_folder, write_gguf

import tokenstep as ts
from tokenstep.cli.main import main
from tokenstep.completions.errors import RequestError
from tokenstep.completions.schema import Completion
from tokenstep.models import ModelFileError, ModelNotFound, UnsupportedConfig

IDS = [5, 90, 30, 77, 100, 3, 250, 41, 17, 8, 199, 64, 11, 12, 13, 14, 15, 16, 17, 18]
TOLERANCE = 2e-4  # of log probabilities in float32
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "logprobs": 0, "ignore_eos": True}
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"layers.1.self_attn.q_proj": 2, "k_proj": 7},
    "alpha_pattern": {"down_proj": 3, r"layers\.[02]\.mlp\.up_proj": 0.5},
}
ADAPTERS = {  # seed, and what differs from CONFIG
    "one": (1, {}),
    "two": (2, {"target_modules": ["q_proj", "up_proj"], "r": 1}),
    "three": (3, PATTERNS),
}


def open_llm(path: Path, **options: Any) -> ts.LLM:
    return ts.LLM(
        path, **{"dtype": "float32", "device": "cpu", "kv_tokens": 2048, "progress": False, **options}
    )


def score(llm: ts.LLM, adapter: str | None = None) -> list[float]:
    completion = llm.complete(IDS, max_tokens=0, loglikelihood=True, logprobs=0, peft=adapter)
    assert completion.prompt is not None
    assert completion.prompt[0].logprobs is not None
    return [float(value or 0) for value in completion.prompt[0].logprobs.token_logprobs[1:]]


def record(completion: Completion) -> tuple[list[int] | None, list[float | None]]:
    choice = completion.choices[0]
    assert choice.logprobs is not None
    return choice.token_ids, choice.logprobs.token_logprobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, `ADAPTERS`, and each of them merged."""
    model = build("llama")
    root = tmp_path_factory.mktemp("peft")
    save_folder(model, root / "model")
    for name, (seed, config) in ADAPTERS.items():
        tensors = random_adapter(model, seed, **config)
        write_adapter(root / name, tensors, **config)
        save_folder(merged(model, tensors, **config), root / f"merged-{name}")
    return root


@pytest.fixture
def llm(folder: Path) -> Iterator[ts.LLM]:
    with open_llm(folder / "model") as made:
        for name in ADAPTERS:
            made.add_adapter(name, folder / name)
        yield made


@pytest.fixture(scope="module")
def unharmed(folder: Path) -> Iterator[ts.LLM]:
    """What refuses adapters, and computes the same as before."""
    with open_llm(folder / "model") as made:
        before = score(made)
        yield made
        assert score(made) == before
        assert made.adapters == []


@pytest.mark.parametrize(
    ("case", "config"),
    [("llama-biases", {}), ("qwen2", PATTERNS), ("qwen3", {}), ("gemma2", PATTERNS), ("smollm", PATTERNS)],
    ids=lambda value: value if isinstance(value, str) else "patterns" if value else "plain",
)
def test_an_adapter_gives_what_the_merged_weights_give(
    tmp_path: Path, case: str, config: dict[str, Any]
) -> None:
    model = build(case)
    tensors = random_adapter(model, 5, **config)
    with open_llm(save_folder(model, tmp_path / "model")) as llm:
        plain = score(llm)
        llm.add_adapter("a", write_adapter(tmp_path / "a", tensors, **config))
        found = score(llm, "a")
        assert score(llm) == plain
    with open_llm(save_folder(merged(model, tensors, **config), tmp_path / "merged")) as llm:
        assert found == pytest.approx(score(llm), abs=TOLERANCE)
    assert max(abs(one - other) for one, other in zip(found, plain, strict=True)) > 0.1


def test_a_gguf_files_rows_are_in_the_adapters_order(folder: Path, tmp_path: Path) -> None:
    with open_llm(write_gguf(build("llama"), tmp_path / "tiny.gguf")) as llm:
        llm.add_adapter("one", folder / "one")
        found = score(llm, "one")
    with open_llm(folder / "merged-one") as llm:
        assert found == pytest.approx(score(llm), abs=TOLERANCE)


def test_adapters_work_over_weights_that_stay_quantised(folder: Path, tmp_path: Path) -> None:
    path = write_gguf(build("llama"), tmp_path / "tiny.gguf", encode=quantized(GGMLQuantizationType.Q8_0))
    scores = []
    for weights in ("auto", "dequantised"):
        with open_llm(path, weights=weights) as llm:
            assert ("q8_0" in llm.service.engine.runner.model.weight_forms) == (weights == "auto")
            llm.add_adapter("one", folder / "one")
            scores.append((score(llm), score(llm, "one")))
    for quantised, dense in zip(*scores, strict=True):
        assert quantised == pytest.approx(dense, abs=TOLERANCE)
    assert scores[0][0] != pytest.approx(scores[0][1], abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_half_precision_is_read(
    folder: Path, tmp_path: Path, llm: ts.LLM, dtype: torch.dtype
) -> None:
    tensors = random_adapter(build("llama"), 1)
    llm.add_adapter("half", write_adapter(tmp_path / "half", tensors, dtype))
    assert score(llm, "half") == pytest.approx(score(llm, "one"), abs=0.3)
    assert score(llm, "half") != score(llm, "one")


def test_three_adapters_and_none_share_a_batch(folder: Path, llm: ts.LLM) -> None:
    names = [None, "one", "two", "three", "one", None]
    prompts = [IDS[:9], IDS[:9], IDS, IDS[:3], IDS[4:11], IDS[:1]]
    params = [{**GREEDY, "peft": name, "return_token_ids": True} for name in names]
    for name, prompt, completion in zip(names, prompts, llm.generate(prompts, params), strict=True):
        with open_llm(folder / (f"merged-{name}" if name else "model")) as other:
            expected = record(other.complete(prompt, **GREEDY, return_token_ids=True))
        tokens, values = record(completion)
        assert tokens == expected[0]
        assert values == pytest.approx(expected[1], abs=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariance_holds_with_adapters_and_preemption(folder: Path, dtype: str) -> None:
    names = [None, "one", "two", "three", "one", "one", None]
    params = [
        {
            **GREEDY,
            "temperature": 1,
            "seed": i,
            "peft": name,
            "max_tokens": 24,
            "n": 2,
            "return_token_ids": True,
        }
        for i, name in enumerate(names)
    ]
    prompts = [IDS[i:] for i in range(len(names))]
    together: list[Completion] = []
    alone: list[Completion] = []
    for kv_tokens, results in ((192, together), (2048, alone)):
        with open_llm(folder / "model", dtype=dtype, batch_invariant=True, kv_tokens=kv_tokens) as llm:
            for name in ADAPTERS:
                llm.add_adapter(name, folder / name)
            if results is together:
                results += llm.generate(prompts, params)
                assert llm.service.engine.counters.preemptions > 0
            else:
                results += [llm.complete(p, **one) for p, one in zip(prompts, params, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert [choice.model_dump() for choice in one.choices] == [
            choice.model_dump() for choice in other.choices
        ]


def test_the_prefix_cache_crosses_no_adapter(folder: Path, llm: ts.LLM) -> None:
    def cached(adapter: str | None) -> int:
        completion = llm.complete(IDS, **GREEDY, peft=adapter)
        return completion.usage.prompt_tokens_details.cached_tokens

    for name in (None, "one", "two"):
        assert (cached(name), cached(name)) == (0, 16)
    llm.remove_adapter("one")
    llm.add_adapter("one", folder / "three")
    assert cached("one") == 0
    llm.remove_adapter("one")
    llm.add_adapter("one", folder / "one")
    assert cached("one") == 16


def test_a_request_in_flight_keeps_the_adapter_that_is_removed(llm: ts.LLM) -> None:
    whole = llm.complete(IDS, **GREEDY, peft="one")
    stream = llm.complete(IDS, **GREEDY, peft="one", stream=True)
    text = next(stream).choices[0].text
    llm.remove_adapter("one")
    assert (
        text + "".join(choice.text for chunk in stream for choice in chunk.choices) == whole.choices[0].text
    )
    assert llm.adapters == ["three", "two"]
    with pytest.raises(RequestError, match=r"peft = 'one', expected 'three', 'two'"):
        llm.complete(IDS, peft="one")


@pytest.mark.parametrize("name", ["nowhere", "../one", "/etc/passwd", "", "\x00"])
def test_an_unknown_adapter_is_refused_and_no_file_is_looked_for(llm: ts.LLM, name: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.complete(IDS, peft=name)
    assert (caught.value.param, caught.value.code) == ("peft", "adapter_not_found")


def test_the_fingerprint_names_the_adapters_weights(llm: ts.LLM) -> None:
    prints = {llm.complete(IDS, **GREEDY, peft=name).system_fingerprint for name in (None, "one", "two")}
    assert len(prints) == 3
    assert all(fingerprint.startswith(llm.system_fingerprint) for fingerprint in prints)


@pytest.mark.parametrize(("name", "message"), [("one", "another adapter has it"), ("", "expected a name")])
def test_a_name_is_given_once(folder: Path, llm: ts.LLM, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.add_adapter(name, folder / "two")
    with pytest.raises(ValueError, match="there is no such adapter"):
        llm.remove_adapter("nobody")


REFUSED: list[tuple[type[Exception], dict[str, Any], str]] = [
    (UnsupportedConfig, {"peft_type": "IA3"}, "peft_type = 'IA3', expected 'LORA'"),
    (ModelFileError, {"peft_type": ...}, "peft_type is missing"),
    (UnsupportedConfig, {"bias": "lora_only"}, "bias = 'lora_only', expected 'none'"),
    (UnsupportedConfig, {"use_dora": True}, "use_dora = True"),
    (UnsupportedConfig, {"lora_bias": True}, "lora_bias = True"),
    (UnsupportedConfig, {"modules_to_save": ["lm_head"]}, "modules_to_save = "),
    (UnsupportedConfig, {"fan_in_fan_out": True}, "fan_in_fan_out = True"),
    (UnsupportedConfig, {"layer_replication": [[0, 2]]}, "layer_replication = "),
    (UnsupportedConfig, {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    (UnsupportedConfig, {"loftq_config": {"loftq_bits": 4}}, "loftq_config = "),
    (UnsupportedConfig, {"some_new_method": 1}, "some_new_method = 1"),
    (ModelFileError, {"r": 0}, "r = 0, expected an integer"),
    (ModelFileError, {"r": ...}, "r is missing"),
    (ModelFileError, {"lora_alpha": "8"}, "lora_alpha = '8', expected a number"),
    (ModelFileError, {"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj = -1"),
    (ModelFileError, {"rank_pattern": {"(": 1}}, "expected names that are regular expressions"),
    (ModelFileError, {"r": 5}, r"down_proj.lora_A.weight has shape \[4, 96\], expected \[5, 96\]"),
]


@pytest.mark.parametrize(("error", "config", "message"), REFUSED)
def test_an_adapter_that_is_more_than_lora_is_refused(
    tmp_path: Path, unharmed: ts.LLM, error: type[Exception], config: dict[str, Any], message: str
) -> None:
    path = write_adapter(tmp_path / "a", random_adapter(build("llama"), 1), **config)
    with pytest.raises(error, match=message):
        unharmed.add_adapter("a", path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
DAMAGES: list[tuple[type[Exception], dict[str, Any], str]] = [
    (ModelFileError, {Q + "A.weight": torch.zeros(4, 63)}, r"has shape \[4, 63\], expected \[4, 64\]"),
    (ModelFileError, {Q + "B.weight": torch.zeros(65, 4)}, r"has shape \[65, 4\], expected \[64, 4\]"),
    (ModelFileError, {Q + "B.weight": torch.zeros(64)}, r"has shape \[64\], expected \[64, 4\]"),
    (UnsupportedConfig, {Q + "B.weight": torch.zeros((64, 4), dtype=torch.int8)}, "has dtype I8"),
    (ModelFileError, {Q + "B.weight": None}, "q_proj has no lora_B"),
    (ModelFileError, {Q + "A.weight": None, Q + "B.weight": None}, "layer 0 has no self_attn.q_proj"),
    (
        ModelFileError,
        {"base_model.model.model.layers.3.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)},
        "the model has 3 layers",
    ),
    (
        UnsupportedConfig,
        {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)},
        "lm_head.lora_A.weight is no LoRA matrix",
    ),
    (
        UnsupportedConfig,
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.zeros(64)},
        "lora_magnitude_vector is no LoRA matrix",
    ),
]


@pytest.mark.parametrize(("error", "changes", "message"), DAMAGES)
def test_tensors_that_dont_fit_are_named(
    tmp_path: Path, unharmed: ts.LLM, error: type[Exception], changes: dict[str, Any], message: str
) -> None:
    tensors = {**random_adapter(build("llama"), 1), **changes}
    path = tmp_path / "a"
    write_adapter(path, {})
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        path / "adapter_model.safetensors",
    )
    with pytest.raises(error, match=message):
        unharmed.add_adapter("a", path)


def test_a_path_without_an_adapter_is_said(folder: Path, tmp_path: Path, unharmed: ts.LLM) -> None:
    for path in (tmp_path / "nowhere", folder / "model", "../../..", folder / "one" / "adapter_config.json"):
        with pytest.raises(ModelNotFound, match=r"expected a folder with adapter_config\.json"):
            unharmed.add_adapter("a", path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text(json.dumps(CONFIG))
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFileError, match=r"has no adapter_model\.safetensors \(pickled"):
        unharmed.add_adapter("a", pickled)


@pytest.mark.parametrize("size", [0, 7, 100, 3000])
def test_a_truncated_file_is_said(folder: Path, tmp_path: Path, unharmed: ts.LLM, size: int) -> None:
    path = write_adapter(tmp_path / "a", random_adapter(build("llama"), 1))
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ModelFileError, match="is the file complete"):
        unharmed.add_adapter("a", path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"adapter_config\.json"):
        unharmed.add_adapter("a", path)


def test_an_adapter_with_nan_fails_its_own_requests_alone(tmp_path: Path, llm: ts.LLM) -> None:
    tensors = random_adapter(build("llama"), 1)
    tensors[Q + "A.weight"][0, 0] = math.nan
    llm.add_adapter("nan", write_adapter(tmp_path / "nan", tensors))
    before = score(llm)
    with pytest.raises(ts.completions.errors.GenerationError, match="NaN"):
        llm.complete(IDS, **GREEDY, peft="nan")
    assert score(llm) == before


class TestCommandLine:
    def test_complete_takes_a_path(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["complete", "the", "--dtype", "float32", "--temperature", "0", "--ignore-eos", "--json"]
        texts = []
        for options in (
            ["--model", str(folder / "model"), "--peft", str(folder / "one")],
            ["--model", str(folder / "merged-one")],
            ["--model", str(folder / "model")],
        ):
            assert main([*words, *options]) == 0
            texts.append(json.loads(capsys.readouterr().out)["choices"][0]["text"])
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["complete", "the", "--peft", "nowhere"], "adapter = 'nowhere', expected a folder with"),
            (["serve", "--peft", "nowhere"], "argument --peft: nowhere: expected NAME=PATH"),
            (["batch", "a", "b", "--peft", "=nowhere"], "argument --peft: =nowhere: expected NAME=PATH"),
        ],
    )
    def test_wrong_adapters_are_one_line_and_exit_code_2(
        self, folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
    ) -> None:
        try:
            code: object = main([*words, "--model", str(folder / "model")])
        except SystemExit as left:
            code = left.code
        error = capsys.readouterr().err
        assert code == 2
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.peer
@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
        ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
        ("qwen2", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "up_proj"], **PATTERNS}),
        ("gemma2", {"r": 2, "target_modules": r".*\.(o_proj|down_proj)", "use_rslora": True}),
    ],
)
def test_adapters_that_peft_has_written_give_what_peft_computes(
    tmp_path: Path, case: str, config: dict[str, Any]
) -> None:
    import copy

    peft = pytest.importorskip("peft")
    model = build(case)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**config, init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    adapted.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        logits = adapted(torch.tensor([IDS])).logits[0, :-1, :280].double().log_softmax(-1)
    expected = logits.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()
    with open_llm(save_folder(model, tmp_path / "model")) as llm:
        llm.add_adapter("a", tmp_path / "a")
        assert score(llm, "a") == pytest.approx(expected, abs=TOLERANCE)
        assert score(llm) != pytest.approx(expected, abs=0.05)

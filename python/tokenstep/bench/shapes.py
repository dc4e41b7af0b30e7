"""Published models by their shapes alone: folders with config.json and a tokenizer, without weights.

For `tokenstep.LLM(folder, weights="random")`, and for peers that can build a model from its config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
}
STRETCHED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": STRETCHED | {"factor": 32.0},
    },
    "Llama-3.1-8B": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": STRETCHED | {"factor": 8.0},
    },
    "tiny": LLAMA
    | {  # of no published model: for tests
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "vocab_size": 20480,
        "max_position_embeddings": 1024,
        "bos_token_id": 20000,
        "eos_token_id": 20001,
    },
}


def write_shape(name: str, folder: Path) -> Path:
    """Makes `folder` with the config and tokenizer of the shape `name`; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    texts = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts += [f"t{number}" for number in range(len(texts), config["vocab_size"])]
    vocab = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@contextmanager
def model_arguments(model: str, shape: str | None, weights: str = "auto") -> Iterator[dict[str, str]]:
    """What `tokenstep.LLM` takes for `model` with its `weights`, or for random ones of a shape."""
    if shape is None:
        yield {"model": model, "weights": weights}
        return
    with TemporaryDirectory() as folder:
        yield {"model": str(write_shape(shape, Path(folder) / shape)), "weights": "random"}

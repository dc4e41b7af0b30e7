"""Writes the default model as a Hugging Face folder in bfloat16, for peers that read no GGUF.

Run as ``python bench/dequantise.py FOLDER``. transformers wants the package accelerate for this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenstep.models.load import find_model


def main() -> None:
    """Dequantise, and write config.json, model.safetensors and the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    gguf = find_model("smollm2")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="bfloat16")
    del model.config.quantization_config  # it is no longer
    model.config.save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    print(f"{gguf.name} in bfloat16: {folder}")


if __name__ == "__main__":
    main()

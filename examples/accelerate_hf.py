"""Accelerate a Hugging Face model: two lines, and the rest of a program stays as it was.

`generate_with` replaces the sampling in generate's loop, `register` the attention. Needs transformers.

    python examples/accelerate_hf.py "The capital of Germany is" --model HuggingFaceTB/SmolLM2-135M
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenstep.integrations.transformers import generate_with, register


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Generate with and without; returns tokens per second of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", nargs="+", help="one row of the batch each")
    parser.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M", help="a name on the Hub, or a folder"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--attention", action="store_true", help="our attention too, not the sampler alone")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model).to(args.device).eval()
    inputs = tokenizer(args.prompts, return_tensors="pt", padding=True).to(args.device)
    options = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "max_new_tokens": args.max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
    }

    generate = generate_with(model)  # the first line
    rates = {}
    for name in ("transformers", "tokenstep"):
        if name == "tokenstep" and args.attention:
            register()  # the second
            model.set_attn_implementation("tokenstep")
        torch.manual_seed(0)
        begin = time.perf_counter()
        out = (generate if name == "tokenstep" else model.generate)(**inputs, **options)
        new = out[:, inputs["input_ids"].shape[1] :]
        rates[name] = new.numel() / (time.perf_counter() - begin)
        print(f"{name}: {rates[name]:.1f} tokens/s")
    print(*tokenizer.batch_decode(out, skip_special_tokens=True), sep="\n")
    return rates


if __name__ == "__main__":
    main()

